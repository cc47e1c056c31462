"""What a machine can do, measured on all its ranks at once, for the planner: `tools/throughput.py gemm` and `comm`."""
