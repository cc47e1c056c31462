"""The planner's time and memory of weight gradients that are computed for several micro-batches at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ds.config.run_file import load_run
from llama_ds.layout.recompute import stage_policies
from llama_ds.perf.plan import hardware
from llama_ds.perf.plan.estimate import Estimate, estimate
from llama_ds.perf.plan.layer import layer_time
from llama_ds.perf.plan.step import stage_costs, stage_message
from llama_ds.schedules.simulate import simulate

REPO = Path(__file__).resolve().parents[2]
A100 = hardware.load("a100-80gb")


def planned(*overrides: str, size: str = "65b", gpus: int = 2048) -> Estimate:
    return estimate(load_run(str(REPO / f"ds_configs/llama_{size}.yaml"), overrides), gpus, A100)


def test_weight_gradients_in_pairs_are_counted() -> None:
    """65B at tp 2: a pair adds once to its buffers and copies factors. At tp 8 most copies would cost more."""
    v = ("parallel.schedule=zb_v", "parallel.virtual_stages=2", "parallel.pp=8", "parallel.tp=2")
    single, pairs = (planned(*v, f"parallel.joint_weight_gradients={joint}") for joint in (1, 2))
    alone, shared = (layer_time(A100, found.step.job, "none", 1.0).weight_backward for found in (single, pairs))
    assert 0.6 < shared.pointwise / alone.pointwise < 0.8
    assert shared.matrices <= alone.matrices
    narrow = planned("parallel.schedule=zb_v", "parallel.virtual_stages=2", "parallel.joint_weight_gradients=2")
    alone, shared = (layer_time(A100, narrow.step.job, "none", share).weight_backward for share in (0.0, 1.0))
    assert 0.8 < shared.pointwise / alone.pointwise < 1
    held = [sum(rank.activations for rank in found.memory) for found in (single, pairs)]
    assert held[1] > held[0]


def test_many_joint_weight_gradients_are_planned_as_in_a_whole_step() -> None:
    """The planner shortens a step of 96 micro-batches, of which 16 or 3 are computed together."""
    for joint, pp in ((16, 2), (3, 4)):
        layout = f"parallel={{pp: {pp}, micro_batch: 1, schedule: zb_h1, joint_weight_gradients: {joint}}}"
        found = planned(layout, "training.global_batch=192", size="7b", gpus=2 * pp)
        whole = stage_policies(found.run, found.layout, 2)
        assert [rank.activations for rank in found.memory] == [stage.saved_bytes for stage in whole]
        job = found.step.job
        assert {job.joint_share(stage) for stage in range(pp)} == {1.0}
        costs, message = tuple(stage_costs(A100, job)), stage_message(A100, job)
        assert found.step.pipeline == pytest.approx(simulate(job.plan(96), costs, *message).length)
