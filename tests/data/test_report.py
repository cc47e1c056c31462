"""The report of a source agrees with the documents that were built, in bounded memory, as text, JSON and one page."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from built_sources import SEQ_LEN, Built
from hypothesis import given
from hypothesis import strategies as st
from source_files import streams, write_lines

from llama_ds.data.building.build import build_source
from llama_ds.data.report.duplicates import DigestSample
from llama_ds.data.report.lengths import Lengths
from llama_ds.data.text.tokenizer import Tokenizer
from tools import shards

MARKUP = "<script>alert('x')</script> & \u0007 a bell \n" * 3


@given(st.lists(st.integers(2, 1 << 30), min_size=1), st.floats(0.01, 1))
def test_lengths_are_summarised_in_constant_memory(lengths: list[int], share: float) -> None:
    found = Lengths()
    found.add(np.array(lengths[:1], np.int64))
    found.add(np.array(lengths[1:], np.int64))
    assert (found.documents, found.tokens) == (len(lengths), sum(lengths))
    assert (found.shortest, found.longest) == (min(lengths), max(lengths))
    wanted = float(np.quantile(lengths, share, method="inverted_cdf"))
    assert 0.997 * wanted <= found.quantile(share) <= wanted
    bars = found.bars()
    assert sum(bar.documents for bar in bars) == len(lengths) and sum(bar.tokens for bar in bars) == sum(lengths)
    assert bars[0].documents and bars[-1].documents
    assert all(a.stop == b.start for a, b in pairwise(bars))
    if max(lengths) < 1024:  # every length has a bin of its own
        for bar in bars:
            assert bar.documents == sum(bar.start <= length < bar.stop for length in lengths)


@given(st.lists(st.integers(0, 30)), st.lists(st.integers(0, 30)))
def test_copies_are_counted_exactly_while_they_fit(first: list[int], second: list[int]) -> None:
    samples = []
    for numbers in (first, second):
        samples.append(DigestSample())
        for line, number in enumerate(numbers):
            samples[-1].add(number.to_bytes(8, "little") + bytes(8), f"f:{line}")
    assert samples[0].share_of_texts == 1
    assert samples[0].share_of_copies == pytest.approx((1 - len(set(first)) / len(first)) if first else 0)
    shared = [number in second for number in first]
    assert samples[0].share_in([samples[1]]) == pytest.approx(np.mean(shared) if first else 0)
    for copies in samples[0].most_copied(3):
        number = first[int(copies.place[2:])]
        assert first.count(number) == copies.documents > 1


def test_a_sample_of_texts_estimates_the_copies_of_all() -> None:
    sample, other = DigestSample(limit=500), DigestSample(limit=2000)
    generator = np.random.default_rng(0)
    digests = [generator.bytes(16) for _ in range(10_000)]
    for number, digest in enumerate(digests):
        for copy in range(3 if number % 4 == 0 else 1):  # a third of the documents are copies
            sample.add(digest, f"{number}:{copy}")
        if number % 2:
            other.add(digest, "")
    assert len(sample._documents) <= 500 and sample.share_of_texts == 1 / 32
    assert sample.share_of_copies == pytest.approx(1 / 3, abs=0.05)
    assert sample.share_in([other]) == pytest.approx(1 / 3, abs=0.05)  # 5,000 of 15,000 documents
    assert {copies.documents for copies in sample.most_copied(10)} == {3}


@pytest.fixture(scope="module")
def folder(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources with copies: b has a text four times, and half of its texts are a's too."""
    root = tmp_path_factory.mktemp("report")
    texts = [f"{i} is the number of this text, and {i * i} its square. " * (i + 1) for i in range(20)]
    write_lines(root / "a.jsonl", texts)
    write_lines(root / "b.jsonl", [*texts[:8], *["four times, at four places"] * 4, MARKUP, *"wxyz"])
    for name in "ab":
        path = str(root / f"{name}.jsonl")
        build_source(name, path, built.tokenizer, str(root / "built"), SEQ_LEN, 0.2, rows_per_shard=64)
    return root / "built"


def report(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict]:  # type: ignore[type-arg]
    assert shards.main(["report", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_report_is_that_of_the_documents(folder: Path, built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(built.tokenizer)
    for data in report(capsys, folder, "--tokenizer", built.tokenizer, "--samples", 4):
        source, lines = folder / data["source"], (folder.parent / f"{data['source']}.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        lengths = sorted(2 + len(tokenizer.encode(text)) for text in texts)
        found = data["lengths"]
        assert (data["documents"], data["tokens"]) == (len(texts), sum(lengths))
        assert (found["shortest"], found["longest"]) == (lengths[0], lengths[-1])
        assert found["quantiles"]["0.5"] == lengths[(len(lengths) + 1) // 2 - 1]
        assert data["duplicates"]["share"] == pytest.approx(1 - len(set(texts)) / len(texts))
        assert data["duplicates"]["sampled_texts"] == 1
        (ids,) = streams(source, "train")
        train = data["splits"]["train"]
        assert train["tokens"] == len(ids) and train["filler"] == train["rows"] * SEQ_LEN + 1 - len(ids)
        size = len(tokenizer.decode(ids[1:]).encode())  # few rows: all were decoded
        assert data["decoded_rows"] == train["rows"]
        assert data["bytes_per_token"] == pytest.approx(size / ((ids != 1) & (ids != 2)).sum(), rel=1e-3)
        assert len(data["samples"]) == min(4, train["rows"])
        assert data["samples"][0]["text"] == tokenizer.decode(ids[: SEQ_LEN + 1])
        assert data["samples"][0]["places"][0].startswith(str(folder.parent / data["source"]))


def test_copies_within_and_between_sources(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = report(capsys, folder)
    assert (a["duplicates"]["share"], a["duplicates"]["most_copied"]) == (0, [])
    (copied,) = b["duplicates"]["most_copied"]
    assert copied["documents"] == 4 and "b.jsonl:" in copied["place"]
    assert a["duplicates"]["share_in_other_sources"] == pytest.approx(8 / 20)
    assert b["duplicates"]["share_in_other_sources"] == pytest.approx(8 / 17)
    assert a["bytes_per_token"] is None and a["samples"] == []


def test_a_remote_source_has_the_same_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (local,) = report(capsys, folder / "b")
    (remote,) = report(capsys, f"pipe:cat {folder}/b/{{}}", "--cache-dir", tmp_path, "--workers", 3)
    assert {**remote, "folder": ""} == {**local, "folder": ""}


class Page(HTMLParser):
    """What a browser makes of the page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.shown = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_the_page_needs_nothing_else(
    folder: Path, built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "report.html"
    words = ["report", str(folder), "--tokenizer", built.tokenizer, "--samples", "1000", "--html", str(file)]
    assert shards.main(words) == 0
    text = capsys.readouterr().out
    assert "17.65% of the documents repeat an earlier one" in text  # 3 of 17
    page = Page(file.read_text())
    assert page.links == [] and "script" not in page.tags and page.tags.count("svg") == 3
    assert "<script>alert('x')</script> & \ufffd a bell" in page.shown  # as text
    assert "Most copied texts" in page.shown


def test_a_missing_index_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "b"
    shutil.copytree(folder / "b", copy)
    index = copy / "index" / "train-000000.documents.gz"
    index.write_bytes(index.read_bytes()[:20])
    assert shards.main(["report", str(copy)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {index}: damaged index of documents")
    index.unlink()
    assert shards.main(["report", str(copy)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {index}: ") and error.count("\n") == 1
