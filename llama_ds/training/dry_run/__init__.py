"""The dry run: chosen ranks take one whole step on fake tensors; what they hold and send, and whether it agrees."""
