"""The layouts of FastVLM checkpoints."""
