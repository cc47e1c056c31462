"""Schedules of any size pass verification, and their bubbles are those stated in the papers."""

from __future__ import annotations

import random
from collections import Counter
from itertools import groupby, pairwise, takewhile

import pytest
from deepspeed.runtime.pipe import schedule as deepspeed_schedule
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ds.schedules import forward_only
from llama_ds.schedules.communication import message_of
from llama_ds.schedules.instructions import COMPUTES, POSTS, SENDS, Instruction, Op, Placement
from llama_ds.schedules.joint_weights import ending_by_chunk, joint_share, shares_of, weight_groups
from llama_ds.schedules.leading import leading_forwards, time_between_steps
from llama_ds.schedules.schedule import IN_A_V, NAMES, Schedule, obstacle, split_share
from llama_ds.schedules.simulate import StageCost, simulate
from llama_ds.schedules.verify import (
    ScheduleError,
    check_computations,
    check_memory,
    check_messages,
    check_progress,
    verify,
)
from llama_ds.schedules.zero_bubble_v import V_SCHEDULES

EQUAL = StageCost(1.0, 1.0, 1.0)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Draw a schedule of any shape, up to half of the largest pipeline and a quarter of its micro-batches."""
    name = draw(st.sampled_from(NAMES))
    ranks = draw(st.integers(2, 8 if name in V_SCHEDULES else 32))
    chunks = draw(st.integers(2, 4)) if name == "interleaved" else 2 if name in IN_A_V else 1
    micro_batches = draw(st.integers(1, 128 // chunks))
    if name == "interleaved":
        micro_batches = -(-micro_batches // ranks) * ranks
    if name == "dualpipe_v":
        micro_batches = max(micro_batches, 2 * ranks)
    extra = draw(st.integers(0, 2)) if chunks == 1 or name in V_SCHEDULES else 0
    times = None
    if name in V_SCHEDULES and draw(st.booleans()):
        passes = draw(st.sampled_from([3, 6 * ranks]))
        times = (*draw(st.tuples(*[st.integers(1, 100)] * passes)), draw(st.integers(0, 50)))
        micro_batches = min(micro_batches, 3 * ranks)
    return Schedule(name, ranks, micro_batches, chunks, extra, times, draw(st.sampled_from([1, 1, 2, 3])))


@settings(max_examples=40, deadline=None)
@given(schedules())
def test_any_size_is_right(schedule: Schedule) -> None:
    verify(schedule)
    for rank in range(schedule.ranks):
        groups = weight_groups(schedule.computations(rank), schedule.joint)
        counts = [n for found in groups.values() for n in found]
        assert max(counts, default=0) <= schedule.joint
        assert sum(counts) == len(groups), "every weight gradient is computed once"


@pytest.mark.parametrize("name, chunks", [("1f1b", 1), ("zb_h1", 1), ("interleaved", 2), ("dualpipe_v", 2)])
def test_pairs_of_weight_gradients_cost_a_micro_batch_of_a_chunk(name: str, chunks: int) -> None:
    """All weight gradients are computed in pairs, for which a rank holds one micro-batch more of each chunk."""
    single, pairs = Schedule(name, 4, 8, chunks), Schedule(name, 4, 8, chunks, joint=2)
    for rank in range(4):
        groups = weight_groups(pairs.computations(rank), 2)
        assert [n for found in groups.values() for n in found] == [2] * 4 * chunks
        assert pairs.in_flight(rank) <= single.in_flight(rank) + chunks


def test_a_zero_bubble_v_pairs_weight_gradients_without_a_longer_bubble() -> None:
    """Passes of 10, 12 and 8, messages of 1, with the memory of a further micro-batch of each chunk."""
    cost, times = StageCost(10, 12, 8), (10, 12, 8, 1)
    single, pairs = (Schedule("zb_v", 8, 32, 2, 2, times, joint) for joint in (1, 2))
    shares = [joint_share(pairs.computations(rank), chunk, 2) for rank in range(8) for chunk in (0, 1)]
    assert min(shares) > 0.6
    assert max(map(pairs.in_flight, range(8))) <= max(map(single.in_flight, range(8))) + 2
    assert simulate(pairs, cost, latency=1).length <= 1.01 * simulate(single, cost, latency=1).length


def test_the_first_micro_batch_can_stand_apart() -> None:
    """A layer's work on it is recorded and repeated; later ones still form pairs."""
    steps = Schedule("1f1b", 2, 4, joint=2).computations(1)
    assert list(weight_groups(steps, 2, first_apart=True).values()) == [(1,), (1,), (), (2,)]


@settings(max_examples=40, deadline=None)
@given(schedules())
def test_a_step_ends_chunk_by_chunk(schedule: Schedule) -> None:
    """The last weight gradients of each chunk are computed at once, behind all other computations."""
    for rank in range(schedule.ranks):
        steps = schedule.computations(rank)
        tail = list(takewhile(lambda step: step.op is Op.WEIGHT_BACKWARD, steps[::-1]))[::-1]
        runs = [list(run) for _, run in groupby(tail, lambda step: step.chunk)]
        assert len(runs) == len({step.chunk for step in tail})
        groups = weight_groups(steps, schedule.joint)
        assert all(sum(groups[run[-1]]) >= len(run) for run in runs)  # more where a chunk has the whole end


def test_the_end_of_a_step_is_ordered_so_that_no_layer_is_later() -> None:
    """The chunk whose last weight gradient comes first goes first; computations before the end stay."""
    w = [Instruction(Op.WEIGHT_BACKWARD, *key) for key in ((0, 0), (1, 0), (0, 1), (1, 1), (1, 2), (0, 2), (0, 3))]
    other = Instruction(Op.INPUT_BACKWARD, 0, 3)
    assert ending_by_chunk([*w[:1], other, *w[1:]]) == [w[0], other, w[1], w[3], w[4], w[2], w[5], w[6]]
    assert ending_by_chunk([*w, other]) == [*w, other]
    groups = weight_groups([w[0], other, w[1], w[3], w[4], w[2], w[5], w[6]], 2)
    assert groups == {w[0]: (1,), w[1]: (), w[3]: (), w[4]: (2, 1), w[2]: (), w[5]: (), w[6]: (2, 1)}


def test_work_is_shared_layer_by_layer() -> None:
    """Two layers, three micro-batches of which two are one product: all of a layer before the next one."""
    assert shares_of(2, (2, 1)) == [[(0, 2, False)], [(0, 1, True)], [(1, 2, False), (1, 1, True)]]
    assert shares_of(2, (1,)) == [[(0, 1, True), (1, 1, True)]]
    assert shares_of(2, ()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name, chunks", [("1f1b", 1), ("zb_h1", 1), ("interleaved", 2), ("dualpipe_v", 2)])
def test_a_large_size_is_right(name: str, chunks: int) -> None:
    verify(Schedule(name, 32, 256, chunks))


@pytest.mark.parametrize(
    "name, chunks", [("1f1b", 1), ("zb_h1", 1), ("interleaved", 3), *((name, 2) for name in IN_A_V)]
)
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_every_small_size_is_right(name: str, chunks: int, ranks: int) -> None:
    proven = 0
    for micro_batches in range(1, (2 if name in V_SCHEDULES else 4) * ranks + 1):
        if obstacle(name, ranks, micro_batches, chunks) is None:
            verify(Schedule(name, ranks, micro_batches, chunks))
            proven += 1
    assert proven >= 2


@pytest.mark.parametrize("ranks, micro_batches", [(2, 4), (3, 7), (4, 8), (4, 13), (8, 24)])
def test_dualpipe_v_is_deepspeeds_order(ranks: int, micro_batches: int) -> None:
    """DeepSpeed's own schedule is the judge of which forwards and backwards run in which order."""
    ours = Schedule("dualpipe_v", ranks, micro_batches, 2)
    for rank in range(ranks):
        theirs = [
            (type(step).__name__, step.phase, step.buffer_id - step.phase * micro_batches)
            for steps in deepspeed_schedule.DualPipeVSchedule(micro_batches, ranks, rank).steps()
            for step in steps
            if type(step).__name__ in ("ForwardPass", "BackwardPass")
        ]
        mine = [
            ("ForwardPass" if step.op is Op.FORWARD else "BackwardPass", step.chunk, step.micro_batch)
            for step in ours.computations(rank)
            if step.op is not Op.WEIGHT_BACKWARD
        ]
        assert mine == theirs


@pytest.mark.parametrize("ranks, micro_batches", [(2, 3), (4, 8), (5, 4)])
def test_1f1b_is_deepspeeds_order(ranks: int, micro_batches: int) -> None:
    for rank in range(ranks):
        theirs = [
            type(step).__name__
            for steps in deepspeed_schedule.TrainSchedule(micro_batches, ranks, rank).steps()
            for step in steps
            if type(step).__name__ in ("ForwardPass", "BackwardPass")
        ]
        mine = [step.op for step in Schedule("1f1b", ranks, micro_batches).computations(rank)]
        assert [("BackwardPass", "ForwardPass")[op is Op.FORWARD] for op in mine] == theirs


@pytest.mark.parametrize("ranks, micro_batches", [(2, 2), (4, 8), (8, 64)])
@pytest.mark.parametrize("cost", [EQUAL, StageCost(1.0, 1.3, 0.8)])
def test_waiting_time_is_the_papers(ranks: int, micro_batches: int, cost: StageCost) -> None:
    """Narayanan et al. 2104.04473, section 2.2, for 1F1B and interleaved; Qi et al. 2401.10241, table 1, for H1."""
    f, b, w = cost.forward, cost.input_backward, cost.weight_backward
    work = micro_batches * (f + b + w)
    assert simulate(Schedule("1f1b", ranks, micro_batches), cost).length == pytest.approx(
        work + (ranks - 1) * (f + b + w)
    )
    assert simulate(Schedule("zb_h1", ranks, micro_batches), cost).length == pytest.approx(
        work + (ranks - 1) * (f + b - w)
    )
    half = StageCost(f / 2, b / 2, w / 2)
    assert simulate(Schedule("interleaved", ranks, micro_batches, 2), half).length == pytest.approx(
        work + (ranks - 1) * (f + b + w) / 2
    )


def test_bubbles_of_four_stages() -> None:
    """Four equal stages, eight micro-batches: the bubble of 27 percent with 1F1B drops to 12 or less."""
    assert simulate(Schedule("1f1b", 4, 8), EQUAL).bubble == pytest.approx(3 / 11)
    assert simulate(Schedule("zb_h1", 4, 8), EQUAL).bubble == pytest.approx(1 / 9)
    half = StageCost(0.5, 0.5, 0.5)
    assert simulate(Schedule("dualpipe_v", 4, 8, 2), half).bubble < 0.06


@pytest.mark.parametrize("ranks, micro_batches", [(2, 2), (2, 9), (4, 4), (4, 8), (4, 17), (8, 8), (8, 33)])
def test_ranks_of_a_v_wait_only_for_their_first_micro_batch(ranks: int, micro_batches: int) -> None:
    """Equal passes: zb_v takes the least time that any order can, with no more activations than 1F1B's first rank.

    The last rank starts after p - 1 forwards; the order for 8 ranks and 33 micro-batches is one pass longer.
    """
    schedule = Schedule("zb_v", ranks, micro_batches, 2)
    assert simulate(schedule, EQUAL).length - (6 * micro_batches + ranks - 1) in (0, 1 if micro_batches == 33 else 0)
    assert max(map(schedule.in_flight, range(ranks))) <= 2 * Schedule("1f1b", ranks, micro_batches).in_flight(0)


def test_less_memory_is_a_longer_step() -> None:
    """Eight ranks, 32 micro-batches: forwards held by the fullest rank, and the bubble, of 1F1B and of three Vs.

    Qi et al. 2405.15362, table 1: half, and (p + 4) / 3 of p, of 1F1B's activations.
    """
    vs = [Schedule(name, 8, 32, 2) for name in ("zb_v", "v_half", "v_min")]
    held = [max(map(schedule.in_flight, range(8))) / 2 for schedule in vs]
    bubbles = [simulate(schedule, EQUAL).bubble for schedule in vs]
    assert held == [8, 5, 4]
    assert bubbles == sorted(bubbles)
    assert bubbles[-1] < simulate(Schedule("1f1b", 8, 32), EQUAL).bubble


@pytest.mark.parametrize("times", [(10, 12, 8, 2), (10, 15, 9, 1), (10, 10, 10, 3)])
def test_a_v_is_ordered_by_the_times_of_its_passes(times: tuple[int, int, int, int]) -> None:
    """Two more micro-batches in flight hide messages: at most a hundredth above the least time of any order.

    The order for equal passes, and DualPipeV's, take longer, because passes that last differently do not meet.
    """
    cost, message = StageCost(*times[:3]), times[3]
    ordered, equal = (Schedule("zb_v", 4, 8, 2, 2, pass_times) for pass_times in (times, None))
    least = 16 * sum(times[:3]) + 3 * (times[0] + message)
    length = simulate(ordered, cost, latency=message).length
    assert least <= length <= 1.01 * least
    others = [equal, Schedule("dualpipe_v", 4, 8, 2)]
    assert all(simulate(other, cost, latency=message).length > 1.04 * least for other in others)
    assert max(map(ordered.in_flight, range(4))) <= 2 * (4 + 2)


@pytest.mark.parametrize("name", IN_A_V)
def test_leading_forwards_need_nothing_else(name: str) -> None:
    """Ranks that run only these, and discard them, leave no message without a receive, and no receive without one."""
    for ranks, micro_batches in ((2, 4), (3, 7), (4, 8)):
        schedule = Schedule(name, ranks, micro_batches, 2)
        lists, placement = [schedule.instructions(rank) for rank in range(ranks)], schedule.placement
        leading = leading_forwards(lists, placement)
        run = [steps[: own.count] for steps, own in zip(lists, leading, strict=True)]
        assert all(step.op in (Op.FORWARD, *POSTS, Op.SEND_ACTIVATION) for steps in run for step in steps)
        assert all(any(step.op is Op.FORWARD for step in steps) for steps in run)
        loss = placement.home(placement.stages - 1)
        assert not any(step.op is Op.FORWARD and step.chunk == loss[1] for step in run[loss[0]])
        check_progress(run, placement, None)
        complete = [
            [step for step in [*steps, *own.unsent, *own.unposted] if step.op in (Op.POST_ACTIVATION, *SENDS)]
            for steps, own in zip(run, leading, strict=True)
        ]
        sent, posted = (
            Counter(
                message_of(step, rank, placement)
                for rank, steps in enumerate(complete)
                for step in steps
                if step.op is op
            )
            for op in (Op.SEND_ACTIVATION, Op.POST_ACTIVATION)
        )
        assert sent == posted and max(sent.values()) == 1


def test_ranks_of_a_v_hold_what_they_may() -> None:
    """The planner's search counts on seven tenths (`HELD`) of the limit or of all forwards, before any order exists."""
    rng = random.Random(11)
    for _ in range(30):
        ranks, name = rng.choice([2, 3, 4, 8]), rng.choice(V_SCHEDULES)
        times = [10, *(rng.randint(8, 20) for _ in range(2)), rng.randint(0, 2)]
        schedule = Schedule(name, ranks, rng.randint(ranks, 3 * ranks), 2, rng.choice([0, 2, 4]), tuple(times))
        limit = min(schedule._in_a_v.limit, 2 * schedule.micro_batches)
        for rank in range(ranks):
            held = sum(max(map(sum, moments)) for moments in schedule.held[rank])
            assert held >= 0.7 * limit, schedule


def test_long_steps_of_a_v_are_ordered_by_the_rule_of_a_shorter_one() -> None:
    """What is held, and the time of more micro-batches, are then those of the shorter step."""
    times = (50, 58, 44, 2)
    short, long = (Schedule("zb_v", 4, number, 2, 2, times) for number in (17, 61))
    assert short.held == long.held
    cost = StageCost(*times[:3])
    lengths = [simulate(schedule, cost, latency=2).length for schedule in (short, long)]
    assert lengths[1] - lengths[0] == pytest.approx(44 * 2 * sum(times[:3]), rel=0.03)


def test_no_bubble_remains_between_steps_that_begin_before_the_norm() -> None:
    """Equal passes, one more micro-batch in flight for each of the last ranks to begin: only work remains."""
    schedule = Schedule("zb_v", 4, 8, 2, 2)
    assert time_between_steps(schedule, EQUAL) == 6 * 8
    assert simulate(schedule, EQUAL).length == 6 * 8 + 3


def test_a_slow_stage_is_considered() -> None:
    """The head makes the last stage twice as long: an order by stages beats that by their means."""
    stages = [(10, 10, 10)] * 7 + [(20, 20, 20)]
    by_stage = (*(t for stage in stages for t in stage), 0)
    costs = [StageCost(*stage) for stage in stages]
    lengths = [simulate(Schedule("zb_v", 4, 8, 2, 0, times), costs).length for times in (by_stage, (11, 11, 11, 0))]
    assert lengths[0] < lengths[1]
    assert lengths[0] >= 8 * 90  # the work of the first rank


def test_messages_cost_time() -> None:
    """Two ranks, one micro-batch: there and back, each message its transfer and the latency."""
    timeline = simulate(Schedule("1f1b", 2, 1), EQUAL, transfer=2.0, latency=0.5)
    assert timeline.length == 1 + 2.5 + 3 + 2.5 + 2


def test_extra_warmup_hides_slow_links() -> None:
    """Messages as long as a computation: one more forward for each rank behind saves a sixth of the step and more."""
    times = [simulate(Schedule("zb_h1", 4, 16, 1, extra), EQUAL, transfer=1.0).length for extra in (0, 1)]
    assert times[1] < 5 / 6 * times[0]
    with pytest.raises(ValueError, match="extra_warmup = 1 is for schedule 1f1b, zb_h1, zb_v, v_half or v_min"):
        Schedule("interleaved", 4, 8, 2, 1)


@pytest.mark.parametrize("ranks, micro_batches", [(2, 4), (3, 8), (4, 8), (8, 16)])
@pytest.mark.parametrize("message", [0.0, 0.5, 1.0])
def test_h1_with_an_extra_forward_waits_for_one_way_only(ranks: int, micro_batches: int, message: float) -> None:
    """Messages delay the step's first or last computation of each rank, and weight gradients fill the other wait."""
    length = simulate(Schedule("zb_h1", ranks, micro_batches, 1, 1), EQUAL, message).length
    assert length == pytest.approx(3 * micro_batches + (ranks - 1) * (1 + message))


def test_one_link_carries_one_message_at_a_time() -> None:
    """The first rank sends two activations within one unit; the second arrives a transfer after the first."""
    timeline = simulate(Schedule("1f1b", 3, 2), EQUAL, transfer=5.0)
    starts = [start for step, start, _ in timeline.ranks[1] if step.op is Op.FORWARD]
    assert starts == [6.0, 11.0]


@pytest.mark.parametrize(
    ("name", "chunks", "extra"), [("zb_h1", 1, 0), ("zb_h1", 1, 2), ("dualpipe_v", 2, 0), ("interleaved", 2, 0)]
)
@pytest.mark.parametrize("micro_batches", [8, 28, 100])
def test_the_share_of_split_backwards_is_counted(name: str, chunks: int, extra: int, micro_batches: int) -> None:
    """Of long steps it is extrapolated, which is exact."""
    plan = Schedule(name, 4, micro_batches, chunks, extra)
    ops = [step.op for rank in range(4) for step in plan.computations(rank)]
    split, whole = ops.count(Op.WEIGHT_BACKWARD), ops.count(Op.BACKWARD)
    assert split_share(name, 4, micro_batches, chunks, extra) == pytest.approx(split / (split + whole), abs=1e-12)
    assert (split > 0) is (name != "interleaved")


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_h1_holds_no_more_than_1f1bs_first_rank(extra: int) -> None:
    for ranks, micro_batches in [(2, 8), (4, 8), (8, 3)]:
        stock = max(Schedule("1f1b", ranks, micro_batches, 1, extra).in_flight(r) for r in range(ranks))
        assert max(Schedule("zb_h1", ranks, micro_batches, 1, extra).in_flight(r) for r in range(ranks)) == stock


@pytest.mark.parametrize("shape", ["loop", "v"])
def test_placement_is_one_to_one_and_neighbours_touch(shape: str) -> None:
    placement = Placement(4, 2, shape)
    homes = [placement.home(stage) for stage in range(placement.stages)]
    assert [placement.stage(*home) for home in homes] == list(range(8))
    assert all((a - b) % 4 in ((0, 1, 3) if shape == "v" else (1, 3)) for (a, _), (b, _) in pairwise(homes))


@pytest.mark.parametrize("shape, chunks", [("loop", 1), ("loop", 3), ("v", 2)])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_evaluation_runs_any_number_of_micro_batches(shape: str, chunks: int, count: int) -> None:
    placement = Placement(3, chunks, shape)
    lists = [forward_only.instructions(rank, count, placement) for rank in range(3)]
    check_messages(lists, placement)
    check_progress(lists, placement, 0)
    for steps in lists:
        assert sum(step.op is Op.FORWARD for step in steps) == count * chunks


def broken(edit: str) -> tuple[list[list[Instruction]], Placement]:
    """Return a valid schedule's lists with one mistake."""
    schedule = Schedule("zb_h1", 3, 4)
    lists = [schedule.instructions(rank) for rank in range(3)]
    steps = lists[1]
    sends = [n for n, step in enumerate(steps) if step.op is Op.SEND_ACTIVATION]
    posts = [n for n, step in enumerate(steps) if step.op is Op.POST_GRAD]
    first, second = (posts if edit == "posts swapped" else sends)[:2]
    if edit == "twice":
        steps.append(steps[-1])
    elif edit == "missing":
        steps.pop()
    elif edit == "weights first":
        at = next(n for n, step in enumerate(steps) if step.op is Op.INPUT_BACKWARD)
        steps.insert(at, steps.pop(next(n for n, s in enumerate(steps) if s.op is Op.WEIGHT_BACKWARD)))
    elif edit == "send too early":
        steps.insert(0, steps.pop(first))
    elif edit == "send lost":
        steps.pop(first)
    elif edit == "post late":
        steps.append(steps.pop(posts[0]))
    else:
        steps[first], steps[second] = steps[second], steps[first]
    return lists, schedule.placement


@pytest.mark.parametrize("edit", ["twice", "missing", "weights first"])
def test_verifier_sees_wrong_computations(edit: str) -> None:
    lists, _ = broken(edit)
    with pytest.raises(ScheduleError, match="rank 1"):
        check_computations(1, lists[1], 4, 1)


@pytest.mark.parametrize("edit", ["send too early", "send lost", "post late", "posts swapped"])
def test_verifier_sees_wrong_messages(edit: str) -> None:
    lists, placement = broken(edit)
    with pytest.raises(ScheduleError):
        check_messages(lists, placement)


def test_verifier_sees_a_deadlock() -> None:
    """Two ranks that send to each other before they post what they receive stop where sends wait for receives."""
    placement = Placement(2, 1)
    first = [
        *(Instruction(op, 0, i) for i in (0, 1) for op in (Op.FORWARD, Op.SEND_ACTIVATION)),
        Instruction(Op.POST_GRAD, 0, 0),
        Instruction(Op.BACKWARD, 0, 0),
    ]
    second = [
        Instruction(Op.POST_ACTIVATION, 0, 0),
        Instruction(Op.FORWARD, 0, 0),
        Instruction(Op.BACKWARD, 0, 0),
        Instruction(Op.SEND_GRAD, 0, 0),
        Instruction(Op.POST_ACTIVATION, 0, 1),
        Instruction(Op.FORWARD, 0, 1),
    ]
    check_progress([first, second], placement, None)
    with pytest.raises(ScheduleError, match="no rank can proceed"):
        check_progress([first, second], placement, 0)


def test_verifier_sees_wrong_memory() -> None:
    steps = [step for step in Schedule("1f1b", 4, 8).instructions(0) if step.op in COMPUTES]
    check_memory(0, steps, 4)
    with pytest.raises(ScheduleError, match="holds 4"):
        check_memory(0, steps, 3)


@pytest.mark.parametrize(
    "name, ranks, micro_batches, chunks, reason",
    [
        ("interleaved", 4, 6, 2, "6 micro-batches are not a multiple of pp = 4; use 4 or 8"),
        ("interleaved", 4, 8, 1, "use 2 or more"),
        ("dualpipe_v", 4, 7, 2, "7 micro-batches are fewer than 2 \\* pp = 8; use 8 or more"),
        ("dualpipe_v", 4, 8, 3, "use 2"),
        ("zb_h1", 4, 8, 2, "use 1"),
        ("1f1b", 4, 8, 2, "use 1"),
        ("zb_v", 4, 8, 1, "virtual_stages = 1: a V has two stages on each rank; use 2"),
    ],
)
def test_impossible_numbers_are_refused(name: str, ranks: int, micro_batches: int, chunks: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Schedule(name, ranks, micro_batches, chunks)


@pytest.mark.parametrize(
    "name, times, reason",
    [
        ("dualpipe_v", (1, 1, 1, 0), "pass_times orders the passes of schedule zb_v, v_half or v_min; leave it out"),
        ("zb_v", (1, 1, 1), "3 entries; use 4, .* or 13, three for each of 4 stages and the message"),
        ("zb_v", (1, 0, 1, 0), "entry 1 is 0; the time of a pass is 1 or more"),
        ("v_min", (1, 1, 1, -2), "the message's time is -2; use 0 or more"),
    ],
)
def test_impossible_times_are_refused(name: str, times: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Schedule(name, 2, 4, 2, 0, times)


def test_an_instruction_reads_as_words() -> None:
    """Hang reports show it to people."""
    assert str(Instruction(Op.INPUT_BACKWARD, 1, 6)) == "input backward of micro-batch 6, chunk 1"
