"""Find checkpoints and read them in any layout, as hostile input."""
