"""Texts of ranks name commands as a user of the wheel types them, and as in a checkout there."""

from __future__ import annotations

import logging

import pytest

from llama_ds import log, shipped, train
from llama_ds.errors import UserError
from llama_ds.parallel import world

IN_CHECKOUT = "build it with tools/shards.py build, see python llama_ds/train.py --dry-run; torchrun llama_ds/train.py"
TYPED = f"build it with llama-ds shards build, see llama-ds train --dry-run; torchrun {shipped.TRAIN}"


@pytest.fixture(params=[True, False], ids=["wheel", "checkout"])
def wanted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pretend that this is a wheel, or a checkout; return the text that is right there."""
    monkeypatch.setattr(shipped, "INSTALLED", request.param)
    return TYPED if request.param else IN_CHECKOUT


def test_the_error_of_a_rank(wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(world, "_leave", lambda code: None)
    told = {}
    with world.failing_together(lambda **report: told.update(report)):
        raise UserError(IN_CHECKOUT)
    assert told["text"] == f"error: {wanted}"
    assert capsys.readouterr().err == f"error: {wanted}\n"


def test_a_line_of_the_log(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "logger", logging.Logger("apart"))
    log.setup()
    (handler,) = log.logger.handlers
    record = logging.LogRecord("name", logging.WARNING, "", 0, "%s", (UserError(IN_CHECKOUT),), None)
    assert handler.format(record).endswith(f"WARNING {wanted}")


def test_the_help_of_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shipped, "INSTALLED", True)
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    said = capsys.readouterr().out
    assert "\nllama-ds train ds_configs/llama_65b.yaml --dry-run" in said and f" {shipped.TRAIN} ds_configs" in said
