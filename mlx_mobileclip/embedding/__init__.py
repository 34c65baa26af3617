"""Embed many images or texts: find the files, run the model, write the result."""
