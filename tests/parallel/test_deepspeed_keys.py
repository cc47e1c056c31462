"""Checkpoints carry a run on to the bit under every accepted key of the DeepSpeed JSON, also as initial weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ds.config.deepspeed_effects import USES
from tests import warm
from tests.parallel.deepspeed_key_cases import ENGINES, REASONS, VALUES, engines_of, key_cases


def test_every_key_that_works_is_tried_or_has_a_reason() -> None:
    """A new key that touches weights would otherwise be forgotten, as hpZ was, whose copy of the weights went stale."""
    assert VALUES.keys().isdisjoint(REASONS)
    assert VALUES.keys() | REASONS.keys() == {key for key, use in USES.items() if use.works_in}
    for key, tried in VALUES.items():
        assert set(tried.only) <= set(USES[key].works_in), key
        assert tried.value != USES[key].default or key == "bf16.immediate_grad_update", key  # it is true here
    cases = key_cases()
    assert {(case.engine, key) for case in cases for key in case.keys} == {
        (engine, key) for key in VALUES for engine in engines_of(key)
    }
    assert {case.engine for case in cases} == set(ENGINES)


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Loss, norm, masters and moments of the step after a resume are those of the run that was not interrupted.

    A run that starts from the checkpoint has its masters, and the loss that they had. Where a group of keys fails, the
    worker tries each alone.
    """
    done = warm.run("-m", "tests.parallel.deepspeed_key_worker", tmp_path, tmp_path / "found", ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found = json.loads((tmp_path / "found").read_text())
    assert len(found) >= len(key_cases())
    assert {name: differing for name, differing in found.items() if differing} == {}
