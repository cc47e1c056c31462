"""What the planner counts for Megatron-DeepSpeed and its pipeline in bf16, against what DeepSpeed's engine does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from published import HEADER, MACHINES

from llama_ds.perf.plan.communication import RankGroup, all_reduce
from llama_ds.perf.plan.program import LLAMA, MEGATRON_BF16
from llama_ds.perf.plan.program_options import (
    with_bf16_optimizer,
    with_host_mask,
    with_megatron_deepspeed,
    with_zeroed_gradients,
)
from llama_ds.perf.plan.rows import Row, read_rows
from llama_ds.perf.plan.step import stage_times, step_time
from tests import warm

ROW = "x,Somebody 2026,LLaMA,4096,32,32,32,11008,32000,4096,A100-80GB,8,1,2,4,1,0,none,1,1,256,iteration_s,10.0,"
NOTES = (
    *("RMS kernel, Megatron-DeepSpeed", "; BF16_Optimizer", "; gradients zeroed before each backward"),
    *("; causal mask built by the host", "; CUDA_LAUNCH_BLOCKING=1"),
)


@pytest.fixture(scope="module")
def moved() -> tuple[dict[str, float], dict[str, float]]:
    """Return the bytes moved for a weight in a micro-batch and at a step's end, by operation."""
    done = warm.run("-m", "tests.perf.bf16_optimizer_worker", ranks=1)
    assert done.returncode == 0, done.stderr[-2000:]
    backward, end = json.loads(done.stdout.splitlines()[-1])
    return backward, end


def rows_of(tmp_path: Path, notes: list[str]) -> list[Row]:
    (tmp_path / "mine.csv").write_text("\n".join([HEADER, *(f'{ROW}"{note}"' for note in notes)]) + "\n")
    return read_rows(tmp_path / "mine.csv")


def test_a_gradient_moves_as_many_bytes_as_deepspeed_moves(moved: tuple[dict[str, float], dict[str, float]]) -> None:
    """A micro-batch: zeroed, added to by autograd, cast and added in fp32. This version of DeepSpeed zeroes."""
    backward, _ = moved
    assert backward == {"_foreach_zero_": 2, "add_": 6 + 12, "_to_copy": 6}
    program = with_bf16_optimizer(LLAMA)
    assert with_zeroed_gradients(program).accumulation == sum(backward.values())
    assert program.accumulation == MEGATRON_BF16.accumulation == sum(backward.values()) - 2 - 6


def test_the_end_of_a_step_passes_over_all_gradients(moved: tuple[dict[str, float], dict[str, float]]) -> None:
    """Alone, a rank divides no sum. By ZeRO-1, unlike without, it zeroes twice; its share's cast is the optimizer's."""
    _, end = moved
    passes = {"_to_copy": 6, "copy_": 6 + 8 + 6, "linalg_vector_norm": 4, "mul_": 8, "zero_": 2 * 4}
    assert {name: end[name] for name in passes} == passes
    divided, zeroed_again, share = 4, 4, 6
    assert with_bf16_optimizer(LLAMA).end_passes == MEGATRON_BF16.end_passes
    assert MEGATRON_BF16.end_passes == sum(passes.values()) + divided - zeroed_again - share


def test_what_a_note_states_of_megatron_deepspeed_costs_time(tmp_path: Path) -> None:
    notes = ["".join(NOTES[: n + 1]) for n in range(len(NOTES))]
    found = rows_of(tmp_path, notes)
    programs = [row.job.program for row in found if row.job]
    assert programs[1].accumulation == programs[2].accumulation - 8
    assert programs[-1] == with_host_mask(programs[2])
    times = [step_time(MACHINES["a100-80gb"], row.job).seconds for row in found if row.job]
    assert times == sorted(times)
    assert times[-1] > times[0] * 1.1


def test_the_host_builds_a_mask_at_both_ends_of_a_pipeline(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, [NOTES[0]])
    gpu = MACHINES["a100-80gb"]
    assert row.job
    job = replace(row.job, axes=replace(row.job.axes, pp=4, dp=2), stages=((("none", 8),),) * 4)
    masked = replace(job, program=with_host_mask(job.program))
    more = [
        b.forward.device - a.forward.device for a, b in zip(*(stage_times(gpu, j) for j in (job, masked)), strict=True)
    ]
    wanted = 8.6e-5 * 4096**2 * gpu.calibration.launch_us * 1e-6
    assert more == pytest.approx([wanted, 0, 0, wanted])


def test_a_host_that_waits_for_every_kernel_adds_its_time(tmp_path: Path) -> None:
    """BigScience says so of its runs on 40 nodes and more; a note without that says it of any number of GPUs."""
    notes = [
        NOTES[0],
        f"{NOTES[0]}; CUDA_LAUNCH_BLOCKING=1",
        f"{NOTES[0]}; CUDA_LAUNCH_BLOCKING=1 likely for >=320 GPUs",
    ]
    assert [row.job.launch_blocking for row in rows_of(tmp_path, notes) if row.job] == [False, True, False]
    program = with_megatron_deepspeed(LLAMA)
    assert program.host_launches == (79 - LLAMA.kernels_forward, 60 - LLAMA.kernels_backward)


def test_one_ring_may_reach_less_than_a_nodes_links(tmp_path: Path) -> None:
    slow, fast = rows_of(tmp_path, [f"{NOTES[0]}; 400 Gbps; rings of 5.07 GB/s", f"{NOTES[0]}; 400 Gbps"])
    assert slow.links == (None, 50.0, 5.07)
    whole, split = RankGroup(32), RankGroup(4, 8)
    times = [all_reduce(MACHINES["a100-80gb"].with_links(*row.links), whole, 1e9) for row in (slow, fast)]
    assert times[0] == pytest.approx(2 * 31 / 32 / 5.07, rel=0.01)
    assert times[1] < times[0] / 5
    times = [all_reduce(MACHINES["a100-80gb"].with_links(*row.links), split, 1e9) for row in (slow, fast)]
    assert times[0] == times[1], "an eighth of the node's links is slower still"
