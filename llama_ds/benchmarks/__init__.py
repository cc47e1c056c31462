"""Benchmarks against other libraries, and measurements of a machine, run by tools/benchmark.py, pipeline.py and
machine.py; `evaluation` and `generation` belong to tools/evaluate.py and generate.py."""
