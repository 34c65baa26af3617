"""Find checkpoints and read them, whatever their layout, as hostile input."""
