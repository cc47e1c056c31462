"""Builds that are run again, or whose input changes: finished work is not repeated, and no document is added twice."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from built_sources import SEQ_LEN, Built
from source_files import SHARDS_TOOL, content, manifest_of, write_lines, write_megatron

from llama_ds.data.building import found_input
from llama_ds.data.building.build import build_source
from llama_ds.data.text.formats import ReadOptions
from llama_ds.data.text.inputs import Inputs, find_inputs
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError
from tests import warm
from tools import shards

TEXTS = [f"{i} green bottles standing on the wall. " * 8 for i in range(40)]


def tool(built: Built, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    fixed = ("--tokenizer", built.tokenizer, "--seq-len", SEQ_LEN, "--validation-fraction", 0, "--workers", 1)
    return warm.run(SHARDS_TOOL, "build", *fixed, "--out", out, *more)


def build(built: Built, out: Path, pattern: object, **more: object) -> None:
    build_source("s", str(pattern), built.tokenizer, str(out), SEQ_LEN, 0.0, 20, **more)  # type: ignore[arg-type]


def documents_in(folder: Path) -> int:
    return manifest_of(folder).splits["train"].documents


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_the_same_command_completes_several_sources_and_repeats_none(built: Built, tmp_path: Path) -> None:
    for name, texts in (("a", TEXTS[:20]), ("b", TEXTS[20:]), ("more-a", TEXTS[:5]), ("more-b", TEXTS[5:9])):
        write_lines(tmp_path / f"{name}.jsonl", texts)
    for kind, prefix in (("build", ""), ("append", "more-")):
        files = {name: tmp_path / f"{prefix}{name}.jsonl" for name in "ab"}
        command = [word for name, file in files.items() for word in ("--source", f"{name}={file}")]
        command += ["--append"] if kind == "append" else []
        good = files["b"].read_bytes()
        files["b"].write_bytes(good + b"{\n")
        stopped = tool(built, tmp_path / "out", *command)
        assert stopped.returncode == 2 and f"{files['b']}:" in stopped.stderr
        before = stamps(tmp_path / "out" / "a")
        for extra in (["--skip-bad"], []):  # finishes b; then nothing is left to do
            again = tool(built, tmp_path / "out", *command, *extra)
            assert again.returncode == 0, again.stderr
            assert f"out/a: already holds all documents of {files['a']}; nothing is left to do" in again.stderr
        assert "out/b: already holds all documents" in again.stderr
        assert stamps(tmp_path / "out" / "a") == before
        files["b"].write_bytes(good)
    assert documents_in(tmp_path / "out" / "a") == 25 and documents_in(tmp_path / "out" / "b") == 24


def test_shards_below_the_input_are_none_of_it(built: Built, tmp_path: Path) -> None:
    """Neither those of a finished source nor the files of an unfinished one, however they are found."""
    corpus, out = tmp_path / "corpus", tmp_path / "corpus" / "shards"
    corpus.mkdir()
    write_lines(corpus / "a.jsonl", TEXTS)
    (corpus / "b.jsonl").write_text("{\n")
    for pattern in (corpus, corpus / "**" / "*.json*"):
        for _ in range(2):  # the second finds the files of the first, which the bad line stopped
            with pytest.raises(UserError, match=r"b\.jsonl:1: not JSON"):
                build(built, out, pattern)
        (out / "s" / "build").rename(tmp_path / f"{len(str(pattern))}")
    (corpus / "b.jsonl").unlink()
    build(built, out, corpus)
    for _ in range(2):
        write_lines(corpus / "c.jsonl", TEXTS[:7])
        build(built, out, corpus, append=True)
        assert documents_in(out / "s") == 47
    assert list(find_inputs(str(corpus), ReadOptions()).left_out) == ["of a source that a build has made"]
    with pytest.raises(UserError, match=r"1 file left out, of a source that a build has made: .*/shards/s"):
        find_inputs(str(out / "s"), ReadOptions())


def test_an_appended_folder_gives_only_its_new_files(
    built: Built, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crawl = tmp_path / "crawl"
    crawl.mkdir()
    write_lines(crawl / "1.jsonl", TEXTS[:10])
    build(built, tmp_path, crawl)
    write_lines(crawl / "2.jsonl", TEXTS[10:16])
    with pytest.raises(UserError, match=r"does not hold 1 of these 2 input files: .*2\.jsonl.*--append"):
        build(built, tmp_path, crawl)
    with caplog.at_level("INFO", "llama_ds"):
        build(built, tmp_path, crawl, append=True)
    assert "already holds 1 of the 2 input files, which are not added again: " in caplog.text
    assert documents_in(tmp_path / "s") == 16
    after = content(tmp_path / "s")
    (tmp_path / "copy.jsonl").write_bytes((crawl / "2.jsonl").read_bytes())
    for pattern, append in ((crawl, True), (crawl, False), (crawl / "1.jsonl", False), (tmp_path / "copy.jsonl", True)):
        build(built, tmp_path, pattern, append=append)
        assert content(tmp_path / "s") == after
    with pytest.raises(UserError, match="whose 2 input files are not exactly these"):
        build(built, tmp_path, crawl / "2.jsonl")
    with pytest.raises(UserError, match=r"these documents, built with other flags \(document chars 0, now 100\)"):
        build(built, tmp_path, crawl / "2.jsonl", append=True, document_chars=100)
    write_lines(crawl / "2.jsonl", TEXTS[10:18])
    with pytest.raises(UserError, match=r"2\.jsonl: .* holds its first \d+ bytes.*--dedup"):
        build(built, tmp_path, crawl, append=True)
    assert content(tmp_path / "s") == after
    build(built, tmp_path, crawl, append=True, dedup=True)
    assert documents_in(tmp_path / "s") == 18


def test_files_under_other_names_and_changed_files_are_not_added_without_a_word(
    built: Built, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "crawl").mkdir()
    for name in "ab":
        write_lines(tmp_path / "crawl" / f"{name}.jsonl", TEXTS[:10] if name == "a" else TEXTS[10:14])
    build(built, tmp_path, tmp_path / "crawl")
    moved = (tmp_path / "crawl").rename(tmp_path / "moved")
    build(built, tmp_path, moved)
    write_lines(moved / "c.jsonl", TEXTS[20:23])
    with caplog.at_level("INFO", "llama_ds"):
        build(built, tmp_path, moved, append=True)
    assert "already holds 2 of the 3 input files, which are not added again: " in caplog.text
    assert documents_in(tmp_path / "s") == 17
    for name in "abc":  # the same content in another order
        (moved / f"{name}.jsonl").rename(moved / f"{ord('z') - ord(name)}.jsonl")
    build(built, tmp_path, moved)
    (tmp_path / "twice").mkdir()
    for name in "123":
        write_lines(tmp_path / "twice" / f"{name}.jsonl", TEXTS[:10])
    with pytest.raises(UserError, match="whose 3 input files are not exactly these"):
        build(built, tmp_path, tmp_path / "twice")
    write_lines(tmp_path / "d.jsonl", TEXTS[30:32])
    build(built, tmp_path, tmp_path / "d.jsonl", append=True)
    write_lines(tmp_path / "d.jsonl", TEXTS[31:34])
    caplog.clear()
    build(built, tmp_path, tmp_path / "d.jsonl", append=True)
    assert "files that changed since they were added are added as a whole" in caplog.text
    assert documents_in(tmp_path / "s") == 22


def test_a_file_that_was_compressed_after_it_was_added_is_not_added_again(built: Built, tmp_path: Path) -> None:
    """As `gzip crawl/*` leaves it: its name is the only sign of it, as its bytes are others."""
    crawl = tmp_path / "crawl"
    crawl.mkdir()
    write_lines(crawl / "a.jsonl", TEXTS[:10])
    build(built, tmp_path, crawl)
    (crawl / "a.jsonl.gz").write_bytes(gzip.compress((crawl / "a.jsonl").read_bytes()))
    (crawl / "a.jsonl").unlink()
    write_lines(crawl / "b.jsonl", TEXTS[10:12])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: .*/s holds .*a\.jsonl, the same file by its name"):
        build(built, tmp_path, crawl, append=True)
    build(built, tmp_path, crawl, append=True, options=ReadOptions(exclude=("*.gz",)))
    assert documents_in(tmp_path / "s") == 12


def test_a_source_of_an_older_version_is_read_and_appended_to(
    built: Built, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2):
        write_lines(tmp_path / f"{number}.jsonl", TEXTS[10 * number :][:10])
    build(built, tmp_path, tmp_path / "1.jsonl")
    manifest = tmp_path / "s" / "manifest.json"
    raw = json.loads(manifest.read_text())
    del raw["inputs"], raw["splits"]["train"]["extents"][0]["sha256"]
    manifest.write_text(json.dumps(raw))
    (tmp_path / "s" / "index" / "input-0000.gz").unlink()
    with pytest.raises(UserError, match="older version, which recorded no input"):
        build(built, tmp_path, tmp_path / "1.jsonl")
    for _ in range(2):
        build(built, tmp_path, tmp_path / "2.jsonl", append=True)
    assert documents_in(tmp_path / "s") == 20
    assert caplog.text.count("recorded no input; files that it already holds are added again") == 1
    with pytest.raises(UserError, match="older version, which recorded no input"):
        build(built, tmp_path, tmp_path / "2.jsonl")


def test_held_files_are_not_left_out_under_other_flags_without_a_word(
    built: Built, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crawl = tmp_path / "crawl"
    crawl.mkdir()
    write_lines(crawl / "1.jsonl", TEXTS[:10])
    build(built, tmp_path, crawl)
    (crawl / "2.jsonl").write_text("".join(json.dumps({"body": text, "text": "no"}) + "\n" for text in TEXTS[10:16]))
    build(built, tmp_path, crawl, append=True, options=ReadOptions("body"))
    assert f"stay as they were built, with other flags (text field text, now body): {crawl}/1.jsonl" in caplog.text
    assert documents_in(tmp_path / "s") == 16
    caplog.clear()
    write_lines(crawl / "3.jsonl", TEXTS[20:22])
    build(built, tmp_path, crawl, append=True)
    assert f"other flags (text field body, now text): {crawl}/2.jsonl" in caplog.text


def test_an_index_of_ids_is_a_part_of_them(built: Built, tmp_path: Path) -> None:
    """Other limits of the documents in the same ids are another input."""
    tokenizer = Tokenizer(built.tokenizer)
    encoded = [[*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
    path = tmp_path / "a.bin"
    write_megatron(path, encoded, "<u2", 8)
    build(built, tmp_path, path)
    before = content(tmp_path / "s")
    build(built, tmp_path, path)
    assert content(tmp_path / "s") == before
    write_megatron(path, [*encoded[:-2], [*encoded[-2], *encoded[-1]]], "<u2", 8)
    with pytest.raises(UserError, match=r"does not hold 1 of these 1 input files: .*a\.bin"):
        build(built, tmp_path, path)
    with pytest.raises(UserError, match=r"a\.bin: changed since it was added to .*--dedup"):
        build(built, tmp_path, path, append=True)
    write_megatron(path, encoded, "<u2", 8)
    with pytest.raises(UserError, match=r"a\.bin: (changed from|was written to)"):
        build(built, tmp_path / "other", path, progress=lambda *done: append_byte(path.with_suffix(".idx")))


def test_the_files_of_each_source_are_looked_for_once(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless one of them has changed since the beginning, while the sources before were built."""
    searches: list[str] = []

    def counted(pattern: str, options: ReadOptions) -> Inputs:
        searches.append(Path(pattern).stem)
        return find_inputs(pattern, options)

    def build_and_change(name: str, *rest: object, **more: object) -> object:
        manifest = build_source(name, *rest, **more)  # type: ignore[arg-type]
        if name == "a":
            write_lines(tmp_path / "c.jsonl", TEXTS[:3])
        return manifest

    monkeypatch.setattr(found_input, "find_inputs", counted)
    monkeypatch.setattr(shards, "build_source", build_and_change)
    for name in "abc":
        write_lines(tmp_path / f"{name}.jsonl", TEXTS[:5])
    sources = [word for name in "abc" for word in ("--source", f"{name}={tmp_path}/{name}.jsonl")]
    fixed = ("--tokenizer", built.tokenizer, "--seq-len", str(SEQ_LEN), "--validation-fraction", "0", "--workers", "1")
    assert shards.main(["build", *sources, *fixed, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert searches == ["a", "b", "c", "c"]
    assert [documents_in(tmp_path / "out" / name) for name in "abc"] == [5, 5, 3]


def write(path: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=5, compression="none")
    else:
        encode = {".gz": lambda b: gzip.compress(b, 0, mtime=0), ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes("".join(texts).encode() if path.suffix == ".txt" else encode(lines))
    return path


def append_byte(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" ")


def replace_file(path: Path) -> None:
    """Replace the file by one of the same size and mtime."""
    status = path.stat()
    path.with_suffix(".new").write_bytes(path.read_bytes()[::-1])
    os.utime(path.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    path.with_suffix(".new").rename(path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (append_byte, r"changed from \d+ to \d+ bytes"),
        (replace_file, "was written to or replaced"),
        (Path.unlink, "was removed"),
    ],
)
def test_input_that_changes_during_the_build_is_refused(
    built: Built, tmp_path: Path, kind: str, change: Callable[[Path], None], message: str
) -> None:
    path = write(tmp_path / f"a.{kind}", TEXTS)
    with pytest.raises(UserError, match=rf"a\.{kind}: {message}.* while the build read it; .* same command again"):
        build(built, tmp_path, path, progress=lambda *done: change(path) if path.exists() else None)
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_a_file_that_was_touched_is_accepted_and_a_changed_one_is_not(built: Built, tmp_path: Path) -> None:
    """In an unfinished build; the content decides."""
    path = write_lines(tmp_path / "a.jsonl", TEXTS, 150_000)  # six parts
    build(built, tmp_path / "whole", path)
    text, parts = path.read_bytes(), 0

    def stop(*done: int) -> None:
        nonlocal parts
        parts += 1
        if parts == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(built, tmp_path, path, progress=stop)
    path.write_bytes(text.replace(b"39 green", b"39 brown"))  # a line that the build has not read
    with pytest.raises(
        UserError, match=r"a\.jsonl: changed since the unfinished .* \(sha256 (\w{12}), now (?!\1)\w{12}\)"
    ):
        build(built, tmp_path, path)
    path.write_bytes(text)
    build(built, tmp_path, path)
    assert content(tmp_path / "s") == content(tmp_path / "whole" / "s")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"workers": -1}, "workers = -1 is not positive"),
        ({"workers": 0}, "workers = 0 is not positive"),
        ({"document_chars": -1}, "document chars = -1 is negative"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(built: Built, tmp_path: Path, more: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(built, tmp_path, built.prose, **more)
