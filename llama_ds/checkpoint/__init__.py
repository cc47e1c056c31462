"""Checkpoints on disk: atomic commit, reading without DeepSpeed, and conversion between model formats."""
