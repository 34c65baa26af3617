"""Convert a conversation and its images to arrays for the model."""
