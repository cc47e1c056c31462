"""What a machine can do, measured on all its ranks at once, for the planner: `tools/machine.py gemm` and `comm`."""
