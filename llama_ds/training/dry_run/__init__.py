"""The dry run: selected ranks take one full step on fake tensors; their memory and communication are checked."""
