"""A run by DeepSpeed's launcher, recorded and profiled, prints only our own lines on the console."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from launching import TRAIN, succeed, warm_deepspeed
from tiny_run import Run

from tests.console import foreign_lines


@pytest.mark.slow
def test_libraries_are_silent(make_run: Callable[..., Run]) -> None:
    recorded = {"logging.trace_step": 2, "logging.profile_ranks": [0, 1], "logging.boards": [{"name": "tensorboard"}]}
    made = make_run("silent", recorded)
    output = succeed(warm_deepspeed(2, "--log_level", "error", TRAIN, made.file), made.log)
    assert "step 6/6" in output and "step 6 | saved" in output
    assert foreign_lines(output) == []
