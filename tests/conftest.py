"""Common setup of all tests: the checkout on the path, one thread per process, no silent skip in CI."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Generator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: it reads the variable once
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hypothesis
import pytest

# Hypothesis' own deadline of 200 ms per example judges by a clock that a loaded machine stops.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")


@pytest.fixture(autouse=True)
def package_log() -> None:
    """Lines of the package's log reach `caplog` once, whatever `log.setup` an earlier test of the process called."""
    logging.getLogger("llama_ds").propagate = True


def fail_if_skipped_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure where CI=true: a skipped test proves nothing there."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: nothing may be skipped in CI. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.get_closest_marker("gpu") is None:
        fail_if_skipped_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    fail_if_skipped_in_ci(report)  # a module that skips itself, such as by pytest.importorskip
    return report
