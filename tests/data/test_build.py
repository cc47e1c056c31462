"""A build loses no token or document, in any format, with any number of workers; deduplication and append work."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from built_sources import SEQ_LEN, Built
from hypothesis import given
from hypothesis import strategies as st
from source_files import content, index_of, manifest_of, shard_rows, streams, write_lines

from llama_ds.data.building.build import build_source
from llama_ds.data.building.dedup import DIGEST, DigestSet
from llama_ds.data.building.packing import id_dtype, pack, rows_of
from llama_ds.data.building.tokenized import in_validation
from llama_ds.data.text.corpus import documents
from llama_ds.data.text.formats import ReadOptions
from llama_ds.data.text.gather import gather_local_corpus
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

PADDING = 150_000  # bytes per line; about seven documents fill a part


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a real corpus of about 1.2 MB: code.jsonl and prose.jsonl."""
    root = tmp_path_factory.mktemp("corpus")
    gather_local_corpus(str(root), 1.2)
    return root


@pytest.fixture(scope="module")
def texts(corpus: Path) -> list[str]:
    return [d.text for d in documents(str(corpus / "*.jsonl"))]


@pytest.fixture(scope="module")
def pieces(corpus: Path) -> list[str]:
    """Return about 200 different short texts."""
    return list(dict.fromkeys(d.text for d in documents(str(corpus / "*.jsonl"), 4000)))[:200]


def text_of(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """Return the text of one document, which has bos and eos only at its ends."""
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    assert not np.isin(ids[1:-1], [tokenizer.bos_id, tokenizer.eos_id]).any()
    return tokenizer.decode(ids[1:-1])


def built_texts(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    ids = np.concatenate([*streams(folder, split), np.empty(0, "<u2")])
    starts = np.flatnonzero(ids == tokenizer.bos_id)
    return [text_of(document, tokenizer) for document in np.split(ids, starts[1:])] if len(ids) else []


@given(lengths=st.lists(st.integers(0, 40)), seq_len=st.integers(1, 12), rows=st.integers(1, 5))
def test_every_id_but_the_first_is_a_label_once_in_order(lengths: list[int], seq_len: int, rows: int) -> None:
    stream = np.arange(1, 1 + sum(lengths), dtype=np.uint32)
    runs = np.split(stream, np.cumsum(lengths)[:-1]) if lengths else []
    packed = [r.copy() for r in pack(runs, seq_len, id_dtype(1 << 20), 0, rows)]
    assert all(len(r) == rows for r in packed[:-1])
    labels = np.concatenate([stream[:0], *(r[:, 1:].ravel() for r in packed)])
    inputs = np.concatenate([stream[:0], *(r[:, :-1].ravel() for r in packed)])
    assert len(labels) == rows_of(len(stream), seq_len) * seq_len < len(stream) + seq_len
    real = max(0, len(stream) - 1)
    assert labels[:real].tolist() == stream[1:].tolist() and not labels[real:].any()
    assert inputs[:real].tolist() == stream[:real].tolist()


@given(st.lists(st.lists(st.integers(0, 60))))
def test_all_duplicates_but_the_first_are_found(batches: list[list[int]]) -> None:
    known, seen = DigestSet(), set()
    for batch in batches:
        digests = np.array([number.to_bytes(16, "little") for number in batch], DIGEST)  # nearly all end in zeros
        copies = set(known.add(digests).tolist())
        for i, number in enumerate(batch):
            assert (i in copies) == (number in seen)
            seen.add(number)


def test_shards_hold_the_ids_that_the_tokenizer_gives(built: Built, pieces: list[str], tmp_path: Path) -> None:
    texts = [*pieces[:20], "a mark \u2581 that sentencepiece takes for a space", "\u2581", "日本語 \U0001f600\n\n  x"]
    tokenizer = Tokenizer(built.tokenizer)
    source = write_lines(tmp_path / "a.jsonl", texts)
    build_source("s", str(source), built.tokenizer, str(tmp_path), SEQ_LEN, 0.0)
    wanted = [i for text in texts for i in (tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id)]
    assert streams(tmp_path / "s", "train")[0].tolist() == wanted
    assert manifest_of(tmp_path / "s").splits["validation"].extents == ()


def test_a_real_corpus_round_trips(built: Built, corpus: Path, texts: list[str], tmp_path: Path) -> None:
    """Documents of 200 bytes to 400 kB in rows of 64: most are split across rows, some across shards."""
    build_source("all", str(corpus / "*.jsonl"), built.tokenizer, str(tmp_path), SEQ_LEN, 0.3, rows_per_shard=900)
    tokenizer, folder = Tokenizer(built.tokenizer), tmp_path / "all"
    where = {text: (file, n) for file in ("code", "prose")
             for n, text in enumerate((d.text for d in documents(str(corpus / f"{file}.jsonl"))), 1)}  # fmt: skip
    for split in ("train", "validation"):
        wanted = [text for text in texts if in_validation(text, 0.3) == (split == "validation")]
        (stream,) = streams(folder, split)
        manifest = manifest_of(folder).splits[split]
        assert manifest.shards > 1 and (manifest.documents, manifest.ids) == (len(wanted), len(stream))
        assert tokenizer.decode(stream) == "".join(wanted)
        found = []
        for shard in range(manifest.shards):
            first, ids = shard * 900 * SEQ_LEN, len(manifest.shard_rows(shard)) * SEQ_LEN + 1
            for d in index_of(folder, split, shard):
                assert -d.length < d.start < ids
                text = text_of(stream[first + d.start : first + d.start + d.length], tokenizer)
                assert d.digest == hashlib.sha256(text.encode()).digest()[:16]
                assert d.place == "{}:{}".format(corpus / f"{where[text][0]}.jsonl", where[text][1])
                if d.start >= 0 and not (found and found[-1] == text):  # otherwise it began in the previous shard
                    found.append(text)
        assert found == wanted


def test_shards_equal_webdatasets_and_checksums_work_with_sha256sum(built: Built) -> None:
    import webdataset

    folder = built.shards / "prose"
    urls = sorted(str(path) for path in folder.glob("train-*.tar"))
    assert len(urls) > 1
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"{i:010d}" for i in range(manifest_of(folder).splits["train"].rows)]
    rows = np.concatenate([shard_rows(Path(url)) for url in urls])
    for sample, row in zip(samples, rows, strict=True):
        assert sample["ids.u16"] == row.tobytes()
    for number, url in enumerate(urls):
        copy = io.BytesIO()
        with webdataset.TarWriter(copy, encoder=False, mtime=0, user="", group="") as writer:
            for row in manifest_of(folder).splits["train"].shard_rows(number):
                writer.write({"__key__": f"{row:010d}", "ids.u16": rows[row].tobytes()})
        assert Path(url).read_bytes() == copy.getvalue()
    for checksums in ("train-0000", "validation-0000"):
        subprocess.run(["sha256sum", "-c", "--strict", f"index/{checksums}.sha256"], cwd=folder, check=True)


def test_all_formats_give_the_same_shards(built: Built, pieces: list[str], tmp_path: Path) -> None:
    texts = pieces[:30]
    lines = write_lines(tmp_path / "a.jsonl", texts).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:5000]) + gzip.compress(lines[5000:]))  # two members
    pack_ = zstandard.ZstdCompressor().compress
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"  # like the skippable frame that pzstd writes before each frame
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + pack_(lines[:5000]) + pack_(lines[5000:]))
    pq.write_table(pa.table({"id": range(30), "text": texts}), tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "txt" / f"{i:02d}.{'txt' if i % 2 else 'py'}").write_bytes(text.encode())
    shards = {}
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "txt"):
        assert [d.text for d in documents(str(tmp_path / name))] == texts
        build_source(name, str(tmp_path / name), built.tokenizer, str(tmp_path / "out"), SEQ_LEN, 0.2, 500)
        shards[name] = {path.name: path.read_bytes() for path in (tmp_path / "out" / name).glob("*.tar")}
        assert len(shards[name]) > 2 and shards[name] == shards["a.jsonl"]
    prefix = f"{tmp_path}/a.parquet:"
    assert {d.place for d in index_of(tmp_path / "out/a.parquet", "train", 0)} < {f"{prefix}{n}" for n in range(1, 31)}


@pytest.fixture(scope="module")
def mixed(pieces: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all formats that makes a dozen parts, with duplicates within and across parts."""
    root = tmp_path_factory.mktemp("mixed")
    few = pieces[::4]
    write_lines(root / "a.jsonl", [*few, *few[3:9], few[0]], PADDING)
    (root / "b.jsonl.gz").write_bytes(gzip.compress(write_lines(root / "b", few[20:40]).read_bytes()))
    (root / "b").unlink()
    pq.write_table(pa.table({"text": few[10:60]}), root / "c.parquet", row_group_size=5)
    for i, text in enumerate(pieces[1:20:3]):
        (root / f"d{i}.txt").write_bytes(text.encode())
    return root


def test_workers_change_no_byte(built: Built, mixed: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        build_source("s", str(mixed), built.tokenizer, str(tmp_path / str(workers)), SEQ_LEN, 0.2, 200, workers,
                     dedup=True)  # fmt: skip
    files = content(tmp_path / "1")
    assert len([name for name in files if name.endswith(".tar")]) > 5
    assert content(tmp_path / "2") == files == content(tmp_path / "3")
    assert not [name for name in files if "build" in name or "tmp" in name]


def test_dedup_keeps_first_occurrences(built: Built, mixed: Path, tmp_path: Path) -> None:
    every = list(documents(str(mixed)))
    first = {d.text: d for d in reversed(every)}
    kept = [d for d in every if first[d.text] is d]
    assert len(kept) < len(every) - 30
    write_lines(tmp_path / "kept.jsonl", [d.text for d in kept])
    build_source("a", str(mixed), built.tokenizer, str(tmp_path), SEQ_LEN, 0.2, 400, dedup=True)
    build_source("b", str(tmp_path / "kept.jsonl"), built.tokenizer, str(tmp_path), SEQ_LEN, 0.2, 400)
    for path in (tmp_path / "b").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    found = [[d.place for s in ("train", "validation") for k in range(manifest_of(tmp_path / "a").splits[s].shards)
               for d in index_of(tmp_path / "a", s, k)]]  # fmt: skip
    assert set(found[0]) == {d.path for d in kept}


def test_append_adds_and_changes_nothing(built: Built, pieces: list[str], tmp_path: Path) -> None:
    old, new = pieces[:60], [*pieces[50:90], pieces[70]]
    for name, some in (("old", old), ("new", new)):
        write_lines(tmp_path / f"{name}.jsonl", some, PADDING)

    def build(name: str, **flags: bool) -> None:
        pattern = str(tmp_path / f"{name}.jsonl")
        build_source("s", pattern, built.tokenizer, str(tmp_path), SEQ_LEN, 0.2, 100, **flags)  # type: ignore[arg-type]

    folder, tokenizer = tmp_path / "s", Tokenizer(built.tokenizer)
    with pytest.raises(UserError, match="no finished source to append to"):
        build("new", append=True)
    build("old")
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
              for path in folder.rglob("*") if path.is_file()}  # fmt: skip
    build("new", append=True, dedup=True)
    for path, (inode, mtime, data) in before.items():
        if path.name == "manifest.json":
            continue
        if path.suffix == ".sha256":
            assert path.read_bytes().startswith(data) and len(path.read_bytes()) > len(data)
        else:
            assert (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) == (inode, mtime, data)
    for split in ("train", "validation"):
        wanted = [t for t in dict.fromkeys([*old, *new]) if in_validation(t, 0.2) == (split == "validation")]
        assert built_texts(folder, split, tokenizer) == wanted
        assert len(manifest_of(folder).splits[split].extents) == 2
        subprocess.run(["sha256sum", "-c", "--strict", f"index/{split}-0000.sha256"], cwd=folder, check=True)
    with pytest.raises(UserError, match="was built with --seq-len 64, not 32"):
        build_source("s", str(tmp_path / "new.jsonl"), built.tokenizer, str(tmp_path), 32, 0.2, 100, append=True)
    after = content(folder)
    build("new", append=True, dedup=True)  # nothing new
    assert content(folder) == after
    (folder / "index" / "train-000001.documents.gz").unlink()
    write_lines(tmp_path / "new.jsonl", pieces[90:95])
    with pytest.raises(UserError, match=r"train-000001\.documents\.gz: --dedup needs it"):
        build("new", append=True, dedup=True)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "txt"])
def test_empty_documents_are_reported_or_left_out(built: Built, tmp_path: Path, kind: str) -> None:
    texts = ["one " * 300, "two " * 300, "", "three " * 300]
    path, where = tmp_path / f"a.{kind}", f"{tmp_path}/a.{kind}:3: empty document"
    if kind == "txt":
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text)
        path, where = tmp_path / "*.txt", f"{tmp_path}/2.txt: empty file"
    elif kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=2)
    else:
        data = write_lines(tmp_path / "a", texts).read_bytes()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)

    def build(skip_bad: bool) -> None:
        build_source("s", str(path), built.tokenizer, str(tmp_path), SEQ_LEN, 0.0, skip_bad=skip_bad)

    with pytest.raises(UserError) as error:
        build(False)
    assert where in str(error.value) and "--skip-bad" in str(error.value)
    build(True)  # resumes the build, although the flag changed
    assert built_texts(tmp_path / "s", "train", Tokenizer(built.tokenizer)) == [t for t in texts if t]


def test_a_resumed_build_leaves_out_bad_documents(
    built: Built, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A malformed line found late in a long build does not cost the finished work."""
    good = b'{"text": "some words"}\n'
    bad = [b"{\n", b'{"text": 7}\n', b'{"text": "\xff"}\n', b'{"text": ""}\n', b'{"text": "\\ud83d"}\n', b"\0\n"]
    lines = [good * 60_000, *(line + good for line in bad)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 au lait")

    def build(skip_bad: bool) -> None:
        build_source("s", str(tmp_path / "*.*"), built.tokenizer, str(tmp_path), SEQ_LEN, 0.0, skip_bad=skip_bad)

    with pytest.raises(UserError, match=r"a\.jsonl:60001: not JSON .*, or leave such documents out with --skip-bad"):
        build(False)
    assert list((tmp_path / "s" / "build").glob("part-*.json"))
    with caplog.at_level("INFO", "llama_ds"):
        build(True)
    assert f"{tmp_path}/a.jsonl: documents left out, 1: not JSON, the first in line 60001, " in caplog.text
    assert f"{tmp_path}/b.txt: documents left out, 1: invalid UTF-8\n" in caplog.text
    total = f"{len(bad) + 1} empty or malformed documents left out (2: invalid UTF-8, 1: not JSON, "
    assert total in caplog.text and "1: empty document" in caplog.text
    assert manifest_of(tmp_path / "s").splits["train"].documents == 60_000 + len(bad)


def test_a_list_that_yields_nothing_is_an_error_unless_it_is_allowed_by_name(built: Built, tmp_path: Path) -> None:
    lines = [json.dumps({"id": i, "content": f"text {i} " * 200}) for i in range(1000)]  # two parts
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n')
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    (tmp_path / "c.jsonl").write_text("\n")
    (tmp_path / "part-00000").write_text("")
    (tmp_path / "part-00001.json").write_text("")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "part-00002.parquet")

    def build(*allowed: str) -> None:
        build_source("s", str(tmp_path), built.tokenizer, str(tmp_path / "out"), SEQ_LEN, 0.0, skip_bad=True,
                     allow_empty=allowed, options=ReadOptions(exclude=("out",)))  # fmt: skip

    nothing = r'b\.jsonl: none of its 1000 documents is taken \(1000: no "text" of type string, the first in line 1\)'
    for allowed, message in (
        ((), r"part-00001\.json: empty file \(0 bytes\).*--allow-empty"),
        (("part-00001.json",), nothing),
        (("b.jsonl", "*/part-00001.json"), r"c\.jsonl: holds no document.*--allow-empty"),
        (("[bc].jsonl", "*.json"), r"part-00002\.parquet: holds no document"),
    ):
        with pytest.raises(UserError, match=message):
            build(*allowed)
    build("[bc].jsonl", "part-*")  # resumes the build
    assert manifest_of(tmp_path / "out" / "s").splits["train"].documents == 1


def test_parquet_pages_are_checked_against_their_checksums(built: Built, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"word {i}" for i in range(100)]})
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"word 50", b"ward 50"))  # still a valid page
    with pytest.raises(UserError, match=r"a\.parquet: damaged parquet file \(.*checksum"):
        list(documents(str(path)))


def damaged_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": [f"word {i} " * 50 for i in range(2000)]}), path)
    data = bytearray(path.read_bytes())
    data[2000:2400] = bytes(400)
    path.write_bytes(data)


LINES = (b'{"text": "some words", "id": "%s"}\n' % (b"-" * 970)) * 2000  # two parts


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.txt", lambda p: p.write_bytes(b"\xff"), "invalid UTF-8"),
        ("a.txt", lambda p: p.write_bytes(b"\0"), "binary file"),
        ("a.jsonl", lambda p: p.write_bytes(LINES + b"{\n"), "a.jsonl:2001: not JSON"),
        ("a.jsonl", lambda p: p.write_bytes(LINES + b'{"Text": ""}\n'), 'a.jsonl:2001: no "text"'),
        ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(LINES)[:-9]), "damaged gzip file"),
        ("a.jsonl.gz", lambda p: p.write_bytes(LINES), "damaged gzip file"),
        ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(LINES + b"7\n")), 'a.jsonl.gz:2001: no "text"'),
        ("a.jsonl.zst", lambda p: p.write_bytes(zstandard.compress(LINES)[:-9]), "damaged zstd file (cut short"),
        ("a.jsonl.zst", lambda p: p.write_bytes(LINES), "damaged zstd file"),
        ("a.parquet", lambda p: p.write_bytes(LINES), "damaged parquet file"),
        ("a.parquet", damaged_parquet, "damaged parquet file"),
        ("a.parquet", lambda p: pq.write_table(pa.table({"body": ["x"]}), p), 'no column "text", only body'),
        ("a.parquet", lambda p: pq.write_table(pa.table({"text": ["x", None]}), p), 'a.parquet:2: no "text"'),
        ("a.parquet", lambda p: pq.write_table(pa.table({"text": [1]}), p), 'a.parquet:1: no "text"'),
    ],
)
def test_bad_input_is_reported_with_its_location(
    built: Built, tmp_path: Path, name: str, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(UserError) as error:
        build_source("s", str(tmp_path / name), built.tokenizer, str(tmp_path), SEQ_LEN, 0.0)
    assert message in str(error.value) and str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_a_finished_source_is_replaced_only_with_overwrite(built: Built, tmp_path: Path) -> None:
    def build(seq_len: int, pattern: str = built.prose, overwrite: bool = False) -> None:
        build_source("p", pattern, built.tokenizer, str(tmp_path / "out"), seq_len, 0.2, 40, overwrite=overwrite)

    build(16)
    before = content(tmp_path)
    with pytest.raises(UserError, match="--overwrite"):
        build(32)
    assert content(tmp_path) == before
    build(32, overwrite=True)
    assert manifest_of(tmp_path / "out" / "p").seq_len == 32
    build_source("p", built.prose, built.tokenizer, str(tmp_path / "again"), 32, 0.2, 40)
    assert content(tmp_path / "out") == content(tmp_path / "again")  # no file of the first build is left


@pytest.mark.parametrize(("fraction", "split"), [(0.9999, "train"), (0.0001, "validation")])
def test_a_split_without_documents_is_a_clear_error(built: Built, tmp_path: Path, fraction: float, split: str) -> None:
    (tmp_path / "a.txt").write_text("words " * 5000)
    with pytest.raises(UserError, match=f"the {split} split got 0 of 1 documents.*--document-chars"):
        build_source("s", str(tmp_path / "a.txt"), built.tokenizer, str(tmp_path), SEQ_LEN, fraction)
    assert os.listdir(tmp_path / "s") != ["manifest.json"]
    build_source("s", str(tmp_path / "a.txt"), built.tokenizer, str(tmp_path), SEQ_LEN, 0.0)  # nothing was left behind


def test_manifest_states_what_is_there(built: Built) -> None:
    raw = json.loads((built.shards / "code" / "manifest.json").read_text())
    assert (raw["format"], raw["seq_len"], raw["dtype"], raw["validation_fraction"]) == (2, SEQ_LEN, "<u2", 0.2)
    for split, state in raw["splits"].items():
        (extent,) = state["extents"]
        (stream,) = streams(built.shards / "code", split)
        assert extent["ids"] == len(stream) and extent["rows"] == -(-(len(stream) - 1) // SEQ_LEN)
        assert (stream == 1).sum() == (stream == 2).sum() == extent["documents"]
