"""Shards are plain webdataset tars, rows are read exactly, and damage is found before training reads it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from built_sources import SEQ_LEN, VOCAB_SIZE, Built
from hypothesis import given
from hypothesis import strategies as st

from llama_ds.data.building.packing import pack
from llama_ds.data.filler import count_labels as count_row_labels
from llama_ds.data.filler import mark_filler, plain_ids
from llama_ds.data.source import tar_rows
from llama_ds.data.source.manifest import (
    CHECKSUM_BLOCK,
    Extent,
    Manifest,
    Split,
    check_tokenizer,
    checksum_blocks,
    checksum_of,
    checksums_name,
    parse_manifest,
    rows_of,
    write_manifest,
)
from llama_ds.data.source.shards import OPEN_SHARDS, Source, check_present, open_source, read_manifest
from llama_ds.data.source.store import BadFile, open_store
from llama_ds.data.source.verify import repair, verify_source
from llama_ds.data.text.tokenizer import Tokenizer, train_tokenizer
from llama_ds.data.unigram import count_labels, mixture_counts, unigram_loss
from llama_ds.errors import UserError


@pytest.mark.parametrize("name", ["code", "prose"])
def test_webdataset_and_tarfile_read_the_same_rows(built: Built, name: str) -> None:
    import webdataset

    folder = built.shards / name
    source = open_source(str(folder), "train")
    assert source.geometry.shards > 1
    urls = sorted(str(path) for path in folder.glob("train-*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"{i:010d}" for i in range(source.rows)]
    rows = source.read(np.arange(source.rows))
    for sample, row in zip(samples, rows, strict=True):
        assert np.frombuffer(sample["ids.u16"], "<u2").tolist() == row.tolist()
    with tarfile.open(urls[0]) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [f"{i:010d}.ids.u16" for i in source.geometry.shard_rows(0)]
        assert tar.extractfile(members[3]).read() == rows[3].tobytes()  # type: ignore[union-attr]


@given(
    rows=st.integers(1, 30),
    first=st.integers(0, 10**10 - 31),
    seq_len=st.integers(1, 700),
    dtype=st.sampled_from(["<u2", "<u4"]),
)
def test_members_are_what_tarfile_reads(rows: int, first: int, seq_len: int, dtype: str) -> None:
    import io

    ids = np.random.default_rng(rows).integers(0, 60000, (rows, seq_len + 1)).astype(dtype)
    members = tar_rows.members(first, ids)
    assert tar_rows.first_damage(members, first, seq_len, ids.dtype) is None
    content = members.tobytes().ljust(tar_rows.shard_bytes(rows, seq_len, ids.dtype), b"\0")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for i, member in enumerate(tar):
            assert member.name == f"{first + i:010d}.{tar_rows.extension(ids.dtype)}"
            assert tar.extractfile(member).read() == ids[i].tobytes()  # type: ignore[union-attr]
    assert np.array_equal(tar_rows.rows_of(members, seq_len, ids.dtype), ids)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 9))
def test_rows_and_shards_are_numbered_through_all_extents(sizes: list[int], rows_per_shard: int) -> None:
    split = Split(rows_per_shard, tuple(Extent(rows, 1, 1) for rows in sizes))
    ranges = [split.shard_rows(shard) for shard in range(split.shards)]
    assert [row for rows in ranges for row in rows] == list(range(split.rows))
    shards, shard_rows = split.locate(np.arange(split.rows))
    for row, (shard, shard_row) in enumerate(zip(shards.tolist(), shard_rows.tolist(), strict=True)):
        assert ranges[shard][shard_row] == row
    with pytest.raises(IndexError):
        split.shard_rows(split.shards)


@given(
    sizes=st.lists(st.integers(2, 60), min_size=1, max_size=4),
    seq_len=st.integers(1, 9),
    rows_per_shard=st.integers(1, 5),
)
def test_filler_is_known_from_the_manifest(sizes: list[int], seq_len: int, rows_per_shard: int) -> None:
    """Every id is a label once, except the first of each extent; nothing else is a label."""
    split = Split(rows_per_shard, tuple(Extent(rows_of(ids, seq_len), 1, ids) for ids in sizes))
    packed = [rows.copy() for ids in sizes for rows in pack([np.arange(ids)], seq_len, np.dtype("<u4"), 99, 3)]
    plain = np.concatenate(packed).astype(np.int64)
    marked = plain.copy()
    mark_filler(marked, split.labels(np.arange(split.rows), seq_len))
    labels = marked[:, 1:]
    assert (labels[labels < 0] == ~99).all() and np.array_equal(plain_ids(marked), plain)
    assert labels[labels >= 0].tolist() == [i for ids in sizes for i in range(1, ids)]
    assert count_row_labels(marked) == sum(sizes) - len(sizes)
    assert split.filler(seq_len) == (labels < 0).sum()


def test_checksums_are_found_by_offset_and_read_by_sha256sum(built: Built) -> None:
    digests = [f"{i:064x}" for i in range(2 * CHECKSUM_BLOCK + 5)]
    blocks = {name: text.encode() for name, text in checksum_blocks("train", digests)}
    assert len(blocks) == 3
    for i in (0, 1, CHECKSUM_BLOCK - 1, CHECKSUM_BLOCK, 2 * CHECKSUM_BLOCK + 4):
        assert checksum_of(blocks[checksums_name("train", i)], "train", i) == digests[i]
    assert checksum_of(blocks[checksums_name("train", 2048)], "train", 2 * CHECKSUM_BLOCK + 5) is None
    assert checksum_of(b"not a list of checksums", "train", 0) is None
    done = subprocess.run(["sha256sum", "-c", "index/train-0000.sha256"], cwd=built.shards / "code", check=True)
    assert done.returncode == 0


def test_any_rows_in_any_order(built: Built) -> None:
    source = open_source(str(built.shards / "prose"), "train")
    every = np.concatenate(list(source.blocks()))
    assert every.shape == (source.rows, SEQ_LEN + 1)
    chosen = np.random.default_rng(0).integers(0, source.rows, 500)
    assert np.array_equal(source.read(chosen), every[chosen])
    assert source.read(np.empty(0, np.int64)).shape == (0, SEQ_LEN + 1)
    for outside in (-1, source.rows):
        with pytest.raises(IndexError):
            source.row(outside)


def test_few_files_stay_open(built: Built, tmp_path: Path) -> None:
    rows = np.arange(3 * OPEN_SHARDS * (SEQ_LEN + 1), dtype="<u2").reshape(-1, SEQ_LEN + 1) % VOCAB_SIZE
    folder = source_of_one_row_shards(built, tmp_path, rows)
    source = open_source(str(folder), "train")
    before = len(os.listdir("/proc/self/fd"))
    assert np.array_equal(source.read(np.arange(len(rows))), rows)
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_SHARDS
    del source
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before, "each stage of a run opens its sources anew"


def source_of_one_row_shards(built: Built, folder: Path, rows: np.ndarray) -> Path:
    import hashlib

    (folder / "index").mkdir()
    digests = []
    for i, row in enumerate(rows):
        content = tar_rows.members(i, row[None]).tobytes().ljust(tar_rows.shard_bytes(1, SEQ_LEN, row.dtype), b"\0")
        (folder / f"train-{i:06d}.tar").write_bytes(content)
        digests.append(hashlib.sha256(content).hexdigest())
    for name, text in checksum_blocks("train", digests):
        (folder / name).write_text(text)
    old = read_manifest(open_store(str(built.shards / "prose")))
    splits = {"train": Split(1, (Extent(len(rows), 1, len(rows) * SEQ_LEN + 1),)), "validation": Split(1, ())}
    write_manifest(str(folder), Manifest("rows", SEQ_LEN, VOCAB_SIZE, "<u2", old.tokenizer_sha256, 0.0, splits))
    return folder


def test_opening_does_not_read_shards(built: Built, tmp_path: Path) -> None:
    """100,000 shards open as fast as ten, from the manifest alone; here no shard file exists."""
    old = read_manifest(open_store(str(built.shards / "prose")))
    splits = {"train": Split(1000, (Extent(10**8 - 1, 1, (10**8 - 1) * SEQ_LEN + 1),)), "validation": Split(1000, ())}
    write_manifest(str(tmp_path), Manifest("big", SEQ_LEN, VOCAB_SIZE, "<u2", old.tokenizer_sha256, 0.0, splits))
    assert (tmp_path / "manifest.json").stat().st_size < 2000
    source = open_source(str(tmp_path), "train")
    assert source.geometry.shards == 100_000 and source.geometry.shard_rows(99_999) == range(99_999_000, 10**8 - 1)
    with pytest.raises(BadFile, match=r"train-0097\.sha256"):
        source.check(99_999)


def copy(built: Built, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built.shards / "prose", tmp_path / "prose"))


def test_a_missing_shard_is_named(built: Built, tmp_path: Path) -> None:
    folder = copy(built, tmp_path)
    source = open_source(str(folder), "train")
    check_present(source)
    (folder / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar: the shard is missing, its manifest names \d+; copy"):
        check_present(source)
    store = open_store(str(folder))
    repair(store, verify_source(store))
    check_present(open_source(str(folder), "train"))


def test_damage_is_found_when_a_shard_is_first_used(built: Built, tmp_path: Path) -> None:
    folder = copy(built, tmp_path)
    shard = folder / "train-000001.tar"
    intact = shard.read_bytes()

    def reason(content: bytes) -> str:
        shard.write_bytes(content)
        with pytest.raises(BadFile) as error:
            open_source(str(folder), "train").check(1)
        assert str(shard) in str(error.value)
        return str(error.value)

    assert f"{len(intact) - 1} bytes, not the {len(intact)}" in reason(intact[:-1])
    assert f"{len(intact) + 9} bytes, not the {len(intact)}" in reason(intact + b"\0" * 9)
    assert "sha256" in reason(intact[:600] + bytes([intact[600] ^ 1]) + intact[601:])
    assert "sha256" in reason(bytes(len(intact)))
    shard.unlink()
    with pytest.raises(BadFile, match="No such file"):
        open_source(str(folder), "train").check(1)


def test_verify_finds_every_kind_of_damage_and_repair_lists_it(built: Built, tmp_path: Path) -> None:
    folder = copy(built, tmp_path)
    shards = [folder / f"train-{i:06d}.tar" for i in range(6)]
    intact = {shard: shard.read_bytes() for shard in shards}
    store = open_store(str(folder))
    rows: list[int] = []
    assert verify_source(store, 2, rows.append) == []
    manifest = read_manifest(store)
    assert sum(rows) == sum(split.rows for split in manifest.splits.values())
    shards[0].write_bytes(intact[shards[0]][:600] + b"\xff" + intact[shards[0]][601:])
    shards[2].unlink()
    shards[3].write_bytes(intact[shards[3]][:2048])
    shards[5].write_bytes(intact[shards[5]][:1024] + bytes(512) + intact[shards[5]][1536:])
    (folder / "index" / "train-000004.documents.gz").write_bytes(b"\x1f\x8b no gzip")
    index = (folder / "index" / "validation-000000.documents.gz").read_bytes()
    (folder / "index" / "train-000001.documents.gz").write_bytes(index)
    found = verify_source(store, 3)
    assert [(damage.split, damage.shard, damage.offset) for damage in found] == [
        ("train", 0, None), ("train", 1, None), ("train", 2, None), ("train", 3, 2048), ("train", 4, None),
        ("train", 5, 1024),
    ]  # fmt: skip
    words = ("sha256", "documents that end in the shard", "No such file", "2048 bytes", "damaged index", "sha256")
    assert all(word in damage.reason for word, damage in zip(words, found, strict=True))
    repair(store, found)
    assert read_manifest(store).splits["train"].bad == (0, 1, 2, 3, 4, 5)
    for shard, content in intact.items():
        shard.write_bytes(content)
    repair(store, verify_source(store))
    assert read_manifest(store).splits["train"].bad == (1, 4)  # their indexes are still damaged


def test_repair_refuses_a_source_without_intact_shards(built: Built, tmp_path: Path) -> None:
    folder = copy(built, tmp_path)
    for shard in folder.glob("train-*.tar"):
        shard.unlink()
    before = (folder / "manifest.json").read_bytes()
    store = open_store(str(folder))
    with pytest.raises(UserError, match=r"none of the \d+ train shards is intact"):
        repair(store, verify_source(store))
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"{", "not a"),
        (b'{"format": 99}', "format 99"),
        (b'{"format": 2}', "not a"),
        (b"[]", "not a"),
        (b"\xff", "not a"),
    ],
)
def test_a_damaged_manifest_is_a_user_error(change: bytes, message: str) -> None:
    with pytest.raises(UserError, match=f"here: .*{message}"):
        parse_manifest(change, "here")


def test_a_manifest_whose_ids_are_not_its_rows_is_refused(built: Built) -> None:
    """Its count of ids tells filler from labels."""
    content = (built.shards / "code" / "manifest.json").read_bytes()
    raw = json.loads(content)
    raw["splits"]["train"]["extents"][0]["ids"] += SEQ_LEN
    with pytest.raises(UserError, match=r"here: .*ids are \d+ rows, not \d+"):
        parse_manifest(json.dumps(raw).encode(), "here")


def test_another_tokenizer_is_refused(built: Built) -> None:
    other = train_tokenizer([built.code], str(built.shards.parent / "other"), 400)
    manifest = read_manifest(open_store(str(built.shards / "prose")))
    check_tokenizer(manifest, Tokenizer(built.tokenizer))
    with pytest.raises(UserError, match=r"built with tokenizer .*vocab 600.*vocab 400"):
        check_tokenizer(manifest, Tokenizer(other))


def test_manifest_states_what_is_there(built: Built) -> None:
    raw = json.loads((built.shards / "code" / "manifest.json").read_text())
    assert (raw["format"], raw["seq_len"], raw["vocab_size"], raw["dtype"]) == (2, SEQ_LEN, VOCAB_SIZE, "<u2")
    for name, split in raw["splits"].items():
        source = Source(open_store(str(built.shards / "code")), parse_manifest(json.dumps(raw).encode(), "x"), name)
        assert sum(len(block) for block in source.blocks()) == sum(extent["rows"] for extent in split["extents"]) > 0


def test_unigram_loss_matches_its_formula(built: Built) -> None:
    sources = [open_source(str(built.shards / name), "train") for name in ("code", "prose")]
    for source in sources:
        ids = source.geometry.ids
        labels = [int(i) for r in range(source.rows) for i in source.row(r)[1:]][: ids - 1]
        assert source.rows * SEQ_LEN > ids - 1
        assert count_labels(source).tolist() == [labels.count(i) for i in range(VOCAB_SIZE)]
    counts = mixture_counts(sources, [0.25, 0.75])
    assert counts.sum() == pytest.approx(sum(source.geometry.ids - 1 for source in sources))
    rows = np.array([[5, 1, 40, 7], [9, 40, 2, ~2]])
    nats = [-np.log((counts[i] + 1) / (counts.sum() + VOCAB_SIZE)) for i in (1, 40, 7, 40, 2)]
    assert unigram_loss(counts, rows) == pytest.approx(np.mean(nats), rel=1e-12)


def test_verify_compares_with_webdataset(built: Built) -> None:
    from llama_ds.data.source.verify import _check_with_webdataset

    source = open_source(str(built.shards / "code"), "train")
    _check_with_webdataset(source, source.check(0))
    with pytest.raises(BadFile, match=r"webdataset reads 20 samples that differ from the 20 rows"):
        _check_with_webdataset(source, source.check(1))
