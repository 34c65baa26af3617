"""Results cached between calls and between runs."""
