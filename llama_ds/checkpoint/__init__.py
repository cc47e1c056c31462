"""Checkpoints on disk: commit, reading them back without DeepSpeed, conversion to Hugging Face's format."""
