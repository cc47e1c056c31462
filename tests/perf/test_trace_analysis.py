"""Analysis of recorded steps, on steps small enough to check by hand."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from recorded_steps import later, rank, two_ranks, write

from llama_ds.errors import UserError
from llama_ds.perf.trace.account import account
from llama_ds.perf.trace.analyse import Analysis, analyse
from llama_ds.perf.trace.files import analyse_folder
from llama_ds.perf.trace.kinds import COMMUNICATION, METRICS
from llama_ds.perf.trace.picture import picture
from llama_ds.perf.trace.read import Event, RankClock, RankRecord, read, shown
from llama_ds.perf.trace.report import report, table

TOTAL = 2 * 700  # step time of both ranks of `two_ranks`, in microseconds


def analysis(ranks: Iterable[RankRecord]) -> Analysis:
    return analyse(account(ranks), {}, {})


def share(found: Analysis, name: str) -> float:
    """Return a metric in microseconds, summed over the two ranks."""
    value = found.metrics[name]
    assert value is not None
    return value / 100 * TOTAL


def test_shares_add_up() -> None:
    found = analysis(two_ranks())
    assert (found.ranks, found.steps, found.step_ms) == (2, 1, 0.7)
    assert share(found, "compute") == pytest.approx(600)
    assert share(found, "optimizer") == pytest.approx(16)
    assert share(found, "exposed_p2p") == pytest.approx(
        5 + 30 + 30
    )  # the blocking send, and each message from its send on
    assert share(found, "exposed_reduction") == pytest.approx(30 + 20)
    assert share(found, "exposed_agreement") == pytest.approx(2 + 2)  # both ranks wait from the last rank's arrival on
    # The bubble ends at the first send, at the gradient's send, and at the first stage's arrival at the norm.
    assert share(found, "bubble") == pytest.approx(100 + (430 - 105) + (690 - 450))
    assert share(found, "other") == pytest.approx(0)
    parts = ("compute", "recompute", "optimizer", "data", "bubble", "exposed", "other")
    assert sum(found.metrics[part] or 0.0 for part in parts) == pytest.approx(100)
    assert found.communication["p2p"]["under_way_ms"] == pytest.approx(0.03)  # one message per rank
    assert found.metrics["hidden_reduction"] == pytest.approx((1 - 50 / 90) * 100)
    assert found.metrics.keys() == METRICS.keys()


def test_a_message_that_arrives_during_computation_is_hidden() -> None:
    """The message is sent at 100; the receiver computes until 130 and then does not wait."""
    first, last = two_ranks()
    last.events[0] = Event("wait activation", 130, 130, 1, 0)
    found = analysis([first, last])
    assert share(found, "exposed_p2p") == pytest.approx(5 + 30)
    assert found.communication["p2p"]["under_way_ms"] == pytest.approx(
        0.03
    )  # estimated from the other message of its size


def test_waits_within_a_computation_are_not_computing() -> None:
    """Waits for tensor parallelism and for weights in flight nest in forwards and backwards."""
    first, last = two_ranks()
    first.events.extend([Event("tp", 10, 40), Event("wait tp", 20, 40), Event("wait weights", 50, 60)])
    first.events.extend([Event("recompute", 470, 500), Event("wait tp", 480, 485)])
    found = analysis([first, last])
    assert share(found, "compute") == pytest.approx(600 - 20 - 10 - 30)
    assert share(found, "exposed_tp") == pytest.approx(20 + 5)
    assert share(found, "exposed_weights") == pytest.approx(10)
    assert share(found, "recompute") == pytest.approx(30 - 5)
    assert found.metrics["hidden_tp"] == pytest.approx((1 - 25 / 30) * 100)
    assert found.metrics["hidden_weights"] is None  # their time in flight is unknown


def test_steps_are_averaged_without_the_profiled_ones() -> None:
    ranks = []
    for recorded in two_ranks():
        second, slowed = later(recorded, 1000), later(recorded, 2000)
        slowed.events.append(Event("F", 2110, 2120, 0, 0))
        about = {**recorded.about, "measured_steps": 2}
        ranks.append(replace(recorded, about=about, events=[*recorded.events, *second.events, *slowed.events]))
    found, single = analysis(ranks), analysis(two_ranks())
    assert (found.steps, found.step_ms) == (2, 0.7)
    assert found.metrics == pytest.approx(single.metrics, nan_ok=True)
    assert found.communication["reduction"] == pytest.approx(single.communication["reduction"])


def test_one_stage() -> None:
    """With pp = 1, DeepSpeed's collectives nest in forward, backward and step, and there is no pipeline wait."""
    events = [
        Event("step", 0, 1000),
        *(Event("wait data", 0, 20), Event("F", 20, 220, 0, 0), Event("gather", 30, 60), Event("wait weights", 40, 60)),
        *(Event("BW", 220, 620, 0, 0), Event("reduce", 500, 560), Event("wait reduction", 520, 560)),
        *(Event("optimizer", 620, 980, 0, 0), Event("agree", 630, 640), Event("wait agreement", 630, 640)),
    ]
    found = analysis([rank(0, *events, world=1, pp=1)])
    expected = {
        "data": 2, "compute": 54, "exposed_weights": 2, "exposed_reduction": 4, "exposed_agreement": 1,
        "optimizer": 35, "other": 2, "bubble": 0, "ideal_bubble": 0, "lost_schedule": 0,
    }  # fmt: skip
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected)
    assert found.metrics["hidden_weights"] == pytest.approx(100 / 3)


def test_lost_time_is_attributed_to_its_causes() -> None:
    """Two stages of 300 with one micro-batch have a bubble of half the time; messages of 30 add to it."""
    found = analysis(two_ranks())
    assert found.metrics["ideal_bubble"] == pytest.approx(50)
    assert found.metrics["lost_schedule"] == pytest.approx(300 / 700 * 100)
    assert found.metrics["lost_imbalance"] == pytest.approx(0)
    assert found.metrics["lost_messages"] == pytest.approx(60 / 700 * 100)
    bubble, exposed = found.metrics["bubble"], found.metrics["exposed_p2p"]
    assert bubble is not None and exposed is not None
    lost = [found.metrics[f"lost_{cause}"] or 0.0 for cause in ("schedule", "imbalance", "messages", "rest")]
    assert sum(lost) == pytest.approx(bubble + exposed)


def test_slow_stage_and_slow_rank_are_named() -> None:
    ranks = []
    for dp_rank in range(3):
        for recorded in two_ranks():
            number = recorded.coords.pp * 3 + dp_rank
            events = list(recorded.events)
            if number == 4:  # its forward begins 60 earlier than that of its stage
                events[:2] = [Event("wait activation", 0, 70, 1, 0), Event("F", 70, 230, 1, 0)]
            ranks.append(rank(number, *events, world=6, dp_rank=dp_rank, pp_rank=recorded.coords.pp))
    found = analysis(sorted(ranks, key=lambda r: r.rank))
    assert (found.slowest[0].rank, found.slowest[0].place) == (4, "pp 1 dp 1 tp 0, host4")
    assert found.metrics["slowest"] == pytest.approx(20)
    assert found.stages == pytest.approx([0.3, 0.32])
    assert found.metrics["imbalance"] == pytest.approx((0.32 / 0.31 - 1) * 100)
    assert "rank 4 " in report(found)


def test_clock_offsets_are_interpolated_between_two_comparisons(tmp_path: Path) -> None:
    """The second rank's clock is 1000 behind and 1 percent too fast."""
    first, last = two_ranks()
    skewed = [e._replace(begin=e.begin * 1.01 - 1000, end=e.end * 1.01 - 1000) for e in last.events]
    points = ((-1000.0, 1000.0, 3.0), (10100.0 - 1000, 1000.0 - 100, 2.0))
    write(tmp_path, [first, replace(last, events=skewed, clock=RankClock(points))])
    found = analyse_folder(tmp_path)
    assert found.metrics == pytest.approx(analysis(two_ranks()).metrics, abs=1e-6)
    assert found.clock_error_us == 3.0


def test_picture_shows_the_first_step(tmp_path: Path) -> None:
    drawing = ElementTree.fromstring(picture(two_ranks(), "a <step>"))
    titles = [title.text for title in drawing.iter("{http://www.w3.org/2000/svg}title")]
    assert "BW 0, 0.2 ms" in titles and sum("wait weights" in t for t in titles if t) == 0


def many_ranks(dp: int) -> list[RankRecord]:
    """Return the two ranks' records `dp` times."""
    return [
        replace(each, rank=each.coords.pp * dp + i, world=2 * dp, coords=each.coords._replace(dp=i))
        for each in two_ranks()
        for i in range(dp)
    ]


def test_the_report_of_two_thousand_ranks_is_short() -> None:
    assert len(report(analysis(many_ranks(1024))).splitlines()) < 40


def test_pipelines_read_in_parallel_are_analysed_as_one_job(tmp_path: Path) -> None:
    """The last rank at the norm, the step's length and the slow ranks depend on all pipelines."""
    ranks = [later(each, 10.0 * each.coords.dp) for each in many_ranks(20)]
    wait, forward = ranks[25].events[:2]  # its forward begins 60 earlier
    ranks[25].events[:2] = [wait._replace(end=wait.end - 60), forward._replace(begin=forward.begin - 60)]
    write(tmp_path, ranks)
    found, expected = analyse_folder(tmp_path), analysis(ranks)
    assert (found.ranks, found.steps, found.step_ms) == (40, 1, pytest.approx(0.7 + 0.19))
    assert found.metrics == pytest.approx(expected.metrics, nan_ok=True)
    assert found.communication == {kind: pytest.approx(times) for kind, times in expected.communication.items()}
    assert found.slowest[0].rank == expected.slowest[0].rank == 25
    assert (found.stages, found.ideal) == (pytest.approx(expected.stages), expected.ideal)

    path = tmp_path / "rank00033.json"
    text = path.read_text()
    path.write_text(text[:-9])
    with pytest.raises(UserError, match=f"^{path}: is not a complete record"):
        analyse_folder(tmp_path)
    path.write_text(text.replace('"dp_rank": 13', '"dp_rank": 14'))
    with pytest.raises(UserError, match=r"rank at pp 1 dp 14 tp 0, host1 is in another pipeline than rank00013.json"):
        analyse_folder(tmp_path)


def test_one_pipeline_and_the_profiled_ranks_are_shown_of_many(tmp_path: Path) -> None:
    write(tmp_path, many_ranks(32))
    assert shown(tmp_path) == list(range(64))
    write(tmp_path, many_ranks(40))
    (tmp_path / "profile_rank00003.json.gz").write_bytes(b"")
    assert shown(tmp_path) == [0, 3, 40]
    assert [one.location for one in read(tmp_path, [0, 40])] == ["pp 0 dp 0 tp 0, host0", "pp 1 dp 0 tp 0, host1"]


def test_table_has_a_column_for_each_kind() -> None:
    text = table({"1f1b": analysis(two_ranks())})
    assert all(kind in text for kind in COMMUNICATION if kind != "cp") and "1f1b" in text
    assert " cp " not in text, "context parallelism has a column only where it takes part"
