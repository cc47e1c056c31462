"""What a dry run found of one rank, and of all: plain data that processes hand over, JSON and tests read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from llama_ds.layout.axes import Coords
from llama_ds.layout.layout import Layout

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "working")  # as parallel/dry_run/ledger.py has them


class IssuedCall(NamedTuple):
    """A collective or message, in the order in which the rank issued it."""

    kind: str
    group: int  # index into `RankReport.groups`
    peer: int  # global rank; -1: none
    bytes: int


class ProcessGroup(NamedTuple):
    """A process group: its name is the same on all of its ranks, and no other group's."""

    name: str
    ranks: tuple[int, ...]


@dataclass
class RankReport:
    """One rank's step. Memory in bytes by category, at the moment at which most is held."""

    rank: int
    coords: Coords
    stages: list[int]
    parameters_cut: int  # over tensor-parallel ranks
    parameters_whole: int
    memory: dict[str, int]
    planned: dict[str, int]  # what layout/rank_memory.py and layout/recompute.py say
    groups: list[ProcessGroup]
    building: list[IssuedCall]  # while the engine was built
    step: list[IssuedCall]
    new_groups: str  # fingerprint of all groups made by the job, in their order
    micro_batches: int  # number that the rank read in the step
    engine_batch: tuple[int, int, int]  # global batch, accumulation and dp as DeepSpeed's engine has them
    reads_data: bool
    seconds: float = 0.0
    host_bytes: int = 0  # peak resident memory of the process that ran the rank

    @property
    def parameters(self) -> int:
        return self.parameters_cut + self.parameters_whole

    @property
    def total(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Check:
    """A rule that must hold between ranks."""

    name: str
    ok: bool
    text: str  # what was compared, or what is wrong


@dataclass
class DryRun:
    """All that a dry run found."""

    name: str
    layout: Layout
    backend: str
    ranks: list[RankReport]
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def axis_of(ranks: tuple[int, ...], layout: Layout) -> str:
    """Return the axis along which a group lies, or "all", "self" (one rank) or "mixed"."""
    if len(ranks) == layout.world:
        return "all"
    varies = layout.varying(ranks)
    return varies[0] if len(varies) == 1 else ("self" if not varies else "mixed")
