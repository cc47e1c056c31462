"""Input files on web servers and object stores give the same documents and shards as on disk, whatever fails."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from built_sources import SEQ_LEN, Built
from flaky_server import FlakyServer
from source_files import index_of, streams

from llama_ds.data.building.build import build_source
from llama_ds.data.source.remote import RetryPolicy
from llama_ds.data.text import input_storage
from llama_ds.data.text.corpus import documents
from llama_ds.data.text.formats import ReadOptions
from llama_ds.data.text.inputs import find_inputs
from llama_ds.errors import UserError

QUICK = RetryPolicy(deadline_s=5, first_wait_s=0.01, max_wait_s=0.05, stall_s=5)
TEXTS = [f"text {i} é" for i in range(3000)]
LINES = "".join(json.dumps({"id": "-" * 970, "text": text}) + "\n" for text in TEXTS).encode()  # three parts


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("find_remote", "open_remote"):
        function = getattr(input_storage, name)
        monkeypatch.setattr(input_storage, name, lambda file, function=function: function(file, QUICK))


def texts(pattern: str) -> list[str]:
    return [document.text for document in documents(pattern)]


def test_a_web_server_gives_the_same_shards_as_a_disk(built: Built, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with FlakyServer({"/corpus é/a.jsonl": LINES}) as server:
        faults: list[int | str | None] = [503, None, None, "cut", 500, None, "cut"]
        server.faults["/corpus é/a.jsonl"] = iter(faults)
        url = f"{server.url}/corpus%20é/a.jsonl"
        build_source("s", url, built.tokenizer, str(tmp_path / "remote"), SEQ_LEN, 0.0)
        assert len(server.requests) > len(faults)
        assert index_of(tmp_path / "remote" / "s", "train", 0)[1].place == f"{url}:2"
    build_source("s", str(tmp_path / "a.jsonl"), built.tokenizer, str(tmp_path / "disk"), SEQ_LEN, 0.0)
    assert (
        streams(tmp_path / "remote" / "s", "train")[0].tolist() == streams(tmp_path / "disk" / "s", "train")[0].tolist()
    )


@pytest.mark.parametrize("ranges", [True, False])
def test_parquet_and_compressed_files_are_read_from_a_web_server(tmp_path: Path, ranges: bool) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=1000)
    files = {"/a.parquet": (tmp_path / "a.parquet").read_bytes(), "/a.json.gz": gzip.compress(LINES)}
    with FlakyServer(files, ranges) as server:
        for name in files:
            server.faults[name] = iter([None, None, None, "cut"])
            assert texts(server.url + name) == TEXTS


def test_a_store_is_searched_like_a_disk(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name in ("train/part-0.json", "train/lang=en/part-1.json.gz", "train/_SUCCESS", "train/.a.crc", "b.jsonl"):
        data = f'{{"text": "{name}"}}'.encode()
        store.pipe(f"/corpus/{name}", gzip.compress(data) if name.endswith("gz") else data)
    store.pipe("/corpus/train/README.md", b"# A dataset")
    store.pipe("/corpus/image.png", b"\x89PNG\0")
    inside = ["train/lang=en/part-1.json.gz", "train/part-0.json"]
    assert texts("memory://corpus/train") == inside == texts("memory://corpus/tr*")
    assert texts("memory://corpus") == ["b.jsonl", *inside]
    assert texts("memory://corpus/*.jsonl") == ["b.jsonl"] == texts("memory://corpus/b.jsonl")
    found = find_inputs("memory://corpus/train", ReadOptions()).left_out
    assert {reason: len(paths) for reason, paths in found.items()} == {
        "hidden or a marker": 2,
        "describes lists of texts": 1,
    }


def test_what_cannot_be_reached_is_one_error(tmp_path: Path) -> None:
    with FlakyServer({"/a.jsonl": LINES, "/b.jsonl": LINES}) as server:
        for url, message in (
            (f"{server.url}/no.jsonl", r"/no\.jsonl: HTTP 404 Not Found .* check the URL"),
            (f"{server.url}/*.jsonl", "a web server cannot be searched"),
            (f"{server.url}/a.jsonl?key=secret", r"/a\.jsonl: a URL with a password or a query"),
            ("foo://bucket/a.jsonl", "foo:// is not a known protocol"),
            ("memory://nothing/here.jsonl", "nothing/here"),
        ):
            with pytest.raises(UserError, match=message) as error:
                texts(url)
            assert "secret" not in str(error.value)
        url = f"{server.url}/b.jsonl"
        input_storage.list_remote(url)
        server.files["/b.jsonl"] = LINES[:-9]
        with (
            pytest.raises(UserError, match=r"/b\.jsonl: .*the source is damaged"),
            input_storage.open_input(url) as file,
        ):
            file.read()
