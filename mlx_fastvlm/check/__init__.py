"""Check that this machine computes what FastVLM states."""
