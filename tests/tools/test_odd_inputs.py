"""Odd files, and changed values in the project's own files, are one line of error: no traceback, no endless work."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_ds.data.building.build import build_source
from llama_ds.data.mixture import state_from_json
from llama_ds.data.source.manifest import parse_manifest
from llama_ds.data.text.tokenizer import train_tokenizer
from llama_ds.errors import UserError

CONTENTS = {
    "empty": b"",
    "binary": bytes(range(256)) * 8,
    "null": b"null",
    "list": b"[]",
    "number": b"7",
    "nested": b"[" * 100_000,
    "digits": b'{"format": ' + b"9" * 5000 + b"}",
    "keys missing": b"{}",
    "other keys": b'{"a": {"b": [1, null, {"c": true}]}}',
    "latin": b"a: \xff\xfe",
    "line": b"x" * 100_000,
}
PLACES = ("a folder", "no/such", "n" * 5000, "a\0b", "\udcff", "", "/dev/null")
CALLS = (
    "shards info {}",
    "shards verify {}",
    "shards report {}",
    "shards unigram {}=1",
    "shards audit {} --step 1",
    "shards consumed {}",
    "shards gather --limit-mb 0.001 --out {}/x",
    "tokenizer encode --model {} text",
    "tokenizer check --model {} --input {}",
    "hostfile map {}",
    "hostfile select {} --include a",
    "plan estimate {} --gpus 8",
    "plan estimate 7b --gpus 8 --gpu {}",
    "plan validate --data {}",
    "plan search --model {} --gpus 8",
    "profile_run analyse {}",
    "benchmark data --quick --only build --corpus {}",
    "benchmark data --quick --only build --tokenizer {}",
    "benchmark data --quick --only resume --run {}",
    "benchmark data --quick --only read --streaming-python {}",
)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths that no tool can read, or write a folder below."""
    root = tmp_path_factory.mktemp("odd")
    for name, content in CONTENTS.items():
        (root / name).write_bytes(content)
    (root / "a folder").mkdir()
    return [str(root / name) for name in CONTENTS] + [p if p in ("", "/dev/null") else str(root / p) for p in PLACES]


@pytest.mark.parametrize("call", [call for call in CALLS if "gather" not in call])
def test_an_odd_file_is_one_line(call: str, odd: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tool, *words = call.split()
    main = importlib.import_module(f"tools.{tool}").main
    for path in odd:
        code = main([word.format(path) for word in words])
        out, error = capsys.readouterr()
        assert (code, out) == (2, ""), (path[-40:], out)
        assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 12_000, (path[-40:], error)


def test_an_output_that_cannot_be_written_is_one_line(odd: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from tools import shards

    for path in odd:
        if "no/such" in path or "a folder" in path or path == "" or "\udcff" in path:
            continue  # folders that can be made
        assert shards.main(["gather", "--limit-mb", "0.001", "--out", f"{path}/x"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.splitlines()[-1].startswith("error: "), path[-40:]


def test_the_file_of_results_is_checked_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A benchmark takes minutes, and an --out that cannot be written would lose them. The check leaves no file."""
    from tools import benchmark, hostfile, profile_run

    (tmp_path / "file").touch()
    for out, error in (("file/x", "error: --out"), ("new/x", "error: no.yaml: ")):
        assert benchmark.main(["data", "--run", "no.yaml", "--out", str(tmp_path / out)]) == 2
        assert capsys.readouterr().err.startswith(error)
    assert not (tmp_path / "new" / "x").exists()
    for tool, option, *words in (
        (profile_run, "--out", "record", "ds_configs/quickstart.yaml"),
        (profile_run, "--svg", "record", "ds_configs/quickstart.yaml", "--out", str(tmp_path / "new")),
        (profile_run, "--svg", "analyse", "no-folder"),
        (hostfile, "--svg", "map", "hostfiles/2x8"),
    ):
        assert tool.main([*words, option, str(tmp_path / "file" / "x")]) == 2
        assert capsys.readouterr().err.startswith(f"error: {option} {tmp_path / 'file' / 'x'}: cannot be written")


VALUES = st.sampled_from([None, -1, 0, 1.5, "x", "", [], {}, 10**30, float("nan"), True, [None], {"a": 1}, -(10**30)])


def changed(document: Any, data: st.DataObject) -> Any:
    """Return a JSON document with one value replaced or removed, at any depth."""
    keys = (
        list(document)
        if isinstance(document, dict)
        else list(range(len(document)))
        if isinstance(document, list)
        else []
    )
    if not keys or not data.draw(st.integers(0, 4)):
        return data.draw(VALUES)
    key = data.draw(st.sampled_from(keys))
    copy = document.copy()
    if data.draw(st.integers(0, 4)):
        copy[key] = changed(document[key], data)
    else:
        del copy[key]
    return copy


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("manifest")
    (root / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} is a number. " * 20}) + "\n" for i in range(40))
    )
    tokenizer = train_tokenizer([str(root / "texts.jsonl")], str(root / "t"), 290)
    build_source("s", str(root / "texts.jsonl"), tokenizer, str(root), 32, 0.2)
    return json.loads((root / "s" / "manifest.json").read_text())


STATE = {
    "rows_per_shard": {"a": 10, "b": 10},
    "segments": [
        {"step": 0, "weights": {"a": 0.5, "b": 0.5}, "extents": {"a": [30], "b": [20, 5]}},
        {"step": 4, "weights": {"a": 1.0, "b": 0.0}, "extents": {"a": [30], "b": [20, 5]}},
    ],
    "bad": [{"step": 2, "source": "a", "shard": 1, "reason": "sha256", "offset": 600}],
    "skips": [{"step": 3, "steps": 2}],
}


def use_manifest(document: Any) -> None:
    found = parse_manifest(json.dumps(document).encode(), "here")
    for split in found.splits.values():
        assert split.rows >= 0 and all(len(split.shard_rows(shard)) for shard in range(min(split.shards, 3)))


def use_state(document: Any) -> None:
    state_from_json(document, "here").order(1, 8).rows(0, 40)


@pytest.mark.parametrize(("kind", "use"), [("manifest", use_manifest), ("state", use_state)])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_value_is_refused_or_harmless(
    manifest: dict[str, Any], kind: str, use: Callable[[Any], None], data: st.DataObject
) -> None:
    document = changed({"manifest": manifest, "state": STATE}[kind], data)
    try:
        use(document)
    except UserError as error:
        assert str(error).startswith("here: ") and "\n" not in str(error)
