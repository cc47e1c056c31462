"""Which axis or option is at fault when a self-test fails: trials with each axis alone, then with options off.

In a trial the ranks of each group along the tried axes are a world of their own (`parallel/temporary.py`), so the other
axes' communication does not take part, and groups on faulty hosts are told from others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, count
from typing import Any

import torch

from llama_ds.config.context_parallel import RING, cp_sizes
from llama_ds.config.section_rules import WITHOUT_MUON
from llama_ds.errors import listed
from llama_ds.parallel import world
from llama_ds.parallel.temporary import part_of_world
from llama_ds.schedules.schedule import defers
from llama_ds.training.self_test.comparison import bounds_of, compare
from llama_ds.training.self_test.small_run import SmallRun, with_axes, without_schedule

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """The result of one combination of axes, on all groups of ranks."""

    name: str
    failures: dict[tuple[int, ...], str]  # ranks of the groups that differ, and what differs
    groups: int

    def words(self) -> str:
        """Return what failed: "tp 2 alone fails in 1 of 2 groups, ranks 2 and 3: the loss differs by 0.1 ..."."""
        ranks = next(iter(self.failures))
        first = f" in {len(self.failures)} of {self.groups} groups, first in that of ranks {_all(ranks)}"
        return f"{self.name} fails{first if len(self.failures) < self.groups else ''}: {self.failures[ranks]}"


class FaultSearch:
    """Trials of one failed self-test. All ranks make the same ones."""

    def __init__(self, small: SmallRun, rank_info: world.RankInfo, device: torch.device) -> None:
        self.small, self.rank_info, self.device = small, rank_info, device
        self._numbers = count()

    def verdict(self, failed: str) -> str:
        """Say which axes and options are at fault, given what the failed test found. Collective."""
        sizes = self.small.layout.sizes._asdict()
        axes = tuple(axis for axis, size in sizes.items() if size > 1)
        whole = Trial(self.small.layout.words(), {tuple(range(self.small.layout.world)): failed}, 1)
        passed: list[str] = []
        for together in range(len(axes) + 1):
            trials = {chosen: self._try(chosen, axes, whole) for chosen in combinations(axes, together)}
            faulty = {chosen: trial for chosen, trial in trials.items() if trial.failures}
            if faulty:
                break
            passed += [trial.name for trial in trials.values()]
        else:
            return "it passes when it is repeated, so the fault comes and goes"
        chosen, trial = next(iter(faulty.items()))
        return ". ".join(self._sentences(chosen, trial, list(faulty.values()), passed))

    def _sentences(self, chosen: Axes, trial: Trial, faulty: list[Trial], passed: list[str]) -> Iterator[str]:
        where = f"along {' and '.join(chosen)}" if chosen else "in what each rank computes by itself"
        yield f"The fault is {where}: " + "; ".join(other.words() for other in faulty)
        if passed:
            yield _capital(f"{_all(passed)} {'passes' if len(passed) == 1 else 'pass'}")
        helping = [
            name
            for name, small in options_off(with_axes(self.small, chosen))
            if not self._run(name, small, chosen).failures
        ]
        if helping:
            yield _capital(f"{trial.name} passes with {listed(helping)}")

    def _try(self, chosen: Axes, axes: Axes, whole: Trial) -> Trial:
        if chosen == axes:
            return whole
        sizes = self.small.layout.sizes._asdict()
        name = " x ".join(f"{axis} {sizes[axis]}" for axis in chosen) + " alone" if chosen else "one rank alone"
        return self._run(name, with_axes(self.small, chosen), chosen)

    def _run(self, name: str, small: SmallRun, axes: Axes) -> Trial:
        """Make one trial. Collective."""
        layout, rank = self.small.layout, self.rank_info.rank
        own = layout.group(rank, *axes)
        with part_of_world(own, f"self_test_{next(self._numbers)}"):
            rank_info = world.RankInfo(own.index(rank), len(own), self.rank_info.local_rank)
            try:
                found = compare(small, rank_info, self.device).beyond(bounds_of(small))
            except Exception as error:  # a fault may also crash
                found = [f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"]
        every = dict.fromkeys(tuple(group) for group in layout.groups(*axes))
        texts = world.gather("; ".join(found))
        failures = {group: text for group in every if (text := next((texts[r] for r in group if texts[r]), ""))}
        return Trial(name, failures, len(every))


def options_off(small: SmallRun) -> Iterator[tuple[str, SmallRun]]:
    """Yield variants of a test with one of its options off, and their names."""
    run = small.run
    parallel, model, compute = run.parallel, run.model, run.compute

    def of(section: str, **changes: Any) -> SmallRun:
        return replace(small, run=replace(run, **{section: replace(getattr(run, section), **changes)}))

    if parallel.sequence_parallel:
        yield "parallel.sequence_parallel=false", of("parallel", sequence_parallel=False)
    if parallel.tp_chunks > 1:
        yield "parallel.tp_chunks=1", of("parallel", tp_chunks=1)
    if parallel.cp > 1 and cp_sizes(run)[0].all_to_all > 1:
        yield "parallel.cp_method=ring", of("parallel", cp_method=RING, cp_all_to_all=0)
    if small.layout.pp > 1 and parallel.schedule != "1f1b":
        yield "parallel.schedule=1f1b", without_schedule(small)
    if parallel.joint_weight_gradients > 1:
        yield "parallel.joint_weight_gradients=1", of("parallel", joint_weight_gradients=1)
    if parallel.cuda_graphs:
        yield "parallel.cuda_graphs=false", of("parallel", cuda_graphs=False)
    if parallel.gradient_neighbours > 1:
        yield "parallel.gradient_neighbours=1", of("parallel", gradient_neighbours=1)
    if run.reduces_in_bf16:
        in_fp32 = of("parallel", gradient_neighbours=1).run
        in_fp32 = replace(in_fp32, deepspeed={**run.deepspeed, "communication_data_type": "fp32"})
        yield "communication_data_type=fp32", replace(small, run=in_fp32)
    if parallel.recompute != "none":
        yield "parallel.recompute=none", of("parallel", recompute="none")
    if run.zero_stage > 1:
        zero_1 = {**run.deepspeed, "zero_optimization": {"stage": 1}}  # other keys are refused without their stage
        yield "ZeRO-1", replace(small, run=replace(run, deepspeed=zero_1))
    if run.data.document_mask:
        yield "data.document_mask=false", of("data", document_mask=False)
    if compute.attention_backend != "reference":
        yield "compute.attention_backend=reference", of("compute", attention_backend="reference")
    deferred = small.layout.pp > 1 and defers(parallel.schedule, parallel.joint_weight_gradients)
    if compute.decoder_layer != "autograd" and parallel.recompute in ("none", "full") and not deferred:
        by_autograd = replace(
            run, parallel=replace(parallel, tp_chunks=1), compute=replace(compute, decoder_layer="autograd")
        )
        yield "compute.decoder_layer=autograd", replace(small, run=by_autograd)
    if run.optimizer.name != "adamw":
        yield "optimizer.name=adamw", of("optimizer", name="adamw", **WITHOUT_MUON)
    if run.optimizer.z_loss:
        yield "optimizer.z_loss=0", of("optimizer", z_loss=0.0)
    for key, off in (
        ("tie_word_embeddings", False),
        ("attention_bias", "none"),
        ("mlp_bias", False),
        ("qk_norm", False),
    ):
        if getattr(model, key) != off:
            yield f"model.{key}={str(off).lower()}", of("model", **{key: off})


def _all(things: Iterable[object]) -> str:
    """Return the things as an English list: "0, 1 and 2"."""
    *others, last = map(str, things)
    return f"{', '.join(others)} and {last}" if others else last


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
