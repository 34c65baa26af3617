"""Image and text towers of MobileCLIP; FastVLM shares the image tower."""
