"""The data benchmark: llama_ds against other libraries, with a separate process for every measurement."""
