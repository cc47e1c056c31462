"""Remote sources and damaged shards change the rows that a run reads, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from launching import ROOT, TRAIN, alone, forked, succeed
from tiny_run import LAYOUTS, STEPS, Corpus, Run

MakeRun = Callable[..., Run]


@pytest.fixture
def damaged(corpus: Corpus, tmp_path: Path) -> Path:
    """A copy of the shards with flipped bits in four shards of code."""
    shutil.copytree(corpus.shards, tmp_path / "shards")
    for shard in sorted((tmp_path / "shards" / "code").glob("train-*.tar"))[:4]:
        content = bytearray(shard.read_bytes())
        content[540] ^= 4
        shard.write_bytes(content)
    return tmp_path / "shards"


@pytest.fixture
def server(corpus: Corpus) -> Iterator[str]:
    """The shards behind a web server."""
    handler = partial(QuietHandler, directory=str(corpus.shards))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    """A handler that logs no requests."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.slow
def test_damaged_shards_are_replaced_alike_in_every_layout_and_on_resuming(
    damaged: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    data = {"data.check_interval": 2}
    one = make_run("one_damaged", data | {"data.sources": sources(damaged)})
    output = succeed(alone(TRAIN, one.file), one.log)
    assert "is damaged and will be replaced from step" in output and "sha256" in output
    ranks, layout = LAYOUTS["pp2_tp2"]
    four = make_run("four_damaged", layout | data | {"data.sources": sources(damaged)})
    succeed(forked(ranks, TRAIN, four.file, "checkpoint.stop_at=3"), four.log)
    succeed(forked(ranks, TRAIN, four.file, "checkpoint.resume=must"), four.log)
    assert four.losses == pytest.approx(one.losses, rel=1e-5)
    states = [json.loads((run.dir / "data.json").read_text()) for run in (one, four)]
    assert states[0]["bad"] and states[0] == states[1]
    assert json.loads((four.newest / "llama_ds.json").read_text())["data"] == states[1]
    audit = alone(ROOT / "tools/shards.py", "audit", four.dir, "--step", 4, "--json")
    rows = json.loads(succeed(audit, tmp_path / "log"))
    gone = {f"train-{bad['shard']:06d}.tar" for bad in states[0]["bad"] if bad["step"] <= 4}
    assert all(row["documents"] for row in rows)
    assert len(rows) == 8 and not any(row["source"] == "code" and row["shard"] in gone for row in rows)


@pytest.mark.slow
def test_shards_behind_a_web_server_train_as_local_ones(
    server: str, trained: Callable[[str], Run], make_run: MakeRun, tmp_path: Path
) -> None:
    ranks, layout = LAYOUTS["pp2_tp2"]
    remote = make_run("remote", layout | {"data.sources": sources(server), "data.cache_dir": str(tmp_path / "cache")})
    succeed(forked(ranks, TRAIN, remote.file), remote.log)
    assert remote.losses == trained("pp2_tp2").losses
    assert remote.validation_loss == trained("pp2_tp2").validation_loss
    assert list((tmp_path / "cache").glob("*train-*.tar")) and not list((tmp_path / "cache").glob(".part-*"))


@pytest.mark.slow
def test_what_was_read_of_each_source_is_reported(trained: Callable[[str], Run]) -> None:
    run = trained("alone")
    (line,) = [line for line in run.metrics if "tokens/code" in line]
    assert line["step"] == STEPS
    assert line["tokens/code"] + line["tokens/prose"] == STEPS * 8 * 48
    assert 0 < line["epochs/code"] < 1 < line["epochs/prose"] * 100
    assert f"step {STEPS} | read code {line['tokens/code']:,} tokens, " in run.log.read_text()


def sources(folder: object) -> list[dict[str, object]]:
    return [{"name": n, "path": f"{folder}/{n}", "weight": w} for n, w in (("code", 0.75), ("prose", 0.25))]
