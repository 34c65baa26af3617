"""The towers of MobileCLIP and FastVLM, stated as in their papers."""
