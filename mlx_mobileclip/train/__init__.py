"""Multi-modal reinforced training: the loss and a reader for its data."""
