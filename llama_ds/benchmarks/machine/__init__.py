"""Calibration of the planner: compute and communication rates measured on all ranks at once (`tools/machine.py`)."""
