"""One tiny corpus for all tests of whole runs, a factory of run files, and runs that several tests look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
from launching import TRAIN, alone, forked, succeed
from tiny_run import LAYOUTS, Corpus, Run, build_corpus, write_run

MakeRun = Callable[[str, Mapping[str, Any]], Run]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def make_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Return a function that writes a run file under a name, with changes by dotted key."""
    root = tmp_path_factory.mktemp("runs")  # each module's own: a name used by two would be one run that goes on
    return lambda name, changes: write_run(root, name, corpus, changes)


@pytest.fixture(scope="session")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Return a function that gives the finished run of a layout, trained on its first use."""
    root = tmp_path_factory.mktemp("trained")

    @cache
    def train(name: str) -> Run:
        ranks, changes = LAYOUTS[name]
        run = write_run(root, name, corpus, changes)
        succeed(forked(ranks, TRAIN, run.file) if ranks > 1 else alone(TRAIN, run.file), run.log)
        return run

    return train
