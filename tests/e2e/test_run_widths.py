"""Coordinate check: with muP the size of activations after a few steps does not depend on the width; else it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import Run

from tools import ladder

CHANGES = {
    "model.num_hidden_layers": 2,
    "model.mup": {"base_width": 32},
    "training.global_batch": 4,
    "optimizer.lr": 1e-3,
}


@pytest.mark.slow
def test_activations_have_one_size_at_all_widths(make_run: Callable[..., Run], tmp_path: Path) -> None:
    """Slopes of log size over log width. A wrong factor of a learning rate changes them by 1, of initial weights by
    1/2; measured are at most 0.05 with muP and at least 0.87 without.

    Logits start as sums of random signs, with slope -1/2 under muP, and may rise from there to 0.
    """
    run = make_run("widths", CHANGES)
    arguments = [str(run.file), "--widths", "32,64,128,256", "--steps", "4", "--out", str(tmp_path)]
    assert ladder.main(["coordinate-check", *arguments]) == 0
    found = json.loads((tmp_path / "coordinate-check.json").read_text())
    for kind, slopes in found["slopes"]["mup"].items():
        assert abs(slopes[-1]) < 0.15 or (kind == "logits" and -0.6 < slopes[-1] < 0.15), (kind, slopes)
    for kind, slopes in found["slopes"]["standard"].items():
        assert slopes[-1] > 0.5, (kind, slopes)
    figure = (tmp_path / "coordinate-check.svg").read_text()
    assert "residual stream, with muP" in figure and "logits, without muP" in figure


def test_widths_without_a_whole_number_of_heads_are_refused(
    make_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("odd", CHANGES)
    assert ladder.main(["coordinate-check", str(run.file), "--widths", "24,32"]) == 2
    assert "--widths 24 would have 3 heads and 1.5 key-value heads; use multiples of 16" in capsys.readouterr().err
