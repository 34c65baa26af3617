"""Check that this machine computes FastVLM correctly."""
