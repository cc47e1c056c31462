"""Results of a dry run as plain data: pickled between processes, written as JSON, read by tests."""

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
    """A process group; its name is unique and the same on all of its ranks."""

    name: str
    ranks: tuple[int, ...]


@dataclass
class RankReport:
    """One rank's step. Memory is in bytes by category, at the rank's peak."""

    rank: int
    coords: Coords
    stages: list[int]
    parameters_sharded: int  # elements of this rank's tensor-parallel shards
    parameters_replicated: int  # elements replicated on all tensor-parallel ranks
    memory: dict[str, int]
    planned: dict[str, int]  # predicted by layout/rank_memory.py and layout/recompute.py
    groups: list[ProcessGroup]
    building: list[IssuedCall]  # while the engine was built
    step: list[IssuedCall]
    new_groups: str  # fingerprint of all groups that the job creates, in order
    micro_batches: int  # number of micro-batches read in the step
    engine_batch: tuple[int, int, int]  # global batch, accumulation and dp as DeepSpeed's engine has them
    reads_data: bool
    matrices: int = 0  # most bytes that Muon's step allocated
    planned_matrices: int = 0  # on the fullest rank of the stage
    seconds: float = 0.0
    host_bytes: int = 0  # peak resident memory of the process that ran the rank

    @property
    def parameters(self) -> int:
        return self.parameters_sharded + self.parameters_replicated

    @property
    def total(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Check:
    """A rule that must hold between ranks."""

    name: str
    ok: bool
    text: str  # summary of the comparison, or the first mismatch


@dataclass
class DryRun:
    """The results of a dry run."""

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
