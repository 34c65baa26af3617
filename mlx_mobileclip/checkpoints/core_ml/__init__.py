"""Read the weights of Core ML packages (.mlpackage) without Core ML."""
