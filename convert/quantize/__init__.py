"""Quantise layers: which, to how many bits, and what it costs."""
