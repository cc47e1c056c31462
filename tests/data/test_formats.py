"""Formats that other programs write give their documents exactly: Arrow, parquet, separated texts and Megatron ids."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from built_sources import SEQ_LEN, Built
from source_files import index_of, streams, write_megatron

from llama_ds.data.building.build import build_source
from llama_ds.data.building.parts import plan_parts
from llama_ds.data.text.corpus import documents
from llama_ds.data.text.formats import ReadOptions
from llama_ds.data.text.inputs import find_inputs
from llama_ds.data.text.piece_reader import PieceReader
from llama_ds.data.text.reading_options import add_reading_options, reading_options
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

TEXTS = [f"text {i}\n\n of several lines é" for i in range(40)]


def texts(pattern: object, **options: str) -> list[str]:
    return [document.text for document in documents(str(pattern), options=ReadOptions(**options))]  # type: ignore[arg-type]


def write_stream(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, 7)


def save_to_disk(folder: Path, shards: int = 2) -> Path:
    """Write TEXTS as datasets' save_to_disk does: its files, their names and the keys of their JSON."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        part = TEXTS[len(TEXTS) * i // shards : len(TEXTS) * (i + 1) // shards]
        write_stream(folder / name, pa.table({"text": part, "id": range(len(part))}))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": None}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    features = {"text": {"dtype": "string", "_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps({"description": "", "features": features}))
    return folder


def test_a_dataset_saved_to_disk_is_read_and_checked(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "train")
    assert texts(folder) == TEXTS
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert texts(tmp_path) == TEXTS
    write_stream(folder / "data-00000-of-00001.arrow", pa.table({"text": ["of an earlier save"]}))
    assert texts(folder) == TEXTS
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"splits train, test, which a source must not mix; .*/train"):
        texts(tmp_path)
    data = (folder / "data-00001-of-00002.arrow").read_bytes()
    for cut in (data[:-8], data[: len(data) // 2]):
        (folder / "data-00001-of-00002.arrow").write_bytes(cut)
        with pytest.raises(UserError, match=r"damaged Arrow stream file \(cut short"):
            texts(folder)
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow: missing, though state\.json lists it"):
        texts(folder)


def test_columns_of_many_types_are_texts(tmp_path: Path) -> None:
    for number, kind in enumerate(
        (pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()))
    ):
        values = [text.encode() for text in TEXTS] if kind == pa.binary() else TEXTS
        table = pa.table({"text": pa.array(values, kind)})
        pq.write_table(table, tmp_path / f"{number}.parquet")
        feather.write_feather(table, str(tmp_path / f"{number}.feather"))
        assert texts(tmp_path / f"{number}.parquet") == TEXTS == texts(tmp_path / f"{number}.feather")
    bad = pa.table({"text": pa.array([b"one", b"\xff", b"three"])})
    pq.write_table(bad.cast(pa.schema({"text": pa.binary()})), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"bad\.parquet:2: invalid UTF-8, byte 0xff"):
        texts(tmp_path / "bad.parquet")


def test_of_columns_with_one_name_none_is_guessed(tmp_path: Path) -> None:
    """As in JSON, the column "a.b" comes before field b of column a; two columns of the same name are refused."""
    nested = pa.array([{"b": "no"}] * len(TEXTS))
    for number, names in enumerate((["a.b", "a"], ["a", "a.b"])):
        columns = {"a": nested, "a.b": pa.array(TEXTS)}
        table = pa.table({name: columns[name] for name in names})
        pq.write_table(table, tmp_path / f"{number}.parquet")
        write_stream(tmp_path / f"{number}.arrow", table)
        for suffix in ("parquet", "arrow"):
            assert texts(tmp_path / f"{number}.{suffix}", text_field="a.b") == TEXTS
    twice = pa.table([pa.array(TEXTS), pa.array(TEXTS)], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    write_stream(tmp_path / "twice.arrow", twice)
    for suffix in ("parquet", "arrow"):
        with pytest.raises(UserError, match=rf'twice\.{suffix}: several columns "text"'):
            texts(tmp_path / f"twice.{suffix}")


def test_nested_columns_are_named_with_dots(tmp_path: Path) -> None:
    table = pa.table({"doc": [{"body": text, "n": 1} for text in TEXTS], "a.b": TEXTS[::-1], "n": range(len(TEXTS))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    write_stream(tmp_path / "a.arrow", table)
    for name in ("a.parquet", "a.arrow"):
        assert texts(tmp_path / name, text_field="doc.body") == TEXTS
        assert texts(tmp_path / name, text_field="a.b") == TEXTS[::-1]
        with pytest.raises(UserError, match=r'no column "text", only doc\.body, doc\.n, a\.b, n; name one with --text'):
            texts(tmp_path / name)


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n<|endoftext|>\n", "\n\n\n", "é"])
def test_separated_texts_are_the_same_from_any_piece(tmp_path: Path, separator: str) -> None:
    """Files are divided where that changes nothing; documents of blanks are none."""
    parts = [f"{i} " * (i % 7000) + "\u00fc" for i in range(1500)]
    (tmp_path / "a.txt").write_text("\ufeff" + separator.join([*parts, " \n", ""]), encoding="utf-8")
    options = ReadOptions(separator=separator)
    assert texts(tmp_path / "a.txt", separator=separator) == parts
    pieces = [piece for part in plan_parts(find_inputs(str(tmp_path), options).files, options) for piece in part]
    assert len(pieces) == (1 if separator.startswith("\n") else 5)  # the others cannot overlap themselves
    found, before = [], 0
    for piece in pieces:
        reader = PieceReader(piece, options=options)
        for line, text in reader:
            found.append(text)
            if line == 1:
                assert reader.where(line) == f"{tmp_path}/a.txt:{before + 1}"
        before += reader.lines
    assert found == parts


def test_separators_are_written_with_escapes() -> None:
    parser = argparse.ArgumentParser()
    add_reading_options(parser)
    options = reading_options(parser.parse_args(["--separator", r"\n<|endoftext|>\t\\n", "--text-field=a.b"]))
    assert options == ReadOptions("a.b", "\n<|endoftext|>\t\\n")
    with pytest.raises(UserError, match=r"--separator '\\x': \\x is not \\n, \\t"):
        reading_options(parser.parse_args(["--separator", r"\x"]))


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4)])
def test_megatron_ids_are_imported(built: Built, tmp_path: Path, dtype: str, code: int) -> None:
    tokenizer = Tokenizer(built.tokenizer)
    encoded = [tokenizer.encode(text) for text in TEXTS]
    (tmp_path / "data").mkdir()
    write_megatron(tmp_path / "data" / "a.bin", [[*ids, tokenizer.eos_id] for ids in encoded], dtype, code)
    build_source("ids", str(tmp_path / "data"), built.tokenizer, str(tmp_path), SEQ_LEN, 0.2)
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    build_source("texts", str(tmp_path / "a.json"), built.tokenizer, str(tmp_path), SEQ_LEN, 0.2)
    for split in ("train", "validation"):
        assert streams(tmp_path / "ids", split)[0].tolist() == streams(tmp_path / "texts", split)[0].tolist()
        ids, others = index_of(tmp_path / "ids", split, 0), index_of(tmp_path / "texts", split, 0)
        assert [d.digest for d in ids] == [d.digest for d in others]
        assert [d.place.rpartition(":")[2] for d in ids] == [d.place.rpartition(":")[2] for d in others]


def test_megatron_ids_of_another_vocabulary_are_refused(built: Built, tmp_path: Path) -> None:
    tokenizer = Tokenizer(built.tokenizer)
    encoded = [tokenizer.encode(text) for text in TEXTS]
    path = tmp_path / "a.bin"

    def error(skip_bad: bool = False) -> str:
        with pytest.raises(UserError) as found:
            build_source(
                "s", str(path), built.tokenizer, str(tmp_path), SEQ_LEN, 0.0, skip_bad=skip_bad, overwrite=True
            )
        return str(found.value)

    write_megatron(path, [[(i + 7) % 250 + 3 for i in ids] for ids in encoded], "<u2", 8)
    assert "a.bin: its ids are not of the tokenizer" in error(skip_bad=True)
    write_megatron(path, [*encoded, [tokenizer.vocab_size]], "<u2", 8)
    assert f"a.bin:41: its ids are not of the tokenizer {built.tokenizer} (id 600 is outside 0 to 599)" in error(True)
    write_megatron(path, [*encoded, [5, tokenizer.eos_id, 5]], "<u2", 8)
    assert "a.bin:41: bos or eos within a document; leave such documents out with --skip-bad" in error()
    path.write_bytes(path.read_bytes()[:-2])
    assert "a.bin: damaged Megatron ids file" in error()
    path.with_suffix(".idx").write_bytes(path.with_suffix(".idx").read_bytes()[:-1])
    assert "a.idx: damaged Megatron ids file" in error()
    with pytest.raises(UserError, match=r"a\.bin: holds ids, not text"):
        texts(path)
