"""One tiny corpus for all tests of whole runs, a factory of run files, and runs that several tests look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
from launching import TRAIN, alone, deepspeed, succeed
from tiny_run import LAYOUTS, Corpus, Run, build_corpus, write_run

MakeRun = Callable[[str, Mapping[str, Any]], Run]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def make_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Return a function that writes a run file under a name, with changes by dotted key."""
    root = tmp_path_factory.mktemp("runs")
    return lambda name, changes: write_run(root, name, corpus, changes)


@pytest.fixture(scope="session")
def trained(make_run: MakeRun) -> Callable[[str], Run]:
    """Return a function that gives the finished run of a layout, trained on its first use."""

    @cache
    def train(name: str) -> Run:
        ranks, changes = LAYOUTS[name]
        run = make_run(name, changes)
        succeed(deepspeed(ranks, TRAIN, run.file) if ranks > 1 else alone(TRAIN, run.file), run.log)
        return run

    return train
