"""Check that this machine computes the models correctly."""
