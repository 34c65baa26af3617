"""From a conversation and its images to the arrays that the model reads."""
