"""Compares llama_ds with transformers: training steps and decoder layers, from settings to results as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from llama_ds.benchmarks import against_transformers
from llama_ds.benchmarks.layer import shard
from llama_ds.benchmarks.report import layer_results, step_results
from llama_ds.benchmarks.step import Step, Timing, time_interleaved
from llama_ds.checkpoint.weights import DTYPES
from llama_ds.config.rules import check_fp8
from llama_ds.config.schema import ParallelConfig, RunConfig
from llama_ds.errors import UserError
from llama_ds.training.host_memory import keep_freed_memory


@dataclass(frozen=True)
class Settings:
    """Settings of both measurements."""

    batch: int  # rows
    seq_len: int
    dtype: str
    policy: str  # save policy of our layers
    threads: int
    repeats: int
    compiled: bool  # whether transformers is also timed under torch.compile


def measure_steps(run: RunConfig, settings: Settings, zero: int) -> dict[str, Any]:
    """Time full training steps of one process, ours with ZeRO stage `zero`."""
    torch.set_num_threads(settings.threads)
    run = replace(
        run,
        data=replace(run.data, seq_len=settings.seq_len),
        training=replace(run.training, global_batch=settings.batch, batch_stages=()),
        parallel=ParallelConfig(micro_batch=settings.batch, recompute=settings.policy),
        deepspeed={"zero_optimization": {"stage": zero}, "bf16": {"enabled": settings.dtype == "bf16"}},
    )
    shape = (settings.batch, settings.seq_len + 1)
    batch = np.random.default_rng(0).integers(0, run.model.vocab_size, shape)
    timings = _timed(against_transformers.steps(run, batch, settings.dtype, settings.compiled), settings.repeats)
    against_transformers.check_losses(timings, settings.dtype)
    return step_results(run.model, {**asdict(settings), "zero": zero}, timings)


def measure_layer(
    run: RunConfig, shape: str, settings: Settings, tp: int, device_type: str, fp8: bool = False
) -> dict[str, Any]:
    """Time forward and backward of one rank's shard (1 / `tp`) of a decoder layer; `shape` is the name to report.

    With `fp8` also of the layer with products in float8.

    Raises:
        UserError: `tp` does not divide the layer, or there are no products in float8 of its sizes or on the device.
    """
    full = run.model
    if any(size % tp for size in (full.num_attention_heads, full.num_key_value_heads, full.intermediate_size)):
        raise UserError(
            f"command line: --tp {tp} does not divide the {full.num_attention_heads} query heads, "
            f"{full.num_key_value_heads} key-value heads or {full.intermediate_size} features of {shape}"
        )
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    device, dtype, model = torch.device(device_type), DTYPES[settings.dtype], shard(full, tp)
    generator = torch.Generator().manual_seed(0)
    size = (settings.batch, settings.seq_len, model.hidden_size)
    x, grad = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
    run = replace(run, model=model, data=replace(run.data, seq_len=settings.seq_len, document_mask=False))
    run = replace(run, parallel=ParallelConfig(micro_batch=settings.batch))
    if fp8:
        check_fp8(replace(run, compute=replace(run.compute, fp8="delayed", fp8_weight_gradients=True)))
    contestants, attention = against_transformers.layers(run, settings.policy, device, dtype, fp8, settings.compiled)
    steps = {name: contestant.step(x, grad) for name, contestant in contestants.items()}
    measured = {name: (c.saved_bytes(x), c.peak_bytes(steps[name], device)) for name, c in contestants.items()}
    timings = _timed(steps, settings.repeats)
    against_transformers.check_gradients(timings, "bf16" if fp8 else settings.dtype)
    about = {**asdict(settings), "shape": shape, "tp": tp, "device": device_type, "attention": attention}
    return layer_results(model, about, timings, measured)


def _timed(steps: dict[str, Step], repeats: int) -> dict[str, Timing]:
    with tqdm(total=len(steps) * (repeats + 2), unit="step", disable=None) as bar:
        return time_interleaved(steps, repeats, tick=bar.update)
