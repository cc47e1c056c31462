"""The self-test of a run's layout before the run's model is built, and the memory of the layouts that have passed.

No other program tests this at launch. Unit tests run on machines where everything is known to work; a user's cluster
has links, drivers and libraries of its own, and a collective that computes something wrong does not announce itself.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from llama_ds import __version__
from llama_ds.atomic_files import write_atomically
from llama_ds.config.document_marks import DocumentMarks
from llama_ds.config.run_file import resolved
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import Layout
from llama_ds.log import logger, only_warnings
from llama_ds.parallel import world
from llama_ds.parallel.backend import backend
from llama_ds.training.self_test.axes import FaultSearch
from llama_ds.training.self_test.comparison import Differences, bounds_of, compare
from llama_ds.training.self_test.small_run import SmallRun, small_run

PASSED = "self_test.json"  # in the run's folder: the layouts that have passed
SECTIONS = (
    "model",
    "optimizer",
    "parallel",
    "compute",
    "deepspeed",
)  # sections of the small run that decide the outcome


def self_test_at_start(
    run: RunConfig, layout: Layout, dtype: str, marks: DocumentMarks, rank_info: world.RankInfo, device: torch.device
) -> None:
    """Test the layout as `compute.self_test` says. Collective.

    `dtype` is "bf16" or "fp32", `marks` are those of the tokenizer; `recompute: auto` must be resolved.

    Raises:
        UserError: on all ranks: the layout does not compute what plain torch does; the message names the axis.
    """
    setting = run.compute.self_test
    if setting == "always" or (setting == "auto" and rank_info.world > 1):
        self_test(run, layout, dtype, marks, rank_info, device, repeat=setting == "always")


def self_test(
    run: RunConfig,
    layout: Layout,
    dtype: str,
    marks: DocumentMarks,
    rank_info: world.RankInfo,
    device: torch.device,
    repeat: bool = True,
) -> None:
    """Test the layout, unless not `repeat` and it has passed before; remember that it passed. Collective."""
    started = time.monotonic()
    name = layout.words()
    if "zenflow" in run.deepspeed.get("zero_optimization", {}):
        logger.warning("no self-test: zero_optimization.zenflow is another optimizer than AdamW")
        return
    small = small_run(run, layout, dtype, marks)
    path, record = os.path.join(run.run_dir, PASSED), _record(small, layout, device)
    if not repeat and world.gather(rank_info.rank == 0 and record in _passed(path))[0]:
        return
    logger.info("self-test of %s: a tiny model against plain torch (compute.self_test)", name)
    with only_warnings(), _crash_explained(name):
        found = compare(small, rank_info, device)
        failed = "; ".join(found.beyond(bounds_of(small)))
        verdict = FaultSearch(small, rank_info, device).verdict(failed) if failed else ""
    if failed:
        raise UserError(
            f"self-test of {name}: the run would compute wrong numbers: a tiny model's are not plain torch's: "
            f"{failed}. {verdict}. Use another value or other hosts there, or compute.self_test=off to train regardless"
        )
    if rank_info.rank == 0:
        _remember(path, record)
    logger.info("self-test of %s: %s; %.1f s", name, _words(found), time.monotonic() - started)


@contextmanager
def _crash_explained(name: str) -> Iterator[None]:
    """Say of an error inside that it is the self-test's, and how to train without it."""
    try:
        yield
    except Exception as error:
        logger.error(
            "self-test of %s: it could not be finished (%s), so it says nothing about this layout; "
            "compute.self_test=off trains without it, where the error may come again",
            name,
            type(error).__name__,
        )
        raise


def _words(found: Differences) -> str:
    return f"loss differs by {found.loss:.0e}, gradient norm by {found.norm:.0e}, weights' change by {found.change:.0e}"


def _record(small: SmallRun, layout: Layout, device: torch.device) -> dict[str, Any]:
    """Return what the outcome depends on, as plain data: layout, structure, dtypes, versions, backend, device."""
    run = resolved(small.run)
    run["compute"].pop("self_test")
    names = ("torch", "deepspeed", "flash-attn")
    return {
        "layout": layout.as_data(),
        "dtype": small.dtype,
        "run": {name: run[name] for name in SECTIONS},
        "document_mask": small.run.data.document_mask and ("begin" if small.marks.begin is not None else "end"),
        "versions": {"llama_ds": __version__, **{name: _version(name) for name in names}},
        "backend": backend(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _passed(path: str) -> list[dict[str, Any]]:
    """Return the records of a run's folder; none if the file is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _remember(path: str, record: dict[str, Any]) -> None:
    records = _passed(path)
    if record in records:
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_atomically(path, json.dumps([*records, record]))
    except OSError as error:  # the run itself says what to do about its folder
        logger.warning("self-test: its result cannot be remembered, the next start repeats it (%s)", error)
