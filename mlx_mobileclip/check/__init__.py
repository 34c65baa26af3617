"""Check that this machine computes what the models state."""
