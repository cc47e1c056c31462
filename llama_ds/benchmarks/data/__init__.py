"""The data benchmark: ours against others, every measurement in a process of its own."""
