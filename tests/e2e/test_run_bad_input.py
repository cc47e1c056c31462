"""Bad input ends a run with one line that names the fix, a non-zero exit code on every rank, and no hang."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input_cases import CASES, Case, Site
from launching import TRAIN, Finished, deepspeed, forked, run, succeed
from tiny_run import Corpus, Run, write_run

from llama_ds.machine import free_port

RECORDER = Path(__file__).with_name("rank_recorder.py")
RANKS = 2

Outcomes = dict[str, list[Finished]]


@pytest.fixture(scope="module")
def outcomes(corpus: Corpus, trained: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Output of each rank in each case; all cases share one start of two ranks."""
    root = tmp_path_factory.mktemp("bad_input")
    batch = []
    for number, case in enumerate(CASES):
        site = make_site(root / f"site{number}", corpus, trained("pp2") if case.trained else None)
        batch.append({"arguments": case.prepare(site), "port": free_port()})
    (root / "batch.json").write_text(json.dumps(batch))
    succeed(forked(RANKS, RECORDER, root / "batch.json", root), root / "log", timeout_s=900)
    return {
        case.name: [Finished(**json.loads((root / f"{number}.r{rank}.json").read_text())) for rank in range(RANKS)]
        for number, case in enumerate(CASES)
    }


def make_site(root: Path, corpus: Corpus, finished: Run | None) -> Site:
    shutil.copytree(corpus.shards.parent, root)
    own = Corpus(root / corpus.tokenizer.name, root / corpus.shards.name)
    run = write_run(root, "site", own, {"parallel.pp": 2})
    if finished:
        shutil.copytree(finished.dir, run.dir)
    else:
        run.dir.mkdir()
    return Site(root, own, run)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mistake_ends_every_rank_with_one_line(case: Case, outcomes: Outcomes) -> None:
    ranks = outcomes[case.name]
    output = "\n".join(rank.output for rank in ranks)
    assert None not in [rank.code for rank in ranks], f"a rank hangs\n{output}"
    assert 0 not in [rank.code for rank in ranks], output
    assert "Traceback" not in output
    (error,) = [line for rank in ranks for line in rank.errors]
    assert all(word in error for word in case.words), error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options", "word"),
    [(3, [], "world size 3"), (2, ["--hostfile", "nowhere.txt"], "nowhere.txt")],
    ids=["world that does not divide", "missing hostfile"],
)
def test_launcher_passes_the_failure_on(
    ranks: int, options: list[str], word: str, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """What all ranks find and what the launcher itself finds; the cases above have every other mistake of ranks."""
    sound = make_run("refused", {"parallel.pp": 2})
    done = run([*deepspeed(ranks, *options), TRAIN, str(sound.file)], tmp_path / "log")  # its own words, in /proc
    assert done.code != 0
    assert "Traceback" not in done.output
    (error,) = done.errors
    assert word in error
    assert not sound.dir.exists(), "it trained all the same"
