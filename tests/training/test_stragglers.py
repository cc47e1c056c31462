"""Outlier detection on synthetic times: slow ranks and links are reported, and no others."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from llama_ds.parallel.step_times import (
    BETWEEN,
    COLLECTIVES,
    COMPUTE,
    DATA,
    EARLIER,
    LATER,
    OPTIMIZER,
    PARTS,
)
from llama_ds.parallel.trace import Trace
from llama_ds.training.outliers import FEW, SHARE, SHARE_OF_FEW, Outliers, find
from llama_ds.training.stragglers import MAX_CONSOLE_LINES, lines, record

STEP = 500.0  # milliseconds
Layout = tuple[int, int, int]


def times(layout: Layout, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """Return times of healthy ranks, (P, D, T, K); `noise` is relative to the step."""
    random = np.random.default_rng(seed)
    made = np.zeros((*layout, len(PARTS)))
    made[..., COMPUTE] = 300 + 20 * np.arange(layout[0])[:, None, None]  # differs between stages
    made[-1, ..., COMPUTE] += 80  # the head
    made[..., DATA], made[..., OPTIMIZER], made[..., BETWEEN] = 0.1, 10, 1
    own = random.normal(0, noise * STEP, (*layout, 3)).clip(-50, None)
    made[..., [COMPUTE, OPTIMIZER, BETWEEN]] += own
    return made


def judge(made: np.ndarray, usual: np.ndarray | None = None) -> Outliers:
    """Find the outliers after filling up all steps to the slowest one with waits in collectives."""
    median = made if usual is None else usual

    def filled(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        step = values.sum(-1) - values[..., BETWEEN]
        values[..., COLLECTIVES] += max(STEP, step.max()) - step
        return values.reshape(-1, len(PARTS))

    return find(filled(made), filled(median), made.shape[:3], one_way=True)


def named(found: Outliers) -> list[tuple[tuple[int, ...], int]]:
    return [(slow.ranks, slow.part) for slow in found.slow]


def hosts_of(ranks: int, each: int = 8) -> list[str]:
    return [f"node{rank // each:03d}" for rank in range(ranks)]


@pytest.mark.parametrize("part", [DATA, COMPUTE, OPTIMIZER, BETWEEN])
@pytest.mark.parametrize("layout", [(1, 64, 1), (4, 16, 1), (2, 2, 1), (1, 3, 1)])
def test_one_slow_rank_is_named_with_the_part(layout: Layout, part: int) -> None:
    made = times(layout, noise=0.004)
    made[-1, 1, 0, part] += 0.3 * STEP
    found = judge(made)
    rank = (layout[0] - 1) * layout[1] + 1
    assert named(found) == [((rank,), part)] and found.slow[0].stage == layout[0] - 1
    (line,) = lines(found, hosts_of(np.prod(layout)))
    assert line.startswith(f"SLOW: rank {rank} on node{rank // 8:03d}: ")


def test_a_slow_host_is_named_as_one_and_in_numbers() -> None:
    made = times((4, 256, 1))  # 1024 ranks
    flat = made.reshape(-1, len(PARTS))
    flat[128:136, COMPUTE] += 57
    flat[135, COMPUTE] += 5  # the report shows the numbers of the slowest rank
    (line,) = lines(judge(made), hosts_of(1024))
    assert line == (
        "SLOW HOST: node016 (ranks 128-135): compute 362 ms a step, the median of its stage is 300 ms: "
        "62 ms (12% of the step) for which all ranks wait"
    )


def test_most_of_a_host_is_the_host_and_few_of_it_are_ranks() -> None:
    flat = times((1, 64, 1)).reshape(-1, len(PARTS))
    flat[[8, 9, 11, 12, 13], COMPUTE] += 100
    flat[[40, 42], COMPUTE] += 80
    first, second = lines(judge(flat.reshape(1, 64, 1, -1)), hosts_of(64))
    assert first.startswith("SLOW HOST: node001 (ranks 8-9, 11-13): ")
    assert second.startswith("SLOW: ranks 40, 42 on node005: ")


def test_a_run_on_one_host_names_ranks() -> None:
    made = times((2, 2, 1))
    made[:, 1, 0, COMPUTE] += 150
    assert [line.split(":")[1] for line in lines(judge(made), ["node000"] * 4)] == [" ranks 1, 3 on node000"]


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 2, 1), (2, 3, 1), (4, 4, 2), (4, 8, 1), (1, 64, 1), (16, 16, 8)])
@pytest.mark.parametrize("noise", [0.002, 0.02])
def test_nobody_is_accused_of_noise(layout: Layout, noise: float) -> None:
    """Mean and median of a rank get independent noise."""
    for seed in range(40):
        found = judge(times(layout, noise, seed), times(layout, noise, seed + 1000))
        assert found.slow == [] and found.links == []


def test_wide_noise_of_many_ranks_accuses_nobody() -> None:
    """With a standard deviation of 5 percent, the slowest of 64 ranks is about 12 percent above the median."""
    for seed in range(100):
        assert judge(times((1, 64, 1), 0.05, seed)).slow == []


def test_a_stage_with_more_work_is_not_slow() -> None:
    made = times((8, 16, 1), noise=0.004)
    made[-1, ..., COMPUTE] += 200
    made[0, ..., DATA] += 100
    assert named(judge(made)) == []


def test_a_single_rank_of_a_stage_is_not_judged() -> None:
    made = times((4, 1, 1))
    made[2, ..., COMPUTE] += 300
    assert judge(made).slow == []


@pytest.mark.parametrize("few", [2, 3, FEW - 1])
def test_few_ranks_are_judged_by_a_larger_share_and_not_by_one_hiccup(few: int) -> None:
    for more, slow in ((0.9 * SHARE_OF_FEW, []), (1.1 * SHARE_OF_FEW, [((0,), COMPUTE)])):
        made = times((1, few, 1))
        made[0, 0, 0, COMPUTE] += more * STEP
        assert named(judge(made)) == slow
        assert named(judge(made, usual=times((1, few, 1)))) == []


def test_many_ranks_are_judged_by_the_share_and_stalls_are_called_so() -> None:
    for more, slow in ((0.9 * SHARE, []), (1.1 * SHARE, [((5,), COMPUTE)])):
        made = times((1, 16, 1))
        made[0, 5, 0, COMPUTE] += more * STEP
        assert named(judge(made)) == slow
    (line,) = lines(judge(made, usual=times((1, 16, 1))), hosts_of(16))
    assert line.endswith("for which all ranks wait, only in a few of the steps")


def test_a_save_between_two_steps_accuses_nobody() -> None:
    made = times((1, 16, 1))
    made[0, 0, 0, BETWEEN] += 1000  # raises only the mean, like a single save on the first rank
    assert judge(made, usual=times((1, 16, 1))).slow == []


def test_half_of_a_stage_may_be_slow() -> None:
    made = times((1, 16, 1), noise=0.004)
    made[0, 8:, 0, COMPUTE] += 150
    (line,) = lines(judge(made), hosts_of(16))
    assert line.startswith("SLOW HOST: node001 (ranks 8-15): ")


def test_tensor_parallel_ranks_are_named_as_one() -> None:
    """All eight take as long as the slowest one; ranks 32 to 39 are data-parallel rank 1 of stage 1."""
    made = times((2, 3, 8), noise=0.004)
    made[1, 1, :, COMPUTE] += 150
    found = judge(made)
    assert named(found) == [(tuple(range(32, 40)), COMPUTE)]
    (line,) = lines(found, hosts_of(48))
    assert line.startswith("SLOW HOST: node004 (ranks 32-39): compute ")


def test_one_that_waits_for_data_does_not_make_its_tensor_parallel_ranks_slow() -> None:
    made = times((1, 4, 8))
    made[0, 2, 3, DATA] += 150
    made[0, 2, [0, 1, 2, 4, 5, 6, 7], COMPUTE] += 150  # the others wait for rank 19 in the first all-reduce
    assert named(judge(made)) == [((19,), DATA)]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_slow_link_is_named_by_its_ends(after: int) -> None:
    made = times((4, 3, 1), noise=0.002)
    made[: after + 1, 2, 0, LATER] += 0.3 * STEP
    made[after + 1 :, 2, 0, EARLIER] += 0.3 * STEP
    found = judge(made)
    (link,) = found.links
    assert found.slow == [] and link.ranks.ravel().tolist() == [2, 5, 8, 11] and link.after == after
    (line,) = lines(found, [f"node{rank}" for rank in range(12)])
    ends = 2 + 3 * after, 5 + 3 * after
    assert line.startswith(f"SLOW LINK: between rank {ends[0]} on node{ends[0]} and rank {ends[1]} on node{ends[1]}: ")


def test_waits_for_a_slow_rank_are_no_slow_link() -> None:
    made = times((4, 3, 1), noise=0.002)
    made[1, 2, 0, COMPUTE] += 0.3 * STEP
    made[0, 2, 0, LATER] += 0.3 * STEP
    made[2:, 2, 0, EARLIER] += 0.3 * STEP
    found = judge(made)
    assert named(found) == [((5,), COMPUTE)] and found.links == []


def test_the_file_holds_slow_ranks_and_medians_only() -> None:
    made = times((16, 16, 8), noise=0.004)
    made[3, 7, :, COMPUTE] += 100
    found = judge(made)
    mean = made.reshape(-1, len(PARTS))
    written = json.loads(json.dumps(record(200, 100, found, mean, hosts_of(2048))))
    assert written["step"] == 200 and written["steps"] == 100 and len(written["stages"]) == 16
    (slow,) = written["slow"]
    assert slow["ranks"] == list(range(440, 448)) and slow["host"] == "node055" and slow["part"] == "compute"
    assert slow["steady"] and slow["ms"] - slow["median_ms"] == pytest.approx(100, abs=10)
    assert len(json.dumps(written)) < 5000


def test_the_console_is_told_of_the_worst_only() -> None:
    flat = times((1, 256, 1)).reshape(-1, len(PARTS))
    for i in range(20):
        flat[8 * i, COMPUTE] += 100 + i
    report = lines(judge(flat.reshape(1, 256, 1, -1)), hosts_of(256))
    assert len(report) == MAX_CONSOLE_LINES + 1 and report[0].startswith("SLOW: rank 152 on node019")
    assert report[-1] == "SLOW: 12 more, see stragglers.jsonl"


def steps_of(trace: Trace, spans: Sequence[Sequence[tuple[str, float]]]) -> np.ndarray:
    """Take steps with spans of the given names and seconds; return their times."""
    for step in spans:
        trace.times.begin()
        for what, seconds in step:
            begin = trace.mark()
            time.sleep(seconds)
            trace.add(what, begin)
        trace.times.end()
    return trace.times.take()


def test_steps_are_split_into_their_parts() -> None:
    """A sleep takes at minimum its nominal time."""
    trace = Trace(torch.device("cpu"))
    waits = [("wait data", 0.01), ("wait grad", 0.02), ("send grad", 0.01), ("wait norm", 0.01), ("optimizer", 0.02)]
    found = steps_of(trace, [waits] * 4)
    assert found.shape == (3, len(PARTS)), "the first step is left out"
    minimum = np.zeros(len(PARTS))
    minimum[[DATA, LATER, EARLIER, COLLECTIVES, OPTIMIZER]] = 1e4, 2e4, 1e4, 1e4, 2e4
    assert (found >= minimum).all()
    assert len(trace.times.take()) == 0


def test_what_is_recorded_or_outside_steps_is_not_counted() -> None:
    trace = Trace(torch.device("cpu"))
    steps_of(trace, [[], []])
    begin = trace.mark()  # outside a step, as in an evaluation
    trace.add("wait data", begin)
    assert begin is None
    trace.start()
    trace.times.pause()
    begin = trace.mark()
    trace.add("wait data", begin)
    trace.recording = False
    assert len(steps_of(trace, [[]])) == 0, "the step after a recorded one is left out"
    assert len(steps_of(trace, [[]])) == 1


@pytest.mark.gpu
def test_steps_on_cuda_are_read_later() -> None:
    """The device spins during waits and compute; a wait hidden by compute does not count."""
    trace = Trace(torch.device("cuda"))
    for _ in range(4):
        trace.times.begin()
        torch.cuda._sleep(20_000_000)
        begin = trace.mark()
        trace.add("wait data", begin)
        begin = trace.mark()
        torch.cuda._sleep(10_000_000)
        trace.add("wait grad", begin)
        trace.times.end()
    torch.cuda.synchronize()
    found = trace.times.take()
    assert found.shape == (3, len(PARTS))
    assert (found[:, COMPUTE] > found[:, LATER]).all() and (found[:, LATER] > found[:, DATA]).all()
