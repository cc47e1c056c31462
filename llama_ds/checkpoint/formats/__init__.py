"""Model formats: readers and write plans for Hugging Face's and Meta's formats and DeepSpeed's layer files."""
