"""The commands of docs/data.md build published corpora from the layouts in which they are published."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from built_sources import SEQ_LEN, Built
from source_files import manifest_of, streams

from llama_ds.data.text.tokenizer import Tokenizer
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = re.findall(
    r"^    python (tools/shards\.py build --tokenizer t\.model .*)$", (ROOT / "docs/data.md").read_text(), re.M
)


def lines(*records: dict) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def table(**columns: list) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


# Fields beside the text, as in the dataset cards, loading scripts and file lists that docs/data.md names.
ARXIV = {"timestamp": "2023-03-29T21:05:01", "yymm": "2303", "arxiv_id": "2303.1", "language": "en", "url": "https://a"}
C4 = {"timestamp": "2019-04-25T12:57:54Z", "url": "https://a"}
DOLMA = {"id": "0", "source": "books", "added": "2023-04-11", "created": "1999-01-01", "metadata": {"length": 3}}
FINEWEB = {"id": ["<urn:uuid:1>"], "dump": ["CC-MAIN-2013-20"], "url": ["https://a"], "date": ["2013-05-18T05:48:54Z"],
           "file_path": ["s3://commoncrawl/a.warc.gz"], "language": ["en"], "language_score": [0.9],
           "token_count": [3]}  # fmt: skip
STACK = {"hexsha": ["0"], "size": [9], "ext": ["py"], "lang": ["Python"], "max_stars_repo_path": ["a.py"],
         "max_stars_repo_name": ["a/b"], "max_stars_repo_licenses": [["MIT"]], "max_stars_count": [None],
         "avg_line_length": [9.0], "max_line_length": [9], "alphanum_fraction": [0.5]}  # fmt: skip
META = {"meta": {"redpajama_set_name": "RedPajamaC4"}}

# Name of a corpus: its files with their content, where the documents in the order of a build are "one", "two", ...
LAYOUTS: dict[str, dict[str, bytes]] = {
    "redpajama": {
        "RedPajama-Data-1T/arxiv/arxiv_023827cd-7ee8-42e6-aa7b-661731f4c70f.jsonl": lines(
            {"text": "one", "meta": ARXIV}
        ),
        "RedPajama-Data-1T/common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst": zstandard.compress(
            lines({"text": "two", "pred_label": "__label__wiki", "wiki_prob": 0.9, "source": "cc"})
        ),
        "RedPajama-Data-1T/wikipedia/wiki.jsonl": lines({"text": "three", "meta": {"title": "a", "language": "en"}}),
    },
    "slimpajama": {
        "SlimPajama-627B/README.md": b"# SlimPajama",
        "SlimPajama-627B/train/chunk1/example_train_0.jsonl.zst": zstandard.compress(lines({"text": "one", **META})),
        "SlimPajama-627B/train/chunk10/example_train_0.jsonl.zst": zstandard.compress(lines({"text": "two", **META})),
        "SlimPajama-627B/validation/chunk1/example_holdout_0.jsonl.zst": zstandard.compress(
            lines({"text": "no", **META})
        ),
        "SlimPajama-627B/test/chunk1/example_holdout_0.jsonl.zst": zstandard.compress(lines({"text": "no", **META})),
    },
    "dolma": {
        "dolma/books-0000.json.gz": gzip.compress(lines({"text": "one", **DOLMA})),
        "dolma/c4-0000.json.gz": gzip.compress(lines({"text": "two", **DOLMA})),
    },
    "c4": {
        "c4/en/c4-train.00000-of-01024.json.gz": gzip.compress(lines({"text": "one", **C4})),
        "c4/en/c4-train.00001-of-01024.json.gz": gzip.compress(lines({"text": "two", **C4})),
        "c4/en/c4-validation.00000-of-00008.json.gz": gzip.compress(lines({"text": "no", **C4})),
    },
    "fineweb": {
        "fineweb/README.md": b"# FineWeb",
        "fineweb/sample/10BT/000_00000.parquet": table(text=["no"], **FINEWEB),
        "fineweb/data/CC-MAIN-2013-20/000_00000.parquet": table(text=["one"], **FINEWEB),
        "fineweb/data/CC-MAIN-2024-10/000_00001.parquet": table(text=["two"], **FINEWEB),
    },
    "stack": {
        "the-stack/README.md": b"# The Stack",
        "the-stack/.gitattributes": b"*.parquet filter=lfs",
        "the-stack/data/c/train-00000-of-00257.parquet": table(content=["one"], **STACK),
        "the-stack/data/python/train-00000-of-00206.parquet": table(content=["two"], **STACK),
    },
}  # fmt: skip


def test_every_layout_has_a_command() -> None:
    assert [re.search(r"--source (\w+)=", command)[1] for command in COMMANDS] == list(LAYOUTS)  # type: ignore[index]


@pytest.mark.parametrize("command", COMMANDS, ids=list(LAYOUTS))
def test_published_layouts_are_built_by_the_documented_command(built: Built, tmp_path: Path, command: str) -> None:
    name = re.search(r"--source (\w+)=", command)[1]  # type: ignore[index]
    for path, data in LAYOUTS[name].items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    tool, *words = shlex.split(command.replace("t.model", built.tokenizer).replace("2048", str(SEQ_LEN)))
    words = [re.sub(r"^(\w+)=", rf"\1={tmp_path}/", word) for word in words]
    words[words.index("--out") + 1] = str(tmp_path / "shards")
    result = warm.run(ROOT / tool, *words, "--validation-fraction", "0", "--workers", "1")
    assert result.returncode == 0, result.stderr
    texts = "".join(["one", "two", "three"][: manifest_of(tmp_path / "shards" / name).splits["train"].documents])
    assert Tokenizer(built.tokenizer).decode(streams(tmp_path / "shards" / name, "train")[0]) == texts != "one"
