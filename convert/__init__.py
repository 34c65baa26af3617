"""Convert PyTorch and other checkpoints to the canonical form the runtime reads."""
