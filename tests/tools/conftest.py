"""One small finished run for all tests of tools, files that never come."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from calling import Tools

sys.path.append(str(Path(__file__).resolve().parents[1] / "e2e"))


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    return Tools(tmp_path_factory.mktemp("calls"))


@pytest.fixture(scope="session")
def words(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What stands for the words in braces of `calls.py`, but for `new`."""
    from tiny_run import build_corpus, write_run

    root = tmp_path_factory.mktemp("run")
    corpus = build_corpus(root)
    run = write_run(root, "finished", corpus, {"training.steps": 3, "logging.trace_step": 2, "evaluation.rows": 4})
    done = tools.call("llama_ds/train.py", run.file)
    assert done.code == 0, done.err
    ladder = root / "ladder.yaml"
    sizes = "depths: [1, 2]\ntokens: [1M]\nparallel: {micro_batch: 1}"
    ladder.write_text(f"name: small\nbase: {run.file}\nfolder: {root}/ladder\n{sizes}\n")
    waits = root / "waits"
    for place in ("pipe.yaml", "step_00000001/llama_ds.json", "source/manifest.json", "run/metrics.jsonl"):
        (waits / place).parent.mkdir(parents=True, exist_ok=True)
        if place == "pipe.yaml":
            os.mkfifo(waits / place)
        else:
            (waits / place).symlink_to(waits / "pipe.yaml")
    (waits / "corpus").mkdir()
    (waits / "corpus" / "prose.jsonl").touch()
    return {
        "run": run.dir, "run_file": run.file, "shards": corpus.shards, "tokenizer": corpus.tokenizer, "waits": waits,
        "trained": done, "ladder": ladder,
    }  # fmt: skip
