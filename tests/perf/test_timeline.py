"""Where a recorded step's time went, on steps small enough to add up by hand."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from llama_ds.errors import UserError
from llama_ds.perf.timeline import analyse, mean_cost, picture, read, simulated_bubble, table


def event(what: str, begin: float, end: float, stage: int = -1, micro_batch: int = 0, size: int = 0) -> dict[str, Any]:
    return {"what": what, "begin": begin, "end": end, "stage": stage, "micro_batch": micro_batch, "bytes": size}


def rank(number: int, *events: dict[str, Any]) -> dict[str, Any]:
    about = {"engine": "1f1b", "schedule": "1f1b", "pp": 2, "virtual_stages": 1, "extra_warmup": 0, "micro_batches": 1}
    return {"rank": number, "pp_rank": number, "dp_rank": 0, "tp_rank": 0, **about, "events": list(events)}


def two_ranks() -> list[dict[str, Any]]:
    """One micro-batch there and back: messages take 30, the first rank's send holds it up for 5."""
    return [
        rank(
            0,
            event("F", 0, 100, 0),
            event("send activation", 100, 105, 1, size=8),
            event("wait grad", 105, 460, 0),
            event("BW", 460, 660, 0),
            event("reduce", 640, 690),
            event("wait reduction", 660, 690),
            event("optimizer", 690, 700),
            event("step", 0, 700),
            event("wait weights", 700, 720),  # after the step: of the record, not of the step
        ),
        rank(
            1,
            event("wait activation", 0, 130, 1),
            event("F", 130, 230, 1),
            event("BW", 230, 430, 1),
            event("send grad", 430, 430, 0, size=8),
            event("reduce", 410, 450),
            event("wait reduction", 430, 450),
            event("optimizer", 690, 700),
            event("step", 0, 700),
        ),
    ]


def test_shares_add_up() -> None:
    step = analyse(two_ranks())
    whole = 2 * 700
    assert step.step_ms == 0.7
    assert step.compute == 600 / whole
    assert step.optimizer == 20 / whole
    assert step.exposed_p2p == (5 + 30 + 30) / whole  # the send, and each message from its sending on
    assert step.exposed_dp == (30 + 20) / whole
    assert step.compute + step.optimizer + step.exposed_p2p + step.exposed_dp + step.bubble == pytest.approx(1)
    assert step.p2p_ms == 0.06  # two messages of 30
    assert step.exposed_p2p_of_total == 65 / 60
    assert step.dp_ms == pytest.approx(0.09)
    assert step.exposed_dp_of_total == pytest.approx(50 / 90)


def test_message_that_came_while_its_receiver_computed_is_hidden() -> None:
    """It is sent at 100, and the receiver, busy until then, takes it at 200 at once."""
    ranks = two_ranks()
    ranks[1]["events"][0] = event("wait activation", 130, 130, 1)
    step = analyse(ranks)
    assert step.exposed_p2p == (5 + 30) / 1400
    assert step.p2p_ms == 0.06  # as long as the other of its size, which was waited for


def test_bubble_is_simulated_with_the_medians() -> None:
    assert mean_cost(two_ranks()).forward == 100
    assert simulated_bubble(two_ranks()) == pytest.approx(0.5)  # one micro-batch on two stages


def test_files_are_read_back_and_drawn(tmp_path: Path) -> None:
    for content in two_ranks():
        (tmp_path / f"rank0000{content['rank']}.json").write_text(json.dumps(content))
    assert analyse(read(tmp_path)) == analyse(two_ranks())
    drawing = ElementTree.fromstring(picture(two_ranks(), "a step"))
    titles = [title.text for title in drawing.iter("{http://www.w3.org/2000/svg}title")]
    assert "BW 0, 0.2 ms" in titles and sum("wait weights" in t for t in titles if t) == 0
    assert "1f1b" in table({"1f1b": analyse(two_ranks())})


def test_folder_without_records_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no rank\*.json in it; set logging.trace_step"):
        read(tmp_path)
