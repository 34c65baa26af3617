"""Write a FastVLM in the layouts of other runtimes."""
