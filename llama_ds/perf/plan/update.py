"""Time of the optimizer's update on one rank: memory traffic, and with Muon whole matrices and their products.

Bytes are counted in `parallel/elementwise.py` and `parallel/muon.py`, where every operation reads its inputs and writes
its output; torch's fused AdamW (`Program.optimizer_bytes`) is one kernel.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from llama_ds.config.schema import ModelConfig
from llama_ds.layout.matrix_owners import ITERATIONS, newton_schulz_flops, owners
from llama_ds.layout.weights import Role, weights
from llama_ds.perf.plan.communication import RankGroup, half
from llama_ds.perf.plan.compute import gemm, pointwise
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import StepJob

AROUND = 14  # bytes for each parameter: the norm reads its gradient, which is zeroed; the 16-bit weight is written
# Clipping 8, update of the weight 48 (two products, a sum, a choice that keeps it if a gradient is not finite, a copy).
APPLIED = 56
LION = 52  # sign of an average 20, average 12, choice and copy 20
MUON = 60  # two averages 24, choice and copy 20, to the dtype of the exchange and back 16
LOW_PRECISION = 130  # two averages and a square 40, choices and copies 40, root and quotients 50
# Bytes of an iteration, in elements: of X (n, m) three reads and writes, of its square (n, n) five.
WHOLE_PASSES, SQUARE_PASSES = 3, 5


@dataclass(frozen=True)
class UpdateTime:
    """Seconds of a rank's update."""

    traffic: float  # elementwise work
    products: float  # Newton-Schulz iterations, on the rank with the most
    exchange: float  # matrices and their updates, not overlapped
    flops: float  # FLOPs of the products on all ranks of the stage
    sent: float  # bytes that a rank sends

    @property
    def seconds(self) -> float:
        """The sum."""
        return self.traffic + self.products + self.exchange


def update_time(gpu: Hardware, job: StepJob, rank: int, by_role: Counter[Role]) -> UpdateTime:
    """Return the time of the update on a rank of pipeline position `rank`, which has `by_role` parameters."""
    share = 1 / job.state_group.size if job.zero_stage else 1.0
    hidden = by_role[Role.HIDDEN_MATRIX] * (job.optimizer == "muon")
    plain = job.program.optimizer_bytes if job.optimizer != "lion" else AROUND + APPLIED + LION
    if job.low_precision and job.optimizer != "lion":
        plain = AROUND + APPLIED + LOW_PRECISION
    moved = plain * (by_role.total() - hidden) + (AROUND + APPLIED + MUON) * hidden
    traffic = pointwise(gpu, moved * share, "optimizer")
    if not hidden:
        return UpdateTime(traffic, 0.0, 0.0, 0.0, 0.0)
    products, flops = _newton_schulz(gpu, job, rank)
    size, group = float(job.program.element_bytes) * hidden, RankGroup(job.axes.data_axis * job.tp, 1)
    exchanges = [size * share, size * share if job.zero_stage else size]
    sent = sum(exchanges) * (group.size - 1) / group.size
    return UpdateTime(traffic, products, sum(half(gpu, group, one) for one in exchanges), flops, sent)


def _newton_schulz(gpu: Hardware, job: StepJob, rank: int) -> tuple[float, float]:
    """Return (seconds of the rank with the most, FLOPs of all ranks) for the matrices of a pipeline position."""
    placement = job.placement
    layers = sum(job.layers[placement.stage(rank, chunk)] for chunk in range(placement.chunks))
    return _matrices(gpu, job.model, layers, job.axes.data_axis * job.tp, job.program.element_bytes)


@lru_cache(maxsize=10_000)  # a search asks for the same layers and ranks under every schedule and micro-batch
def _matrices(gpu: Hardware, model: ModelConfig, layers: int, ranks: int, element_bytes: int) -> tuple[float, float]:
    """Return the same for the hidden matrices of `layers` layers, which `ranks` ranks share."""
    shapes = [
        weight.shape(model) for (layer, _), weight in weights(model) if layer == 1 and weight.role is Role.HIDDEN_MATRIX
    ] * layers
    costs = [newton_schulz_flops(rows, columns, ITERATIONS) for rows, columns in shapes]
    loads = [0.0] * ranks
    for shape, owner in zip(shapes, owners(costs, [0] * ranks), strict=True):
        n, m = sorted(shape)
        step = gemm(gpu, n, n, m) + gemm(gpu, n, n, n) + gemm(gpu, n, m, n)
        moved = element_bytes * (WHOLE_PASSES * n * m + SQUARE_PASSES * n * n)
        loads[owner] += ITERATIONS * (step + pointwise(gpu, moved))
    return max(loads), float(sum(costs))
