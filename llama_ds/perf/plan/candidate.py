"""A layout that the trainer would run and that fits, or the reason why not; and its estimate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.rules import check
from llama_ds.config.schema import ModelConfig, RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.layout.partition import boundaries, decoder_layers
from llama_ds.layout.rank_memory import rank_memory
from llama_ds.layout.recompute import GIB, USABLE, StagePolicies
from llama_ds.perf.plan.estimate import Estimate, filled, held_by
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import StepJob, job_of
from llama_ds.perf.plan.memory import Memory
from llama_ds.perf.plan.step import step_time
from llama_ds.perf.plan.tensor_chunks import with_chunks

TOO_LARGE = "weights, gradients and optimizer alone do not fit"


@dataclass
class Rejected:
    """Layouts rejected for one reason."""

    count: int = 0
    example: str = ""

    def add(self, example: str) -> None:
        self.count += 1
        self.example = self.example or example


def reject(rejected: dict[str, Rejected], why: str, example: str) -> None:
    """Count a rejected layout."""
    rejected.setdefault(why, Rejected()).add(example)


@dataclass(frozen=True)
class Candidate:
    """A legal layout that fits."""

    run: RunConfig
    layout: Layout
    policies: tuple[StagePolicies, ...]
    memory: tuple[Memory, ...]
    job: StepJob

    def estimate(self, gpu: Hardware) -> Estimate:
        """Return the layout's estimate."""
        return Estimate(self.run, self.layout, gpu, self.policies, self.memory, step_time(gpu, self.job))


def words_of(run: RunConfig) -> str:
    """Return the sizes of a layout, to name it among rejected ones."""
    parallel = run.parallel
    shared = f" cp {parallel.cp} {parallel.cp_method}" if parallel.cp > 1 else ""
    return f"tp {parallel.tp} pp {parallel.pp}{shared} micro-batch {parallel.micro_batch} {parallel.schedule}"


def legal(run: RunConfig, world: int, gpu: Hardware, rejected: dict[str, Rejected]) -> tuple[RunConfig, Layout] | None:
    """Return the run with its partition and the device's memory, and its layout; None if the trainer refuses it."""
    parallel = run.parallel
    partition = _partition(run.model, run.data.seq_len, parallel.pp * parallel.virtual_stages)
    recompute = f"auto: {gpu.memory_gib:g} GiB" if parallel.recompute == "auto" else parallel.recompute
    run = replace(run, parallel=replace(parallel, partition=partition, recompute=recompute))
    try:
        check(run)
        layout = resolve_layout(run, world)
        deepspeed_config(run, layout, gpu.dtype == "bf16")
    except UserError as error:
        why = "refused by the trainer's rules: " + _class_of(str(error))
        reject(rejected, why, f"{words_of(run)}: {error}")
        return None
    return run, layout


def candidate(run: RunConfig, world: int, gpu: Hardware, rejected: dict[str, Rejected]) -> Candidate | None:
    """Return the run's layout as a candidate; None if it is rejected."""
    found = legal(run, world, gpu, rejected)
    if found is None:
        return None
    run, layout = found
    words = words_of(run)
    held = rank_memory(run, filled(run, layout), gpu.element_bytes)
    states = max(rank.fixed for rank in held) if run.zero_stage == 1 else 0
    if states > USABLE * gpu.memory_bytes:
        reject(
            rejected,
            TOO_LARGE,
            f"{words}: {states / GIB:.1f} of the {USABLE * gpu.memory_gib:.1f} GiB that may be used",
        )
        return None
    try:
        policies, memory = held_by(run, layout, gpu)
    except UserError as error:
        reject(rejected, "does not fit, even with full recompute", f"{words}: {error}")
        return None
    peak = max(rank.total for rank in memory)
    if peak > gpu.memory_bytes:
        reject(
            rejected,
            "whole matrices of Muon do not fit" if _lacks_matrices(memory, gpu) else "does not fit",
            f"{words} ZeRO-{run.zero_stage} recompute {run.parallel.recompute}: {peak / GIB:.1f} of "
            f"{gpu.memory_gib:g} GiB",
        )
        return None
    run, job = with_chunks(gpu, run, job_of(run, layout, policies, gpu.dtype))
    return Candidate(run, layout, policies, memory, job)


def _lacks_matrices(memory: tuple[Memory, ...], gpu: Hardware) -> bool:
    """Return whether a layout would fit but for the matrices of Muon's step."""
    return all(rank.kept + rank.activations + rank.working <= gpu.memory_bytes for rank in memory)


@lru_cache(maxsize=1000)
def _partition(model: ModelConfig, seq_len: int, stages: int) -> tuple[int, ...]:
    return tuple(decoder_layers(boundaries(model, seq_len, stages, None)))


def _class_of(message: str) -> str:
    """Return the key that a rule's error message names."""
    words = message.split(": ", 1)[-1].split()
    return words[0] if words else "?"
