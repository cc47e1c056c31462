"""Axes of a layout, and everything derived from them: partition, weights, parameters, FLOPs, memory, placement."""
