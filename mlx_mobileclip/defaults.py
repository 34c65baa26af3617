"""Defaults shared by the Python API and the command line; imports nothing."""

DEFAULT_MODEL = "apple/MobileCLIP2-S0"
