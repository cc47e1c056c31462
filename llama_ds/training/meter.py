"""Metrics of a step: throughput, model FLOPs utilisation, wait for data, memory."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch

from llama_ds.config.batch_stages import tokens_before
from llama_ds.config.recompute import GIB
from llama_ds.config.schema import RunConfig
from llama_ds.layout.flops import device_peak, flops_per_token
from llama_ds.layout.layout import Layout
from llama_ds.layout.recompute import ELEMENT_BYTES, recomputed_flops_per_token
from llama_ds.parallel import world
from llama_ds.training.feed import Feed


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Times are seconds per step, averaged since the line before.

    mfu counts the model's FLOPs without recompute, hfu all FLOPs that the hardware executes; both are None if the
    device's peak is unknown. cp_imbalance is the attention of a ring's slowest rank over the mean (`cp_balance`); it is
    written only for rings with data.document_mask.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    mfu: float | None
    hfu: float | None
    step_s: float
    data_wait_s: float
    peak_mem_gib: float
    cp_imbalance: float | None = None


class Meter:
    """Measures rates between reports. `restart` excludes the time since the last report, such as a save."""

    def __init__(
        self, run: RunConfig, layout: Layout, feed: Feed, dtype: str, device: torch.device, first_step: int
    ) -> None:
        """Start the clock of a run that has finished `first_step` steps."""
        self.device = device
        self.world = layout.world
        self.tokens_per_step = layout.global_batch * run.data.seq_len
        self.model_flops = flops_per_token(run.model, run.data.seq_len)
        self.hardware_flops = self.model_flops + recomputed_flops_per_token(run, layout, ELEMENT_BYTES[dtype])
        self.peak = device_peak(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
        self._run, self._feed = run, feed
        self.restart(first_step)
        self._waited = 0.0  # the first interval includes the wait for the run's first batches

    def restart(self, step: int) -> None:
        """Begin a new interval now, after `step` finished steps."""
        self._step, self._since, self._waited = step, time.perf_counter(), self._feed.wait_s

    def measure(self, step: int, loss: float, lr: float, grad_norm: float) -> StepMetrics:
        """End the interval and return the metrics of `step`, the number of finished steps. Collective."""
        steps = step - self._step
        step_s = (time.perf_counter() - self._since) / steps
        data_wait_s = (self._feed.wait_s - self._waited) / steps
        data_wait_s, peak_mem = world.maximum([data_wait_s, peak_memory(self.device)], self.device)
        rate = self.tokens_per_step / step_s
        self.restart(step)
        return StepMetrics(
            step=step,
            tokens=tokens_before(self._run, step),
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_s=rate,
            tokens_per_s_per_gpu=rate / self.world,
            mfu=self._utilisation(rate, self.model_flops),
            hfu=self._utilisation(rate, self.hardware_flops),
            step_s=step_s,
            data_wait_s=data_wait_s,
            peak_mem_gib=peak_mem / GIB,
            cp_imbalance=self._feed.balance.take(step) if self._feed.balance else None,
        )

    def _utilisation(self, tokens_per_s: float, flops: float) -> float | None:
        return tokens_per_s / self.world * flops / self.peak if self.peak else None


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this rank in bytes: of the CUDA allocator, or resident memory on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
