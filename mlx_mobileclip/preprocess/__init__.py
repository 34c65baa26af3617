"""Image preprocessing and tokenization."""
