"""Choose and quantise layers, and measure the loss of quality."""
