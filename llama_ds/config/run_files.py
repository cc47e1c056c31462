"""Names of the files in a run's folder that several rooms write or read."""

METRICS = "metrics.jsonl"  # what was measured, a line for each report
MACHINES = "machines.jsonl"  # hosts, device and software of each start
SAMPLES = "samples.jsonl"  # continuations of prompts along training
WARNINGS = "warnings.jsonl"  # what the first rank has warned of
RUN_FILE = "run.yaml"  # the resolved run file
