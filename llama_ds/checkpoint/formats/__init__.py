"""Model formats: Hugging Face's, Meta's and DeepSpeed's layer files, read as tensors in files, written by a plan."""
