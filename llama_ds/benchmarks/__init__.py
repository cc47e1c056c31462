"""Measurements: ours against others', and what a machine can do. Started by tools/benchmark.py, pipeline.py and
machine.py; `evaluation` and `generation` are of evaluate.py and generate.py."""
