"""The two data tools from a shell: the full path from text to checked shards, and errors without a traceback."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
BUILD = ("shards.py", "build", f"--source=a={ROOT}/README.md", "--seq-len=8", "--out=x")


def tool(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    return warm.run(ROOT / "tools" / name, *args)


def done(name: str, *args: object) -> str:
    result = tool(name, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["tokenizer.py", "shards.py"])
def test_help_shows_an_example(name: str) -> None:
    assert f"tools/{name}" in done(name, "--help")


@pytest.mark.slow
def test_from_text_to_verified_shards(tmp_path: Path) -> None:
    done("shards.py", "gather", "--out", tmp_path, "--limit-mb", "1")
    code, prose, model = tmp_path / "code.jsonl", tmp_path / "prose.jsonl", tmp_path / "t.model"
    done("tokenizer.py", "train", "--input", code, prose, "--vocab-size", 800, "--out", tmp_path / "t")
    assert "documents round-trip" in done("tokenizer.py", "check", "--model", model, "--input", prose)
    text = "  two spaces, \u2581 and 2048\n"
    ids = done("tokenizer.py", "encode", "--model", model, text).split()
    assert done("tokenizer.py", "decode", "--model", model, *ids) == text
    build = ("build", "--source", f"code={code}", "--source", f"prose={prose}", "--tokenizer", model, "--seq-len", 32,
             "--validation-fraction", 0.2, "--workers", 2, "--out", tmp_path / "shards")  # fmt: skip
    done("shards.py", *build)
    assert done("shards.py", "verify", tmp_path / "shards").count("intact") == 2
    remote = ("verify", f"pipe:cat {tmp_path}/shards/code/{{}}", "--cache-dir", tmp_path / "cache")
    assert json.loads(done("shards.py", *remote, "--json")) == {remote[1]: []}
    code_info, prose_info = json.loads(done("shards.py", "info", tmp_path / "shards", "--rows", 1000, "--json"))
    assert (code_info["source"], prose_info["source"]) == ("code", "prose")
    rows = code_info["train"]["rows"] + prose_info["train"]["rows"]
    assert code_info["epochs"] == pytest.approx(1000 / rows)
    mixture = [f"{tmp_path}/shards/code=0.7", f"{tmp_path}/shards/prose=0.3"]
    assert 2 < float(done("shards.py", "unigram", *mixture).split()[0]) < 6.7  # ln 800
    damage(tmp_path / "shards" / "code" / "train-000000.tar")
    found = tool("shards.py", "verify", tmp_path / "shards")
    assert found.returncode == 1 and "train shard 0" in found.stdout and "1 of its shards are damaged" in found.stdout
    done("shards.py", *build)  # finished: nothing is repeated
    again = tool("shards.py", *build, "--dedup")
    assert again.returncode == 2 and "dedup False, now True" in again.stderr and "--overwrite" in again.stderr


def damage(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("tokenizer.py", "train", "--input", "no/such/*.txt", "--vocab-size", 500, "--out", "x"), "no/such/*.txt"),
        (("tokenizer.py", "encode", "--model", "no.model", "x"), "no.model"),
        (("shards.py", "info", "no-shards"), "no-shards"),
        (("shards.py", "verify", "no-shards"), "no-shards"),
        (("shards.py", "unigram", "no-shards=1"), "no-shards"),
        (("shards.py", "audit", "no-run", "--step", 1), "no-run"),
        (("shards.py", "consumed", "no-run"), "no-run"),
        (("shards.py", "verify", "foo://bucket/x"), "foo://bucket/x"),
        (("shards.py", "verify", "http://127.0.0.1:9/x"), "cache"),
        ((*BUILD, "--tokenizer=~/no.model"), f"{Path.home()}/no.model"),
        ((*BUILD, "--tokenizer=no.model"), "no.model"),
        (("shards.py", "build", "--source=a=x", "--tokenizer=t", "--seq-len=8", "--out=x"), "x: no such file"),
        (
            ("shards.py", "build", "--source=a=README.md", "--tokenizer=t", "--seq-len=8", "--out=x", "--workers=-1"),
            "-1",
        ),
        (("shards.py", "build", "--source=a=a", "--source=a=b", "--tokenizer=t", "--seq-len=8", "--out=x"), "2 times"),
        (("shards.py", "verify", "no-shards", "--workers", 0), "--workers: '0' is not a whole number from 1"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(args: tuple[object, ...], message: str) -> None:
    result = tool(*map(str, args))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1
