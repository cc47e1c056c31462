"""Measurements: ours against others', and what a machine can do. Started by tools/throughput.py."""
