"""What a rank says that has run out of memory, whose allocation failed, and what its supervisor makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llama_ds.config.recompute import GIB
from llama_ds.config.row_stages import stage_runs
from llama_ds.config.run_file import load_run
from llama_ds.errors import OutOfMemory, UserError
from llama_ds.launch.supervise.attempt import FAILURE, MISTAKE, Outcome, _reported_failure
from llama_ds.launch.supervise.repeats import RepeatedFailures
from llama_ds.layout.layout import resolve_layout
from llama_ds.perf.plan.relief import planned_memory, relief
from llama_ds.training.out_of_memory import MemoryExplainer

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.10 GiB is free."
    " Of the allocated memory 70.10 GiB is allocated by PyTorch, and {} is reserved by PyTorch but unallocated."
)
# Seven billion parameters on eight ranks as two stages.
OVERRIDES = ["parallel.pp=2", "parallel.tp=2", "parallel.sequence_parallel=true", "parallel.micro_batch=4"]

LEAST = ["parallel.recompute=full", "parallel.micro_batch=1"]  # activations


def explainer(*overrides: str, rank: int = 5) -> MemoryExplainer:
    run = load_run("7b", [*OVERRIDES, *overrides])
    return MemoryExplainer(run, resolve_layout(run, 8), "bf16", rank, torch.device("cpu"))


def error_of(failed: Any, step: int = 0, first: bool = True, *overrides: str) -> OutOfMemory:
    memory = explainer(*overrides)
    if step:
        memory.before_step(step, first)
    with pytest.raises(OutOfMemory) as caught, memory.explained():
        failed()
    return caught.value


def raising(text: str) -> Any:
    def fail() -> None:
        raise torch.OutOfMemoryError(text)

    return fail


def test_allocations_that_fail_are_recognised() -> None:
    """CUDA's allocator, and for real those of torch and of numpy on a CPU; other errors pass as they are."""
    assert "it could not allocate 2.00 GiB more after" in str(error_of(raising(CUDA.format("8.00 MiB"))))
    assert "it could not allocate 1048576.00 GiB more" in str(error_of(lambda: torch.empty(1 << 50, dtype=torch.uint8)))
    assert "it could not allocate 1048576.00 GiB more" in str(error_of(lambda: np.empty(1 << 50, np.uint8)))
    assert "it could not allocate more" in str(error_of(lambda: (_ for _ in ()).throw(MemoryError())))
    for other in (RuntimeError("sizes differ"), UserError("no data: out of memory is said elsewhere")):
        with pytest.raises(type(other)) as caught, explainer().explained():
            raise other
        assert caught.value is other


def test_the_line_names_rank_stage_moment_and_setting() -> None:
    text = str(error_of(raising(CUDA.format("8.00 MiB"))))
    assert "rank 5 (pp 1 dp 0 tp 1, stage 1) ran out of memory before the first step" in text
    assert "; use parallel.recompute=selective, planned to need " in text
    assert text.endswith(" less") and "\n" not in text
    assert "in step 7:" in str(error_of(raising(CUDA.format("8.00 MiB")), 7, False))


def test_pieces_that_are_too_small_want_another_allocator_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    failed = raising(CUDA.format("3.50 GiB"))
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True, because the allocator has 3.50 GiB" in str(error_of(failed))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert "use parallel.recompute=selective" in str(error_of(failed))


EARLY_V = ["parallel.schedule=zb_v", "parallel.virtual_stages=2"]


@pytest.mark.parametrize(
    ("overrides", "missing_gib", "setting"),
    [
        (["parallel.sequence_parallel=false"], 1, "parallel.sequence_parallel=true"),
        (["parallel.joint_weight_gradients=4"], 1, "parallel.joint_weight_gradients=1"),
        ([*EARLY_V, "parallel.post_validation=true"], 1, "parallel.post_validation=false"),
        ([], 1, "parallel.recompute=selective"),
        ([], 10, "parallel.recompute=full"),
        (["parallel.recompute=full"], 1, "parallel.micro_batch=2"),
        ([*LEAST, "parallel.pp=1"], 5, "deepspeed.zero_optimization.stage=2"),
        (LEAST, 4, "parallel.tp=4 parallel.sequence_parallel=true"),
    ],
)
def test_the_cheapest_setting_that_is_enough(overrides: list[str], missing_gib: int, setting: str) -> None:
    run = load_run("7b", [*OVERRIDES, *overrides])
    layout = resolve_layout(run, 8)
    found = relief(run, layout, 2, missing_gib * GIB)
    assert found is not None and found.setting == setting and found.saves >= missing_gib * GIB
    changed = load_run("7b", [*OVERRIDES, *overrides, *setting.split()])
    peak, after = (
        max(memory.total for memory in planned_memory(one, resolve_layout(one, 8), 2)) for one in (run, changed)
    )
    assert found.saves == peak - after  # as a user who follows the line gets it


def test_a_stage_that_states_the_setting_is_named() -> None:
    """`parallel.micro_batch` has no effect where a stage has its own."""
    stages = "data.stages=[{seq_len: 1024, until_step: 9}, {seq_len: 2048, micro_batch: 2}]"
    sources = "data.sources=[{name: a, path: 'shards_{seq_len}/a', weight: 1}]"
    overrides = [*OVERRIDES, "parallel.recompute=full", "data.seq_len=1024", sources, stages]
    run = load_run("7b", overrides)
    for number, stage in enumerate(stage_runs(run)):
        found = relief(stage, resolve_layout(stage, 8), 2, 1)
        assert found is not None and found.setting == f"data.stages.{number}.micro_batch={2 - number}"
        load_run("7b", [*overrides, found.setting])


def test_a_setting_that_is_not_enough_says_so() -> None:
    text = str(error_of(raising("CUDA out of memory. Tried to allocate 900.00 GiB.")))
    assert text.endswith(", which alone may not be enough")


def reported(error: OutOfMemory) -> Outcome:
    member: Any = SimpleNamespace(rank=5, host="a", beat=SimpleNamespace(step=0))
    return _reported_failure(member, {"kind": error.kind, "text": f"error: {error}", "ranks": []}, ["a"] * 8)


def test_the_supervisor_restarts_it_only_while_that_may_help() -> None:
    """The first step comes again at once, and so does a later one that failed twice."""
    failed = raising(CUDA.format("8.00 MiB"))
    assert reported(error_of(failed)).kind == reported(error_of(failed, 1)).kind == MISTAKE
    later, repeats = reported(error_of(failed, 9, False)), RepeatedFailures()
    assert later.kind == FAILURE
    assert [repeats.seen(later, other_hosts=False) for _ in range(2)] == [False, True]
