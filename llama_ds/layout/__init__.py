"""Axes of a layout and everything counted from them: partition, weights, parameters, FLOPs, memory, placement."""
