"""A run by DeepSpeed's launcher, recorded and profiled, prints only our own lines on the console."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from launching import TRAIN, deepspeed, succeed
from tiny_run import Run

from tests.console import foreign_lines


@pytest.mark.slow
def test_libraries_are_silent(make_run: Callable[..., Run]) -> None:
    recorded = {"logging.trace_step": 2, "logging.profile_ranks": [0, 1], "logging.boards": [{"name": "tensorboard"}]}
    made = make_run("silent", recorded)
    launcher, *words = deepspeed(2, TRAIN, made.file)
    output = succeed([launcher, "--log_level", "error", *words], made.log)
    assert "step 6/6" in output and "step 6 | saved" in output
    assert foreign_lines(output) == []
