"""The index of a shard round-trips positions and any file name."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ds.data.source.documents_index import IndexedDocument, parse_documents, write_documents
from llama_ds.errors import UserError

locations = st.text(st.characters(exclude_categories=()), max_size=20).filter(
    lambda text: not any("\ud800" <= c < "\udc80" or "\udcff" < c <= "\udfff" for c in text)
) | st.text("\\tnr\t\n\r/:1", max_size=12)
entries = st.builds(
    IndexedDocument, st.integers(-(2**40), 2**40), st.integers(2, 2**40), st.binary(min_size=16, max_size=16), locations
)


def written(documents: list[IndexedDocument]) -> bytes:
    file = io.BytesIO()
    write_documents(file, documents)
    return file.getvalue()


@given(st.lists(entries))
def test_documents_round_trip(documents: list[IndexedDocument]) -> None:
    assert parse_documents(written(documents), "x") == documents
    assert written(documents) == written(documents)


def test_the_index_is_plain_text() -> None:
    document = IndexedDocument(-5, 12, bytes(range(16)), "a b\n.jsonl:7")
    assert gzip.decompress(written([document])) == b"-5\t12\t000102030405060708090a0b0c0d0e0f\ta b\\n.jsonl:7\n"


@pytest.mark.parametrize(
    "change", [lambda b: b[:-9], lambda b: b"", lambda b: b"x" + b, lambda b: gzip.compress(b"1\t2\n")]
)
def test_a_damaged_index_is_reported_with_its_path(change, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r"x/train-000000\.documents\.gz: damaged"):
        parse_documents(change(written([IndexedDocument(0, 3, bytes(16), "p")])), "x/train-000000.documents.gz")
