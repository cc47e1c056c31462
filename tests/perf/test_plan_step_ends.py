"""The exposed part of a step's reduction and gather follows from the order of the last and first passes, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llama_ds.config.run_file import load_run
from llama_ds.perf.plan.estimate import Estimate, as_data, estimate, report
from llama_ds.perf.plan.hardware import load
from llama_ds.perf.plan.step import end_of_step, stage_costs
from llama_ds.perf.plan.step_ends import ChunkEnds, chunk_ends, exposed_gather, exposed_reduction
from llama_ds.schedules.schedule import Schedule
from llama_ds.schedules.simulate import StageCost

GPU = load("a100-80gb")
SIZES = ["parallel.tp=2", "parallel.pp=8", "parallel.recompute=auto"]
ZB_V = ["parallel.schedule=zb_v", "parallel.virtual_stages=2", "parallel.extra_warmup=4"]


@pytest.mark.parametrize(
    ("after", "last", "seconds", "exposed"),
    [
        (0, 10, 4, 1),  # each layer travels while the next one is computed; the last one's 1 s does not fit
        (0, 10, 20, 12.5),  # the link is never free after the first layer, which is ready 2.5 s into the pass
        (5, 10, 20, 7.5),
        (5, 10, 4, 0),
        (16, 10, 20, 0),
    ],
)
def test_gradients_travel_layer_by_layer(after: float, last: float, seconds: float, exposed: float) -> None:
    chunk = ChunkEnds(4, 0, 5, last, after)
    assert exposed_reduction([chunk], seconds, 0) == exposed
    assert exposed_reduction([chunk], seconds, 0.5) == exposed + 0.5 * (seconds - exposed)


def test_a_chunk_that_ends_early_hides_its_gradients() -> None:
    """Two chunks of two layers, 4 s for each layer. The first ends 12 s before the other and hides both."""
    early, late = ChunkEnds(2, 0, 5, 8, 12), ChunkEnds(2, 5, 5, 8, 0)
    assert exposed_reduction([late, early], 16, 0) == exposed_reduction([late], 8, 0) == 4
    assert exposed_reduction([late, replace(early, after=8)], 16, 0) == 4  # link free at 0 either way
    assert exposed_reduction([late, replace(early, after=4)], 16, 0) == 8


def test_weights_are_late_only_for_layers_that_are_due() -> None:
    """4 s for each layer: the first is 4 s late, the second due 2.5 s later, and those of the other chunk at 20 s."""
    first, second = ChunkEnds(2, 0, 5, 8, 0), ChunkEnds(2, 20, 5, 8, 0)
    assert exposed_gather([first], 8, 0) == 5.5
    assert exposed_gather([first, second], 16, 0) == 5.5
    assert exposed_gather([first, replace(second, before=5)], 16, 0) == 8.5
    assert exposed_gather([first, second], 16, 0.1) == pytest.approx(5.5 + 0.1 * 10.5)


def test_ends_are_read_off_a_ranks_passes() -> None:
    """1F1B on the first of two ranks, four micro-batches: the last backward ends the step."""
    [ends] = chunk_ends(Schedule("1f1b", 2, 4).computations(0), [StageCost(1, 2, 3)], [7], 1)
    assert ends == ChunkEnds(7, 0, 1, 5, 0)
    steps = Schedule("zb_v", 2, 4, 2).computations(0)
    outer, inner = chunk_ends(steps, [StageCost(1, 2, 3)] * 2, [7, 8], 1)
    assert (outer.layers, inner.layers, outer.before, inner.forward) == (7, 8, 0, 1)
    assert inner.before >= 1 and inner.after > outer.after == 0  # the chunk with the embedding ends last


@pytest.mark.parametrize(("rank", "joint", "passes"), [(0, 2, 2), (1, 1, 2), (3, 1, 4), (3, 2, 4)])
def test_deferred_weight_gradients_end_a_step_layer_by_layer(rank: int, joint: int, passes: int) -> None:
    """The last rank of H1 defers three micro-batches: with the last one's, a layer's gradient is ready every 4 * 3 / 8.

    In pairs, the fourth waits for the third.
    """
    steps = Schedule("zb_h1", 4, 8, joint=joint).computations(rank)
    [ends] = chunk_ends(steps, [StageCost(1, 2, 3)], [8], joint)
    assert (ends.last, ends.after) == (passes * 3, 0)


@pytest.mark.parametrize("more", [[], ["parallel.schedule=zb_h1"], ZB_V])
def test_without_an_order_nothing_is_overestimated(more: list[str]) -> None:
    run = load_run("ds_configs/llama_65b.yaml", [*SIZES, *more])
    found = estimate(run, 2048, GPU)
    costs = stage_costs(GPU, found.step.job)
    least, ends = sum(end_of_step(GPU, found.step.job, costs)), found.step.reduction + found.step.optimizer
    assert least == ends if not more else 0 < least < ends


def test_bf16_gradients_pay_where_neighbours_add_them_first() -> None:
    """Four data-parallel ranks of a node: each would send twice the bytes of its part of a ring in fp32."""

    def planned(*more: str) -> Estimate:
        return estimate(load_run("ds_configs/llama_65b.yaml", [*SIZES, *ZB_V, *more]), 2048, GPU)

    bf16 = "deepspeed.communication_data_type=bf16"
    fp32, alone, near = planned(), planned(bf16), planned(bf16, "parallel.gradient_neighbours=4")
    assert near.step.reduction < 0.85 * fp32.step.reduction < 0.5 * alone.step.reduction
    assert "gradients in" not in report(fp32) and ", gradients in bf16, ZeRO-1" in report(alone)
    assert ", gradients in bf16 behind sums of 4 neighbours, ZeRO-1" in report(near)
    assert [as_data(found)["gradients"] for found in (fp32, near)] == ["fp32", "bf16"]
