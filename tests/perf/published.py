"""The published runs in docs/calibration, and the planner's predictions of them."""

from __future__ import annotations

from pathlib import Path

from llama_ds.perf.plan import hardware
from llama_ds.perf.plan.rows import COLUMNS, read_rows
from llama_ds.perf.plan.validate import Checked, check

DATA = Path(__file__).resolve().parents[2] / "docs/calibration"
MACHINES = {name: hardware.load(name) for name in hardware.names()}
HEADER = ",".join(COLUMNS)


def checked(file: str, every: int = 1) -> list[Checked]:
    """Return the predictions of each row, or of one in `every`, of a file."""
    found, _ = check(read_rows(DATA / file)[::every], MACHINES)
    return found


def times(found: list[Checked], machine: str) -> list[Checked]:
    """Return those of times on a kind of machine."""
    return [c for c in found if c.row.kind != "peak_mem_gib" and c.row.gpu.startswith(machine)]
