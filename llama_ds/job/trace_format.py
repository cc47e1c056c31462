"""What the files of recorded steps are called, for who writes (`recording.py`) and who reads (`perf/trace`)."""

from __future__ import annotations

FORMAT = 2  # of rank<N>.json; its events are rows: what, begin, end, stage, micro-batch, bytes
RANK_FILE = "rank{:05d}.json"
PROFILE_FILE = "profile_rank{:05d}.json.gz"
MERGED_FILE = "trace.json.gz"
MARKER = "llama_ds clock "  # in a profile, and the rank's monotonic nanoseconds just before the marker began
