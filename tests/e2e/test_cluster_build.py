"""Shards built on several hosts: the same bytes as on one, also after a host was lost."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llama_ds.data.building.build import build_source
from llama_ds.data.text.corpus import documents
from llama_ds.data.text.gather import gather_local_corpus
from llama_ds.data.text.tokenizer import train_tokenizer
from tests.hosts import Hosts, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN, FRACTION, ROWS = 64, 0.1, 400
TIMEOUT_S = 600.0


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_four_hosts_build_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = gather_local_corpus(str(tmp_path / "corpus"), 3)["code"]
    assert len(list(documents(corpus))) > 50
    with open(corpus, "r+", encoding="utf-8") as file:  # lines of 100 kB, so that little text makes many parts
        lines = [line.replace("{", '{"id": "%s", ' % ("-" * 100_000), 1) for line in file]
        file.seek(0)
        file.writelines(lines)
    tokenizer = train_tokenizer([corpus], str(tmp_path / "tokenizer"), 600)
    build_source("s", corpus, tokenizer, str(tmp_path / "one"), SEQ_LEN, FRACTION, ROWS)
    with Hosts(4, tmp_path / "hosts", subnet=90) as hosts:
        for name, value in hosts.environment.items():
            monkeypatch.setenv(name, value)

        def start(names: list[str]) -> subprocess.Popen[str]:
            hostfile = hosts.write_hostfile(tmp_path / "hostfile", 1, names)
            command = [
                sys.executable, ROOT / "tools" / "shards.py", "build", "--source", f"s={corpus}", "--out", "four",
                "--tokenizer", "tokenizer.model", "--seq-len", SEQ_LEN, "--validation-fraction", FRACTION,
                "--rows-per-shard", ROWS, "--workers", 1, "--hostfile", hostfile,
            ]  # fmt: skip
            return subprocess.Popen([str(word) for word in command], cwd=tmp_path, stderr=subprocess.PIPE, text=True)

        build = start(hosts.names)
        workers: dict[str, list[psutil.Process]] = {}
        while len(workers) < len(hosts.names):  # each host builds, however late it starts
            assert build.poll() is None, build.communicate()
            time.sleep(0.05)
            for name in hosts.names:
                if name not in workers and (found := hosts.processes(name, "spawn_main")):
                    workers[name] = found
                    for worker in found:
                        worker.suspend()
        for worker in [worker for name in hosts.names if name != "node2" for worker in workers[name]]:
            worker.resume()  # node2 takes a part that it does not finish
        while not list(tmp_path.glob("four/s/build/part-*.json")):
            assert build.poll() is None, build.communicate()
            time.sleep(0.05)
        hosts.power_off("node2")
        _, errors = build.communicate(timeout=TIMEOUT_S)
        assert build.returncode == 2 and "Traceback" not in errors
        assert all(f"host {name} builds with 1 processes" in errors for name in hosts.names)
        assert "error: host node2: the connection to its worker processes has ended" in errors
        build = start(["node1", "node3", "node4"])
        _, errors = build.communicate(timeout=TIMEOUT_S)
        assert build.returncode == 0, errors
        assert "builds with 1 processes" in errors and "node2" not in errors
        assert content(tmp_path / "four" / "s") == content(tmp_path / "one" / "s")
        build = start(hosts.names[:1])
        _, errors = build.communicate(timeout=TIMEOUT_S)
        assert build.returncode == 0 and "nothing is left to do" in errors
