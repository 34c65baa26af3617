"""Zero-shot classification, metrics, and the published evaluations."""
