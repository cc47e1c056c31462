"""The search's zero-bubble Vs: bounds before any order, the fastest of a size, limits that are said, written files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llama_ds.config.run_file import load_run
from llama_ds.config.schema import ParallelConfig, RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.recompute import stage_policies
from llama_ds.perf.plan import hardware, v_search
from llama_ds.perf.plan.cost import run_cost
from llama_ds.perf.plan.estimate import Estimate, estimate
from llama_ds.perf.plan.search import search
from llama_ds.perf.plan.step import stage_costs, stage_message
from llama_ds.perf.plan.tables import search_data, search_table
from llama_ds.perf.plan.v_search import CLOSE, LIMITS, Ordering, VSize, v_sizes
from llama_ds.perf.plan.write import write
from llama_ds.schedules.pass_times import pass_times_of
from llama_ds.schedules.zero_bubble_v import V_SCHEDULES

REPO = Path(__file__).resolve().parents[2]
A100 = hardware.load("a100-80gb")
# One GPU a node on a slow network, over which pipelines send least.
APART = replace(A100, links=replace(A100.links, gpus_per_node=1, network_gb_s=5.0))
COST = run_cost(1e12, 400, 8, 400)


def base(rows: int) -> RunConfig:
    options = ["parallel={}", f"training.global_batch={rows}"]
    run = load_run(str(REPO / "ds_configs/llama_7b.yaml"), options)
    return replace(run, deepspeed={"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}})


def sizes_of(run: RunConfig, world: int, gpu: hardware.Hardware, tp: int, pp: int, micro: int) -> list[VSize]:
    parallel = ParallelConfig(tp=tp, pp=pp, sequence_parallel=tp > 1, micro_batch=micro)
    parallel = replace(parallel, schedule="zb_v", virtual_stages=2, recompute="auto")
    return v_sizes(replace(run, parallel=parallel), world, gpu, {})


def planned(size: VSize, gpu: hardware.Hardware, times: tuple[int, ...] | None, **values: object) -> Estimate | None:
    parallel = replace(size.run.parallel, pass_times=times, **values)  # type: ignore[arg-type]
    try:
        found = estimate(replace(size.run, parallel=parallel), size.layout.world, gpu)
    except UserError:
        return None
    return found if found.fits else None


def every_v(size: VSize, gpu: hardware.Hardware) -> Iterator[tuple[float, Estimate]]:
    """Yield each choice's bound with its estimate, ordered by equal passes and by planned ones in two units."""
    for choice in size.choices:
        name, extra = LIMITS[choice.memory]
        values = {"schedule": name, "extra_warmup": extra, "joint_weight_gradients": choice.joint}
        values["post_validation"] = choice.post_validation
        equal = planned(size, gpu, None, **values)
        if equal is None:
            continue
        yield choice.bound, equal
        costs, message = stage_costs(gpu, equal.step.job), sum(stage_message(gpu, equal.step.job))
        for units in (50, 12):
            times = pass_times_of(costs, message, sum(c.forward for c in costs) / len(costs) / units)
            found = planned(size, gpu, times, **values)
            if found:
                yield choice.bound, found


def test_bounds_are_below_every_order_and_the_best_v_is_found() -> None:
    """7B on pipelines of two and four ranks, with memory for all activations and for few."""
    rng = random.Random(2)
    for memory in (80.0, 80.0, 30.0, 24.0):
        gpu = replace(A100, memory_gib=memory)
        pp = rng.choice([2, 4])
        rows = 2 * rng.choice([pp, 2 * pp, 3 * pp + 1])
        both = sizes_of(base(rows), 4 * pp, gpu, 2, pp, 1)
        every = [pair for size in both for pair in every_v(size, gpu)]
        assert every, (memory, pp, rows)
        assert all(bound <= found.step.seconds * (1 + 1e-9) for bound, found in every), (memory, pp, rows)
        best = [found for size in both if (found := size.fastest(gpu, float("inf"), Ordering(), {}))]
        fastest = min(best, key=lambda found: found.step.seconds)
        least = min(found.step.seconds for _, found in every)
        assert fastest.step.seconds <= CLOSE * least, (memory, pp, rows)
        again = estimate(fastest.run, 4 * pp, gpu)
        assert again.step.seconds == fastest.step.seconds and again.memory == fastest.memory and again.fits


def test_the_search_finds_the_v_and_writes_it(tmp_path: Path) -> None:
    found = search(base(8), 4, APART, top=5)
    best = found.best[0]
    assert best.run.parallel.schedule == "zb_v" and best.run.parallel.post_validation
    assert estimate(best.run, 4, APART).step.seconds == best.step.seconds
    assert not found.ordering.left_out and found.ordering.computations > 0
    yaml_path, _ = write(best.run, tmp_path / "planned")
    run = load_run(str(yaml_path))
    assert run.parallel == best.run.parallel
    again = estimate(run, 4, APART)
    assert again.step.seconds == best.step.seconds and again.memory == best.memory
    text = search_table(found, COST)
    assert "zb_v x2" in text and " early" in text and "left out" not in text


@pytest.mark.parametrize(
    ("limit", "words"), [("MAX_RANKS", "zero-bubble Vs of more than"), ("MAX_ORDERED", "where the search stops")]
)
def test_what_a_limit_leaves_out_is_said(monkeypatch: pytest.MonkeyPatch, limit: str, words: str) -> None:
    monkeypatch.setattr(v_search, limit, -1)
    found = search(base(8), 4, APART, top=5)
    assert not any(item.run.parallel.schedule in V_SCHEDULES for item in found.best)
    text = search_table(found, COST)
    assert "left out, though their bounds are among the best:" in text and words in text and "at most" in text
    (reason,) = search_data(found, COST)["left_out"].values()
    assert reason["count"] > 0 and "tokens/s/GPU" in reason["example"]


def test_memory_of_a_v_is_that_of_its_whole_step() -> None:
    """97 micro-batches: the order for 25 held an eighth less."""
    layout = "parallel={pp: 8, schedule: zb_v, virtual_stages: 2, extra_warmup: 4, pass_times: [50, 58, 44, 2]}"
    found = estimate(load_run(str(REPO / "ds_configs/llama_7b.yaml"), [layout, "training.global_batch=97"]), 8, A100)
    stages = stage_policies(found.run, found.layout, 2)
    assert sum(rank.activations for rank in found.memory) == sum(stage.saved_bytes for stage in stages)
