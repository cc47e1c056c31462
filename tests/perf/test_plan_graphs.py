"""The planner counts what CUDA graphs save and cost, and takes them where they pay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llama_ds.config.run_file import load_run
from llama_ds.perf.plan import hardware
from llama_ds.perf.plan.estimate import Estimate, as_data, estimate, report
from llama_ds.perf.plan.search import search

RUN_FILE = str(Path(__file__).resolve().parents[2] / "ds_configs" / "small_1gpu.yaml")
A100 = hardware.load("a100-80gb")
GRAPHS = "parallel.cuda_graphs=true"


def planned(*overrides: str, gpus: int = 1) -> Estimate:
    return estimate(load_run(RUN_FILE, overrides), gpus, A100)


def test_graphs_cost_the_host_less_and_the_gpu_a_few_copies() -> None:
    eager, graphed = (planned("parallel.micro_batch=1", *on) for on in ((), (GRAPHS,)))
    (before,), (after,) = eager.step.stages, graphed.step.stages
    assert before.launch_bound and not after.launch_bound
    assert after.whole.host < 0.4 * before.whole.host and graphed.step.seconds < 0.7 * eager.step.seconds
    assert 0 < after.whole.device - before.whole.device < 0.02 * before.whole.device
    assert "layers as CUDA graphs" in report(graphed) and as_data(graphed)["cuda_graphs"] is True


def test_large_micro_batches_are_not_launch_bound() -> None:
    """As small_1gpu.yaml has them: graphs only add copies and memory."""
    eager, graphed = planned(), planned(GRAPHS)
    assert eager.step.seconds < graphed.step.seconds < 1.01 * eager.step.seconds


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "zb_v"])
def test_graphs_keep_their_memory(schedule: str) -> None:
    """Each micro-batch in flight has slots of its own, which share nothing with what follows."""
    pipeline = (
        *("parallel.pp=2", f"parallel.schedule={schedule}", "parallel.micro_batch=1"),
        f"parallel.virtual_stages={1 + (schedule == 'zb_v')}",
    )
    eager, graphed = (planned(*pipeline, *on, gpus=2) for on in ((), (GRAPHS,)))
    for before, after in zip(eager.memory, graphed.memory, strict=True):
        assert before.activations < after.activations and before.working < after.working
        assert (before.weights, before.gradients, before.optimizer) == (after.weights, after.gradients, after.optimizer)


def test_more_recompute_fits_the_slots_into_a_budget() -> None:
    budget = "parallel.recompute={budget: 2 GiB}"
    for found in (planned(budget), planned(budget, GRAPHS)):
        assert max(rank.activations for rank in found.memory) <= 2 * 2**30
    assert planned(budget, GRAPHS).step.job.stages != planned(budget).step.job.stages


@pytest.mark.slow
def test_the_search_takes_graphs_where_they_pay() -> None:
    """256 rows on one GPU fill it. On 256 GPUs each has one row, and the host could not keep up."""
    run = load_run(RUN_FILE, [])
    assert not any(found.run.parallel.cuda_graphs for found in search(run, 1, A100).best)
    best, *_ = search(run, 256, A100, top=1).best
    assert best.run.parallel.cuda_graphs
    without = replace(best.run, parallel=replace(best.run.parallel, cuda_graphs=False))
    assert best.step.seconds < estimate(without, 256, A100).step.seconds
