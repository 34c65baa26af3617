"""Run a checkpoint stage by stage, and compare the written one with its source."""
