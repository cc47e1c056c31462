"""What published runs say of their failures and their effective training time, to validate `goodput` against."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llama_ds.perf.plan.goodput import Tier, best_intervals, mtbf_s, simulate, with_intervals

LLAMA3_RATE = 419 / (54 * 16384)  # failures per GPU-day
# Assumed where a source states no costs: restart and save of a job that restores from a shared file system.
DISK = Tier("disk", save_s=10.0, restart_s=600.0, write_s=60.0)
MEMORY = Tier("memory", save_s=0.04, restart_s=300.0, share=0.95)
BELOW_MEMORY = replace(DISK, share=1 - MEMORY.share)


@dataclass(frozen=True)
class PublishedRun:
    """A published run; `stated` and `derived` are shares of effective training time."""

    name: str
    gpus: int
    days: float
    failures: float | None  # None: not stated, planned with the rate of Llama 3
    tiers: tuple[Tier, ...]
    step_s: float
    stated: float | None
    derived: float | None
    source: str
    remark: str

    @property
    def rate(self) -> float:
        """Failures per GPU-day."""
        return LLAMA3_RATE if self.failures is None else self.failures / (self.gpus * self.days)

    @property
    def mtbf_s(self) -> float:
        return mtbf_s(self.rate, self.gpus)

    @property
    def loss_per_failure_s(self) -> float | None:
        """The time that a failure costs on average if failures alone explain the published share."""
        share = self.stated if self.stated is not None else self.derived
        return None if share is None else (1 - share) * self.mtbf_s

    def planned(self) -> tuple[float, list[Tier]]:
        """Return the share that the simulation expects, and the tiers with their intervals."""
        tiers = with_intervals(self.tiers, self.mtbf_s, self.step_s)
        if self.tiers[0].interval_s != tiers[0].interval_s:
            tiers, _ = best_intervals(self.tiers, self.mtbf_s, self.days * 86400, self.step_s, runs=16)
        return simulate(tiers, self.mtbf_s, self.days * 86400, runs=16).effective, tiers


RUNS = (
    PublishedRun(
        *("Llama 3 405B", 16384, 54, 419, (DISK,), 5.0, 0.90, None),
        "arXiv 2407.21783, section 3.3.4",
        "states > 90 percent; neither restart time nor interval",
    ),
    PublishedRun(
        *("ByteRobust", 9600, 90, None, (MEMORY, BELOW_MEMORY), 5.0, 0.97, None),
        "arXiv 2509.16293, abstract",
        "states 97 percent over three months; failures at Llama 3's rate assumed",
    ),
    PublishedRun(
        *("BLOOM", 384, 117, 1.5 * 117 / 7, (Tier("disk", 40.0, 1800.0, 0.0, interval_s=3 * 3600.0),), 105.0, None),
        0.90,
        "arXiv 2211.05100: 1 to 2 GPU failures a week, a checkpoint every 3 hours",
        "derived: 366e9 tokens in steps of 4.2e6 tokens and 105 s are 106 of 117 days",
    ),
    PublishedRun(
        *("OPT-175B", 992, 56, 35 + 70, (Tier("disk", 300.0, 3600.0, 0.0),), 20.0, None),
        0.59,
        "arXiv 2205.01068: 35 manual restarts and more than 70 automatic ones in 2 months",
        "derived: 4.3e23 FLOPs at 147 TFLOP/s per GPU are 33 of 56 days",
    ),
)
