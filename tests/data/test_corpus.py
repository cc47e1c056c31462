"""A corpus is read completely in a fixed order; files that are not text are reported, none is skipped silently."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ds.data.building.parts import plan_parts
from llama_ds.data.text.corpus import cut_at_lines, documents
from llama_ds.data.text.formats import JSON_LINES, TEXT, FileFormat, ReadOptions
from llama_ds.data.text.gather import gather_local_corpus
from llama_ds.data.text.inputs import TakenFile
from llama_ds.data.text.piece_reader import PieceReader, TextPiece
from llama_ds.errors import UserError


def test_folder_glob_and_file_give_sorted_documents(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"two\r\n")
    (tmp_path / "a.md").write_bytes("\ufeffone".encode())
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "three"}\n\n{"text": ""}\n{"text": "four"}\n')
    (tmp_path / "image.png").write_bytes(b"\0")
    assert [d.text for d in documents(str(tmp_path))] == ["one", "two\r\n", "three", "four"]
    assert [d.text for d in documents(str(tmp_path / "**" / "*.[tj]*"))] == ["two\r\n", "three", "four"]
    assert [d.path for d in documents(str(tmp_path / "sub/c.jsonl"))] == [f"{tmp_path}/sub/c.jsonl:{n}" for n in (1, 4)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "empty file (0 bytes)"),
        ("a.jsonl", b"", "empty file (0 bytes)"),
        ("a.txt", b"PK\x03\x04\0\0", "binary file (NUL byte at offset 4)"),
        ("a.txt", b"caf\xe9 au lait", "invalid UTF-8, byte 0xe9 at offset 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', "invalid UTF-8, byte 0xff at offset 24"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', 'a.jsonl:1: no "text"'),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl:1: character 0 is half of a surrogate pair"),
    ],
)
def test_bad_files_are_reported_with_their_location(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(documents(str(tmp_path)))
    assert str(tmp_path / name) in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


@given(
    texts=st.lists(st.none() | st.text(max_size=20), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 600), max_size=4),
    ends_in_newline=st.booleans(),
)
def test_a_line_belongs_to_the_range_of_bytes_in_which_it_starts(
    texts: list[str | None], cuts: list[int], ends_in_newline: bool
) -> None:
    lines = ["  " if text is None else json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    data = "\n".join(lines).encode() + b"\n" * ends_in_newline
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(data)
        found, before = [], 0
        for start, stop in pairwise([0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]):
            reader = PieceReader(TextPiece(str(path), start, stop))
            for line, text in reader:
                assert reader.where(line) == f"{path}:{before + line}"
                found.append((before + line, text))
            before += reader.lines
        assert found == [(n, text) for n, text in enumerate(texts, 1) if text is not None]


def test_parts_cover_every_byte_once_and_big_lists_are_cut(tmp_path: Path) -> None:
    sizes = {
        "a.jsonl": 3_500_000,
        "b.txt": 100,
        "c.txt": 200,
        "d.txt": 5_000_000,
        "e.txt": 100,
        "f.jsonl.gz": 9_000_000,
    }
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    formats = {".jsonl": FileFormat(JSON_LINES), ".gz": FileFormat(JSON_LINES, "gzip"), ".txt": FileFormat(TEXT)}
    parts = plan_parts([TakenFile(str(tmp_path / n), formats[Path(n).suffix]) for n in sizes], ReadOptions())
    names = [[Path(piece.path).name for piece in part] for part in parts]
    assert names == [["a.jsonl"]] * 3 + [["a.jsonl", "b.txt", "c.txt"], ["d.txt"], ["e.txt"], ["f.jsonl.gz"]]
    ranges = [(piece.start, piece.stop) for part in parts for piece in part if piece.path.endswith(".jsonl")]
    assert ranges[0][0] == 0 and ranges[-1][1] == 3_500_000
    assert all(left[1] == right[0] for left, right in pairwise(ranges))
    assert sum(piece.size for part in parts for piece in part) == sum(sizes.values())


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    for pattern in (tmp_path, tmp_path / "*.txt", tmp_path / "missing.txt"):
        with pytest.raises(UserError, match=str(tmp_path)):
            list(documents(str(pattern)))


def test_long_documents_are_cut_at_lines_without_loss(tmp_path: Path) -> None:
    text = "one\ntwo\n" + "long" * 10 + "\r\nlast"
    assert list(cut_at_lines(text, 8)) == ["one\ntwo\n", "long" * 10 + "\r\n", "last"]
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert "".join(d.text for d in documents(str(tmp_path), max_chars=8)) == text


def test_gathered_corpus_is_the_same_twice_and_shares_no_text(tmp_path: Path) -> None:
    taken: list[int] = []
    first = gather_local_corpus(str(tmp_path / "1"), 1.0, taken.append)
    second = gather_local_corpus(str(tmp_path / "2"), 1.0)
    texts = {name: [d.text for d in documents(path)] for name, path in first.items()}
    assert all(Path(first[name]).read_bytes() == Path(second[name]).read_bytes() for name in ("code", "prose"))
    assert sum(taken) == sum(len(t.encode()) for ts in texts.values() for t in ts) >= 1e6
    every = texts["code"] + texts["prose"]
    assert len(every) == len(set(every)) and min(len(t.encode()) for t in every) >= 200
