"""llama_ds: pre-training of LLaMA models on DeepSpeed, after arXiv 2302.13971."""

__version__ = "0.1.0"
