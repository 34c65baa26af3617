"""Run a checkpoint stage by stage, and compare what was written with its source."""
