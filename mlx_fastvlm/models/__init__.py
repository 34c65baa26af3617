"""FastVLM: the decoder, its KV cache, and the whole model."""
