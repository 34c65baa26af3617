"""Multi-modal reinforced training: the loss and a reader of its data."""
