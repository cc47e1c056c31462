"""Packing loses no token, shards are plain webdataset tars, and damage is found before it is trained on."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from built_sources import SEQ_LEN, VOCAB_SIZE, Built
from hypothesis import given
from hypothesis import strategies as st

from llama_ds.data.build import build_source, in_validation
from llama_ds.data.corpus import documents
from llama_ds.data.packing import Packer, id_dtype
from llama_ds.data.shards import check_tokenizer, open_source, read_manifest
from llama_ds.data.tokenizer import Tokenizer, train_tokenizer
from llama_ds.data.unigram import count_labels, mixture_counts, unigram_loss
from llama_ds.data.verify import verify_source
from llama_ds.errors import UserError


@given(lengths=st.lists(st.integers(0, 40)), seq_len=st.integers(1, 12))
def test_every_id_but_the_first_is_a_label_once_in_order(lengths: list[int], seq_len: int) -> None:
    stream = np.arange(sum(lengths), dtype=np.uint32)
    packer = Packer(seq_len, id_dtype(1 << 20))
    rows = [row for part in np.split(stream, np.cumsum(lengths)[:-1] if lengths else []) for row in packer.add(part)]
    assert all(len(row) == seq_len + 1 for row in rows)
    labels = np.concatenate([row[1:] for row in rows]) if rows else stream[:0]
    assert labels.tolist() == stream[1 : 1 + len(labels)].tolist()
    assert all(row[0] + 1 == row[1] for row in rows)
    assert 0 <= len(stream) - 1 - len(labels) < seq_len or not len(stream)
    assert packer.left == len(stream) - len(labels)


def test_rows_are_the_documents_laid_end_to_end(built: Built) -> None:
    tokenizer = Tokenizer(built.tokenizer)
    for split in ("train", "validation"):
        texts = [d.text for d in documents(built.prose) if in_validation(d.text, 0.2) == (split == "validation")]
        stream = [i for text in texts for i in (tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id)]
        source = open_source(str(built.shards / "prose"), split)
        assert source.rows == (len(stream) - 1) // SEQ_LEN > 0
        for i in range(source.rows):
            assert source.row(i).tolist() == stream[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1]
        with pytest.raises(IndexError):
            source.row(source.rows)


@pytest.mark.parametrize("name", ["code", "prose"])
def test_webdataset_and_tarfile_read_the_same_rows(built: Built, name: str) -> None:
    import webdataset

    folder = built.shards / name
    source = open_source(str(folder), "train")
    assert len(source.shard_rows) > 1
    urls = sorted(str(path) for path in folder.glob("train-*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"{i:08d}" for i in range(source.rows)]
    for i, sample in enumerate(samples):
        assert np.frombuffer(sample["ids.u16"], "<u2").tolist() == source.row(i).tolist()
    with tarfile.open(urls[0]) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [f"{i:08d}.ids.u16" for i in range(source.shard_rows[0])]
        assert tar.extractfile(members[3]).read() == source.row(3).tobytes()  # type: ignore[union-attr]
    assert verify_source(str(folder)) == read_manifest(str(folder))


def test_workers_and_repetition_change_no_byte(built: Built, tmp_path: Path) -> None:
    text = "".join(document.text for document in documents(built.code))
    for i in range(20):  # enough for several tasks per worker, of unequal lengths
        (tmp_path / f"{i}.txt").write_text(f"{i}\n" + text * (i % 3 + 1))
    folders = [tmp_path / f"workers-{workers}" for workers in (1, 2)]
    for folder, workers in zip(folders, (1, 2), strict=True):
        build_source("s", str(tmp_path / "*.txt"), built.tokenizer, str(folder), SEQ_LEN, 0.2, 3000, workers)
    files = sorted(path.name for path in (folders[0] / "s").iterdir())
    assert len(files) > 3 and files == sorted(path.name for path in (folders[1] / "s").iterdir())
    for name in files:
        assert len({(folder / "s" / name).read_bytes() for folder in folders}) == 1


def test_a_finished_source_is_replaced_only_when_told(built: Built, tmp_path: Path) -> None:
    def build(seq_len: int, overwrite: bool = False) -> None:
        build_source("p", built.prose, built.tokenizer, str(tmp_path), seq_len, 0.2, overwrite=overwrite)

    build(16)
    with pytest.raises(UserError, match="--overwrite"):
        build(32)
    assert read_manifest(str(tmp_path / "p")).seq_len == 16
    build(32, overwrite=True)
    assert read_manifest(str(tmp_path / "p")).seq_len == 32
    assert not list((tmp_path / "p").glob("*.tmp"))


def test_a_build_that_fails_leaves_no_source(built: Built, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("words " * 5000)
    (tmp_path / "worse.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"worse\.txt: invalid UTF-8"):
        build_source("s", str(tmp_path / "*.txt"), built.tokenizer, str(tmp_path), SEQ_LEN)
    with pytest.raises(UserError, match=r"manifest\.json: cannot read"):
        open_source(str(tmp_path / "s"), "train")


@pytest.mark.parametrize(
    ("text", "fraction", "split"), [("short", 0.0, "train"), ("words " * 5000, 0.0001, "validation")]
)
def test_a_split_without_rows_says_why(built: Built, tmp_path: Path, text: str, fraction: float, split: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match=f"the {split} split got . of 1 documents.*--document-chars"):
        build_source("s", str(tmp_path / "a.txt"), built.tokenizer, str(tmp_path), SEQ_LEN, fraction)


def copy(built: Built, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built.shards / "prose", tmp_path / "prose"))


def test_a_shard_cut_short_is_found_on_opening(built: Built, tmp_path: Path) -> None:
    shard = copy(built, tmp_path) / "train-00001.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError) as error:
        open_source(str(shard.parent), "train")
    for part in (str(shard), f"is {size - 1} bytes", f"says {size}", "cut short", "tools/shards.py build"):
        assert part in str(error.value)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001\.tar: cannot open the shard"):
        open_source(str(shard.parent), "train")


def test_a_shard_of_the_right_size_with_wrong_content_is_found(built: Built, tmp_path: Path) -> None:
    folder = copy(built, tmp_path)
    shard = folder / "train-00000.tar"
    sound = shard.read_bytes()
    shard.write_bytes(bytes(len(sound)))
    source = open_source(str(folder), "train")
    with pytest.raises(UserError, match=r"train-00000\.tar: no tar header of 00000000\.ids\.u16"):
        source.row(0)
    shard.write_bytes(sound[:600] + b"\x07" + sound[601:])
    open_source(str(folder), "train").row(0)  # one flipped byte looks sound here ...
    with pytest.raises(UserError, match="sha256"):
        verify_source(str(folder))  # ... and is what verify is for


@pytest.mark.parametrize(
    ("change", "message"),
    [("{", "not a"), ('{"format": 99}', "format 99"), ('{"format": 1}', "not a"), ("[]", "not a")],
)
def test_a_damaged_manifest_is_a_user_error(built: Built, tmp_path: Path, change: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(change)
    with pytest.raises(UserError, match=message):
        read_manifest(str(tmp_path))


def test_another_tokenizer_is_refused(built: Built) -> None:
    other = train_tokenizer([built.code], str(built.shards.parent / "other"), 400)
    manifest = read_manifest(str(built.shards / "prose"))
    check_tokenizer(manifest, Tokenizer(built.tokenizer))
    with pytest.raises(UserError, match=r"built with tokenizer .*vocab 600.*vocab 400"):
        check_tokenizer(manifest, Tokenizer(other))


def test_manifest_states_what_is_there(built: Built) -> None:
    raw = json.loads((built.shards / "code" / "manifest.json").read_text())
    assert (raw["format"], raw["seq_len"], raw["vocab_size"], raw["dtype"]) == (1, SEQ_LEN, VOCAB_SIZE, "<u2")
    for split in raw["splits"].values():
        assert split["rows"] == sum(shard["rows"] for shard in split["shards"]) > 0
        assert split["tokens"] == split["rows"] * SEQ_LEN


def test_unigram_loss_is_its_formula(built: Built) -> None:
    sources = [open_source(str(built.shards / name), "train") for name in ("code", "prose")]
    for source in sources:
        labels = [int(i) for r in range(source.rows) for i in source.row(r)[1:]]
        assert count_labels(source).tolist() == [labels.count(i) for i in range(VOCAB_SIZE)]
    counts = mixture_counts(sources, [0.25, 0.75])
    assert counts.sum() == pytest.approx(sum(source.rows for source in sources) * SEQ_LEN)
    rows = np.array([[5, 1, 40], [9, 40, 2]])
    nats = [-np.log((counts[i] + 1) / (counts.sum() + VOCAB_SIZE)) for i in (1, 40, 40, 2)]
    assert unigram_loss(counts, rows) == pytest.approx(np.mean(nats), rel=1e-12)
