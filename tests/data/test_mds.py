"""Datasets that mosaicml-streaming has written give their texts exactly, and damaged ones are refused."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard
from built_sources import SEQ_LEN, Built
from source_files import streams

from llama_ds.data.building.build import build_source
from llama_ds.data.text.corpus import documents
from llama_ds.data.text.formats import ReadOptions
from llama_ds.data.text.inputs import find_inputs
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

TEXTS = [f"text {i}\n\n of several lines é" * (i % 5) for i in range(1, 700)]
ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "str": str.encode,
    "bytes": lambda value: value,
    "int": lambda value: struct.pack("<q", value),
    "json": lambda value: json.dumps(value).encode(),
}
SIZES = {"int": 8}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    "zstd": zstandard.compress,
    "gz": gzip.compress,
    "bz2": bz2.compress,
}


def shard_of(columns: dict[str, str], samples: Sequence[dict[str, Any]], compression: str, hashes: list[str]) -> bytes:
    """Return a shard as MDSWriter's encode_joint_shard lays it out, with its columns in the order of their names."""
    names = sorted(columns)
    sizes = [SIZES.get(columns[name]) for name in names]
    encodings = [columns[name] for name in names]
    config = {"version": 2, "format": "mds", "compression": compression or None, "hashes": hashes,
              "size_limit": 1 << 26, "column_names": names, "column_encodings": encodings,
              "column_sizes": sizes}  # fmt: skip
    text = json.dumps(config, sort_keys=True).encode()
    encoded = []
    for sample in samples:
        values = [ENCODERS[columns[name]](sample[name]) for name in names]
        free = [len(value) for value, size in zip(values, sizes, strict=True) if size is None]
        encoded.append(struct.pack(f"<{len(free)}I", *free) + b"".join(values))
    offsets = [4 + 4 * (len(encoded) + 1) + len(text)]
    for data in encoded:
        offsets.append(offsets[-1] + len(data))
    return struct.pack(f"<I{len(offsets)}I", len(encoded), *offsets) + text + b"".join(encoded)


def write_dataset(
    folder: Path,
    columns: dict[str, str],
    samples: Sequence[dict[str, Any]],
    compression: str = "",
    hashes: Sequence[str] = ("sha1",),
    per_shard: int = 300,
) -> Path:
    """Write the samples as MDSWriter does: shards and index.json."""
    folder.mkdir(parents=True)
    shards = []

    def info(name: str, data: bytes) -> dict[str, Any]:
        digests = {algorithm: hashlib.new(algorithm, data).hexdigest() for algorithm in hashes}
        return {"basename": name, "bytes": len(data), "hashes": digests}

    for number, start in enumerate(range(0, len(samples), per_shard)):
        part = samples[start : start + per_shard]
        raw = shard_of(columns, part, compression, list(hashes))
        stored = COMPRESSIONS[compression](raw)
        name = f"shard.{number:05d}.mds"
        stored_as = f"{name}.{compression}" if compression else name
        (folder / stored_as).write_bytes(stored)
        zipped = info(stored_as, stored) if compression else None
        shards.append({"version": 2, "format": "mds", "samples": len(part), "raw_data": info(name, raw),
                       "zip_data": zipped, "compression": compression or None, "hashes": list(hashes)})  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))
    return folder


def texts(pattern: object, **options: str) -> list[str]:
    return [document.text for document in documents(str(pattern), options=ReadOptions(**options)) if document.text]  # type: ignore[arg-type]


def written(folder: Path, **options: Any) -> Path:
    samples = [{"text": text, "id": i, "zip": b"\0\xff"} for i, text in enumerate(TEXTS)]
    return write_dataset(folder, {"text": "str", "id": "int", "zip": "bytes"}, samples, **options)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_streaming_dataset_gives_its_texts(tmp_path: Path, compression: str) -> None:
    folder = written(tmp_path / "a", compression=compression)
    assert texts(folder) == [text for text in TEXTS if text]
    assert texts(f"{folder}/*") == texts(folder)
    assert find_inputs(f"{folder}/*", ReadOptions()).left_out == {
        "index of a streaming dataset": [f"{folder}/index.json"]
    }


def test_a_build_of_a_streaming_dataset_has_the_ids_of_its_texts(built: Built, tmp_path: Path) -> None:
    lines = [text for text in TEXTS if text]
    write_dataset(tmp_path / "a", {"text": "str"}, [{"text": text} for text in lines], "zstd", per_shard=100)
    build_source("mds", str(tmp_path / "a"), built.tokenizer, str(tmp_path), SEQ_LEN, 0.0)
    (tmp_path / "a.json").write_text(json.dumps(lines))
    build_source("json", str(tmp_path / "a.json"), built.tokenizer, str(tmp_path), SEQ_LEN, 0.0)
    found, wanted = (streams(tmp_path / name, "train")[0] for name in ("mds", "json"))
    assert found.tolist() == wanted.tolist()
    assert Tokenizer(built.tokenizer).decode(found) == "".join(lines)


def test_the_text_is_chosen_as_in_other_tables(tmp_path: Path) -> None:
    columns = {"raw": "bytes", "doc": "json", "id": "int"}
    samples = [{"raw": text.encode(), "doc": {"body": text[::-1], "half": "\ud800"}, "id": 1} for text in TEXTS if text]
    folder = write_dataset(tmp_path / "a", columns, samples)
    wanted = [text for text in TEXTS if text]
    assert texts(folder, text_field="raw") == wanted
    assert texts(folder, text_field="doc.body") == [text[::-1] for text in wanted]
    for field, rule in (
        (
            "text",
            r'no column "text" of texts, only doc \(json\), id \(int\), raw \(bytes\); name one with --text-field',
        ),
        ("id", r'no column "id" of texts'),
        ("raw.body", r'no column "raw\.body" of texts'),
        ("doc.title", r'shard\.00000\.mds:1: no "doc\.title" of type string'),
        ("doc.half", r"shard\.00000\.mds:1: invalid UTF-8"),
    ):
        with pytest.raises(UserError, match=rule):
            texts(folder, text_field=field)


def test_shards_are_those_that_the_index_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = written(tmp_path / "a", compression="zstd")
    wanted = texts(folder)
    raw = shard_of({"text": "str"}, [{"text": "of an earlier run"}], "", [])
    (folder / "shard.00009.mds").write_bytes(raw)
    zipped = folder / "shard.00001.mds.zstd"
    (folder / "shard.00001.mds").write_bytes(zstandard.decompress(zipped.read_bytes()))  # as a reader leaves it
    assert texts(folder) == wanted
    left_out = find_inputs(str(folder), ReadOptions()).left_out
    assert left_out["not listed in index.json"] == [f"{folder}/shard.00009.mds"]
    assert left_out["compressed copy of a file that is read"] == [str(zipped)]
    assert texts(folder / "shard.00009.mds") == ["of an earlier run"]  # named alone, without an index that lists it
    (folder / "shard.00001.mds").unlink()
    zipped.unlink()
    with pytest.raises(UserError, match=r"shard\.00001\.mds\.zstd: missing, though index\.json lists it"):
        texts(folder)


def test_an_index_of_merged_datasets_is_checked_in_their_folders(tmp_path: Path) -> None:
    for name in ("0", "1"):
        written(tmp_path / "a" / name)
    shards = []
    for name in ("0", "1"):
        path = tmp_path / "a" / name / "index.json"
        for shard in json.loads(path.read_text())["shards"]:
            shard["raw_data"]["basename"] = f"{name}/{shard['raw_data']['basename']}"
            shards.append(shard)
        path.unlink()
    (tmp_path / "a" / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    assert texts(tmp_path / "a") == 2 * [text for text in TEXTS if text]
    shard = tmp_path / "a" / "1" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes().replace(b"text 7\n", b"text 8\n"))
    with pytest.raises(UserError, match=r"1/shard\.00000\.mds: damaged MDS file \(its sha1 is not that of index\.json"):
        texts(tmp_path / "a")


@pytest.mark.parametrize("hashes", [("sha1",), ()])
def test_damaged_shards_are_refused_wherever_they_are_damaged(tmp_path: Path, hashes: tuple[str, ...]) -> None:
    folder = written(tmp_path / "a", hashes=hashes)
    path = folder / "shard.00001.mds"
    data = path.read_bytes()
    for bad in (data[:-1], data[:100], data + b"x"):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=rf"damaged MDS file \({len(bad)} bytes, not the {len(data)} of ind"):
            texts(folder)
        with pytest.raises(UserError, match=r"shard\.00001\.mds: damaged MDS file \((cut short|it goes on)"):
            texts(path)
    for offset in (0, 5, 9, 4 + 4 * 301 + 20, data.index(b'"version": 2') + 11):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0x1C]) + data[offset + 1 :])
        with pytest.raises(UserError, match=r"shard\.00001\.mds: (damaged MDS|damaged mds) file"):
            texts(folder)
    first = struct.unpack_from("<I", data, 4)[0]
    path.write_bytes(data[:first] + b"\xff\0\0\0" + data[first + 4 :])  # the size of a value
    with pytest.raises(UserError, match=r"damaged MDS file \(sample 1 has another size than its values"):
        texts(folder)
    path.write_bytes(data)
    (folder / "index.json").write_text((folder / "index.json").read_text()[:-2])
    with pytest.raises(UserError, match=r"index\.json: damaged JSON file \(it lists no shards, but shard\.00000\.mds"):
        texts(folder)
