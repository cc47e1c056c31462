"""File names and format version of recorded steps, shared by the writer (`recording.py`) and `perf/trace`."""

from __future__ import annotations

FORMAT = 2  # version of rank<N>.json; its events are rows: what, begin, end, stage, micro-batch, bytes
RANK_FILE = "rank{:05d}.json"
PROFILE_FILE = "profile_rank{:05d}.json.gz"
MERGED_FILE = "trace.json.gz"
MARKER = "llama_ds clock "  # prefix of a profiler event's name; the rank's monotonic nanoseconds follow
