"""Which files a source takes: none is dropped silently, and what looks like data but cannot be read is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from llama_ds.data.text.corpus import documents
from llama_ds.data.text.formats import JSON_LINES, FileFormat, ReadOptions
from llama_ds.data.text.inputs import find_inputs
from llama_ds.data.text.piece_reader import PieceReader, TextPiece
from llama_ds.errors import UserError

TEXTS = ["one", "two\n", "drei \U0001f600"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
ARRAY = json.dumps([{"id": i, "text": text} for i, text in enumerate(TEXTS)], indent=1).encode()


def texts(pattern: object, options: ReadOptions | None = None) -> list[str]:
    return [document.text for document in documents(str(pattern), options=options)]


def left_out(folder: Path, options: ReadOptions | None = None) -> dict[str, list[str]]:
    """Return the names of the files that a folder's source leaves out, by reason."""
    found = find_inputs(str(folder), options or ReadOptions()).left_out
    return {reason: sorted(str(Path(path).relative_to(folder)) for path in paths) for reason, paths in found.items()}


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.json", "x.txt", "x", "part-00000", "x.log"])
@pytest.mark.parametrize("content", [LINES, b"\xef\xbb\xbf" + LINES, LINES.replace(b"\n", b"\r\n"), ARRAY])
def test_json_is_recognised_by_content(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == TEXTS == texts(tmp_path)


@pytest.mark.parametrize("suffix", ["gz", "zst", "xz", "bz2"])
def test_compressions_are_recognised_by_content_and_read_to_the_end_of_the_last_stream(
    tmp_path: Path, suffix: str
) -> None:
    pack = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress, "bz2": bz2.compress}[suffix]
    for content in (LINES, ARRAY):
        for name in (f"a.json.{suffix}", f"a.{suffix}", "a.json", "a"):
            (tmp_path / name).write_bytes(pack(content[:30]) + pack(content[30:]))
            assert texts(tmp_path / name) == TEXTS
    (tmp_path / f"story.txt.{suffix}").write_bytes(pack(b"a story"))
    assert texts(tmp_path) == [*TEXTS * 2, "a story"]
    assert left_out(tmp_path) == {
        "a compressed copy of a file that is read": sorted([f"a.{suffix}", f"a.json.{suffix}"])
    }
    for cut in (pack(LINES)[:-1], pack(LINES) + pack(LINES)[:-3], pack(LINES) + b"not a stream"):
        (tmp_path / f"cut.{suffix}").write_bytes(cut)
        with pytest.raises(UserError, match=rf"cut\.{suffix}: damaged (gzip|zstd|xz|bzip2) file"):
            texts(tmp_path / f"cut.{suffix}")


def test_a_zstd_window_above_the_default_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # its size is unknown
    (tmp_path / "a.jsonl.zst").write_bytes(frame.compress(LINES) + frame.flush())
    assert texts(tmp_path) == TEXTS


def test_a_folder_takes_texts_and_lists_and_names_the_rest(tmp_path: Path) -> None:
    hive = tmp_path / "lang=en" / "year=2020"
    hive.mkdir(parents=True)
    (hive / "part-00000-c000.json.gz").write_bytes(gzip.compress(LINES))
    (hive / ".part-00000-c000.json.gz.crc").write_bytes(b"crc\0")
    (tmp_path / "part-00001").write_bytes(b"a text without suffix")
    (tmp_path / "_SUCCESS").write_bytes(b"")
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "__init__.py").write_bytes(b'{"a": 1}')
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "Makefile").write_bytes(b"all:\n")
    (tmp_path / "nothing").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    assert texts(tmp_path) == ['{"a": 1}', *TEXTS, "a text without suffix"]
    assert left_out(tmp_path) == {
        "hidden or a marker": ["_SUCCESS", "_temporary", "lang=en/year=2020/.part-00000-c000.json.gz.crc"],
        "not text": ["image.png"],
        "suffix missing, which folders are not searched for": ["Makefile"],
        "empty, and no suffix of a text": ["nothing"],
        "not a regular file": ["pipe"],
    }
    assert texts(tmp_path / "*=*") == TEXTS  # a folder that matches a glob is read as one
    assert left_out(tmp_path, ReadOptions(exclude=("lang=*", "*.py")))["named by --exclude"] == [
        "__init__.py",
        "lang=en",
    ]


def test_links_are_followed_once(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere"
    (real / "deep").mkdir(parents=True)
    (real / "deep" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "data").symlink_to(real)
    (real / "deep" / "up").symlink_to(tmp_path / "source")
    assert texts(tmp_path / "source") == TEXTS
    assert left_out(tmp_path / "source") == {"a link to a folder that is read under another name": ["data/deep/up"]}
    (tmp_path / "source" / "b.jsonl").symlink_to(tmp_path / "missing")
    with pytest.raises(UserError, match=r"source/b\.jsonl: cannot be read \(No such file or directory\)"):
        texts(tmp_path / "source")


def test_a_file_and_links_to_it_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "5f").write_bytes(LINES)
    for revision in ("1", "2"):  # as the cache of the Hugging Face hub keeps data sets
        (tmp_path / "snapshots" / revision).mkdir(parents=True)
        (tmp_path / "snapshots" / revision / "a.jsonl").symlink_to("../../blobs/5f")
    (tmp_path / "blobs" / "6.jsonl").hardlink_to(tmp_path / "blobs" / "5f")
    names = ["blobs/6.jsonl", "snapshots/1/a.jsonl", "snapshots/2/a.jsonl"]
    assert texts(tmp_path) == TEXTS
    assert left_out(tmp_path) == {"a link to a file that is read under another name": names}
    assert texts(tmp_path / "snapshots" / "*" / "*.jsonl") == TEXTS
    assert texts(tmp_path / names[1]) == TEXTS


def test_a_compressed_copy_is_left_out_and_another_file_of_its_name_is_not(tmp_path: Path) -> None:
    """As `gzip -k` leaves it; a dump in XML is not taken either, because of a folder it would not be uncompressed."""
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINES + LINES))
    (tmp_path / "dump.xml.gz").write_bytes(gzip.compress(b"<page>"))
    assert texts(tmp_path) == TEXTS * 3
    assert left_out(tmp_path) == {
        "a compressed copy of a file that is read": ["a.jsonl.gz"],
        "suffix .xml, which folders are not searched for": ["dump.xml.gz"],
    }


@pytest.mark.parametrize("end", [b"\r", b"", b" "])
def test_json_values_are_recognised_whatever_stands_between_them(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(LINES.replace(b"\n", end))
    assert texts(tmp_path / "a.txt") == TEXTS


def test_files_that_match_a_glob_are_taken_whatever_their_suffix(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for path in (tmp_path / "a.foo", tmp_path / "deep" / "b.foo", tmp_path / "deep" / "er" / "c"):
        path.write_bytes(path.stem.encode())
    with pytest.raises(UserError, match=r"name others with a glob, such as '.*/\*\*/\*'"):
        texts(tmp_path)
    assert texts(tmp_path / "**" / "*") == ["a", "b", "c"]


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "closed").mkdir(parents=True)
    (tmp_path / "a" / "a.jsonl").write_bytes(LINES)
    listdir, access = os.listdir, os.access  # replaced, because permissions do not stop root

    def refusing(path: str) -> list[str]:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path) and access(path, mode))
    for pattern in (tmp_path, tmp_path / "**" / "*.jsonl", tmp_path / "a" / "*" / "*.jsonl"):
        with pytest.raises(UserError, match=r"/a/closed/?: cannot be read \(Permission denied\)"):
            texts(pattern)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,id\nx,1\n", r"\.csv files are not read; write the texts as JSON lines"),
        ("a.tar.gz", gzip.compress(b"x" * 512), r"\.tar files are not read; unpack the archive"),
        ("a.warc.gz", gzip.compress(b"WARC/1.0\r\n"), r"\.warc files are not read"),
        ("a.zip", b"PK\3\4", r"\.zip files are not read"),
        ("a.parquet", LINES, "damaged parquet file"),
        ("a.parquet.gz", gzip.compress(b"PAR1\0\0"), "parquet data within gzip"),
        ("a.gz", gzip.compress(b"\0binary"), "binary data within gzip"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(LINES)), "gzip data within gzip; unpack the file once"),
        ("a.txt", b"\xef\xbb\xbf", "empty file .3 bytes."),
        ("a.jsonl.zst", LINES, "damaged zstd file .its content is not compressed"),
        ("package.json", b'{\n "name": "x"\n}', 'package.json:1: no "text" of type string; .* --text-field, of name'),
        ("notebook.ipynb", b'{\n "cells": []\n}', 'notebook.ipynb:1: no "text" of type string'),
        ("a.json", ARRAY[:-2], "damaged JSON file .after item 2, cut short"),
        ("a.json", ARRAY.replace(b"drei", b"dr\nei"), "damaged JSON file .after item 2, a line ends within a string"),
        ("a.json", ARRAY.replace(b'"id": 1', b'"id": x'), "a.json:2: not JSON"),
        ("a.jsonl", LINES + b'{"a":' * 5000 + b"1" + b"}" * 5000, r"a\.jsonl:4: not JSON \(.* nested too deeply"),
        ("a", b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"\n", r"a:1: not JSON \(.* nested too deeply"),  # not one text
        ("a.json", ARRAY[:-2] + b"," + b"[" * 5000 + b"]" * 5001, r"a\.json:4: not JSON \(.* nested too deeply"),
        ("a.txt", "caf\u00e9".encode("utf-16"), "UTF-16 text; convert the file to UTF-8"),
        ("a.txt", "caf\u00e9".encode("utf-32"), "UTF-32 text; convert the file to UTF-8"),
        (
            "a.py",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
            "in place of .* with git lfs pull",
        ),
        (
            "a.parquet",
            b"/annex/objects/SHA256E-s9--4d.parquet\n",
            "a pointer in place of the file, .* with git annex get",
        ),
        ("a.idx", b"MMIDIDX\0\0" + bytes(40), "an index of Megatron ids without .*a.bin; copy that too"),
    ],
)
def test_what_looks_like_data_but_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / "good.jsonl").write_bytes(LINES)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        texts(tmp_path)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert texts(tmp_path, ReadOptions(exclude=(name,))) == TEXTS


def test_backups_and_files_in_progress_are_left_out_of_folders(tmp_path: Path) -> None:
    """They repeat a file that is read, or its beginning."""
    (tmp_path / "a.jsonl").write_bytes(LINES)
    names = ["#a.jsonl#", "a.jsonl.bak", "a.jsonl.crdownload", "a.jsonl.tmp", "a.jsonl~"]
    for name in names:
        (tmp_path / name).write_bytes(LINES)
    assert texts(tmp_path) == TEXTS
    assert left_out(tmp_path) == {"a backup or an unfinished file by its name": names}
    assert texts(tmp_path / "a.jsonl~") == TEXTS == texts(f"{tmp_path}/*.bak")  # as the user asks for it


def test_odd_json_is_read(tmp_path: Path) -> None:
    """Long numbers, marks where files were joined, values that span lines, nested fields and names with dots."""
    number = "7" * 5000
    lines = [f'{{"n": {number}, "text": "one"}}', f'\ufeff{{"text": "two", "n": -{number}.0e1}}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert texts(tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "mark.jsonl").write_text("\ufeff\n")
    assert texts(tmp_path / "mark.jsonl") == []
    (tmp_path / "b.json").write_text('{\n"text": "}{\\"[\\\\"}{"text":"two",\n"x": [{}, [1]]}')
    assert texts(tmp_path / "b.json") == ['}{"[\\', "two"]
    (tmp_path / "c.json").write_text('["one", "two"]')
    assert texts(tmp_path / "c.json") == ["one", "two"]
    (tmp_path / "d.jsonl").write_text(
        '{"a": {"b": "one"}}\n{"a.b": "two", "a": {"b": "no"}}\n{"a": {"b.c": {"d": "x"}}}'
    )
    nested = documents(str(tmp_path / "d.jsonl"), options=ReadOptions(text_field="a.b"))
    assert [next(nested).text, next(nested).text] == ["one", "two"]
    with pytest.raises(UserError, match=r'd\.jsonl:3: no "a\.b" of type string; .* --text-field, of a\.b\.c\.d'):
        next(nested)


BEGINNINGS = (
    '{"text": "',
    '{"t": 1, "text": "',
    '{"text": "first", "text": "',
    '{"x": {"text": "no"}, "text": "',
    '{"t": "',
)
INSIDE = (
    *("a", "é", "\U0001f600", "\ufeff", "\x7f", "\x00", "\t", "\\n", "\\u00e9", "\\ud83d\\ude00", "\\ud800"),
    *("\\udc00", "\\u0000", "\\/", "\\x", '\\"', "{", "\xa0"),
)
ENDS = (
    *(
        '"}',
        '", "n": 1e999}',
        '", "n": NaN}',
        '", "n": -0}',
        '", "n": 01}',
        '", "s": "\\ud800"}',
        '", "l": [[]]} ',
        '"',
    ),
    *('", "n": ' + "9" * 5000 + "}", '", "l": ' + "[" * 1010 + "]" * 1010 + "}", '"} x', '",}', '", "text": null}'),
)


@given(
    st.sampled_from(BEGINNINGS),
    st.lists(st.sampled_from(INSIDE), max_size=3),
    st.sampled_from([b"", b"", b"", b"\xff", b"\xed\xa0\x80"]),
    st.sampled_from(ENDS),
)
def test_the_fast_parser_gives_the_texts_of_the_exact_one(begin: str, inside: list[str], raw: bytes, end: str) -> None:
    """orjson reads most lines; json decides about those that it refuses, and orjson never about what json refuses."""
    line = "".join([begin, *inside]).encode() + raw + end.encode()
    exact = PieceReader(TextPiece("x", format=FileFormat(JSON_LINES)))
    exact._quick_text_of = lambda data: None  # type: ignore[method-assign]
    found = []
    for reader in (exact, PieceReader(TextPiece("x", format=FileFormat(JSON_LINES)))):
        try:
            found.append(list(reader._json([(0, line)])))
        except UserError as error:
            found.append(str(error))
    assert found[0] == found[1] or "nested too deeply" in found[0]  # orjson reads a few levels more


def test_a_nested_record_without_a_text_is_named_at_any_depth(tmp_path: Path) -> None:
    """Whatever the JSON parser still reads, however close to Python's limit on recursion."""
    for depth in range(850, 1000):
        (tmp_path / "a.jsonl").write_text('{"a":' * depth + '"x"' + "}" * depth)
        with pytest.raises(UserError, match=r"a\.jsonl:1: (no \"text\"|not JSON \(.* nested too deeply)"):
            list(PieceReader(TextPiece(str(tmp_path / "a.jsonl"))))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", '{"_data_files": 7}'),
        ("state.json", '{"_data_files": [{"file": "a"}]}'),
        ("dataset_dict.json", '{"splits": [null, 1]}'),
    ],
)
def test_damaged_metadata_of_a_saved_dataset_are_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(it lists no names\); copy the dataset again"):
        texts(tmp_path)


def test_files_named_as_text_are_one_document(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": 1}\n')
    (tmp_path / "table.csv").write_bytes(b"a,b\n")
    for pattern in (tmp_path, tmp_path / "*"):
        assert texts(pattern, ReadOptions(as_text=("*.json", "table.csv"))) == ['{"a": 1}\n', "a,b\n"]


@pytest.mark.slow
def test_arrays_and_compressed_files_are_read_as_they_are_needed(tmp_path: Path) -> None:
    """The first document is there after a small part of the file, whose rest is not in memory."""
    noise = random.Random(0)
    records = [{"text": noise.randbytes(5000).hex()} for _ in range(400)]
    array, rows = json.dumps(records).encode(), b"".join(json.dumps(r).encode() + b"\n" for r in records)
    for name, content in (("a.json", array), ("a.json.gz", gzip.compress(array)), ("b.gz", gzip.compress(rows)),
                          ("a.json.zst", zstandard.compress(array)), ("b.zst", zstandard.compress(rows)),
                          ("a.json.xz", lzma.compress(array)), ("b.bz2", bz2.compress(rows))):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        reader = PieceReader(TextPiece(str(tmp_path / name)))
        assert next(iter(reader)) == (1, records[0]["text"])
        assert reader.share <= 0.5


def test_mixed_splits_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train.00000-of-00002", "train.00001-of-00002", "validation.00000-of-00001"):
        (tmp_path / f"c4-{name}.json.gz").write_bytes(gzip.compress(LINES))
    for pattern, mixed in ((tmp_path, True), (tmp_path / "*train*", False)):
        caplog.clear()
        with caplog.at_level("INFO", "llama_ds"):
            find_inputs(str(pattern), ReadOptions()).report()
        assert f"{pattern}: {3 if mixed else 2} files taken" in caplog.text
        assert ("mixes the splits train (2 files), validation (1 file)" in caplog.text) == mixed


def test_home_is_expanded_in_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/a.jsonl") == texts("~/*.jsonl") == texts("~") == TEXTS
