"""Scaling ladders: run files of several sizes from one dial, their runs, the fitted law and its figures."""
