"""A long text that is encoded in pieces has the ids of the whole text, and needs little memory."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from built_sources import SEQ_LEN, Built
from hypothesis import given
from hypothesis import strategies as st
from source_files import index_of, streams, write_lines

from llama_ds.data.building import tokenized
from llama_ds.data.building.build import build_source
from llama_ds.data.building.tokenized import in_validation
from llama_ds.data.text import cuts
from llama_ds.data.text.corpus import cut_at_lines, documents
from llama_ds.data.text.cuts import PIECE_CHARS, pieces_of
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

ODD = [
    "\u2581",
    "\u2581 ",
    " \u2581",
    "  ",
    "   ",
    "\n",
    " \n\n",
    "\r\n",
    "日本語",
    "\U0001f600",
    "é",
    "e\u0301",
    "\u3000",
    "7",
]


@pytest.fixture(scope="module")
def model(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    folder = tmp_path_factory.mktemp("models")

    def train(**settings: object) -> Tokenizer:
        file = io.BytesIO()
        defaults = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                    "remove_extra_whitespaces": False}  # fmt: skip
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([d.text[:2000] for d in documents(built.code)]),
            **{"model_writer": file, "vocab_size": 700, "minloglevel": 2, **defaults, **settings},
        )
        path = folder / f"{len(list(folder.iterdir()))}.model"
        path.write_bytes(file.getvalue())
        return Tokenizer(str(path))

    return train


@pytest.mark.parametrize("kind", ["ours", "with a space before the text", "with spaces inside pieces"])
def test_pieces_have_the_ids_of_the_whole(built: Built, model: Callable[..., Tokenizer], kind: str) -> None:
    if kind == "ours":
        tokenizer = Tokenizer(built.tokenizer)
    else:  # as the original LLaMA has it, or with a vocabulary that joins words
        tokenizer = model(split_by_whitespace=kind.startswith("with a space"), allow_whitespace_only_pieces=True)
    draw = random.Random(kind)
    pieces = [p.text.replace("\u2581", " ") for p in tokenizer.vocabulary.pieces() if p.ordinary]
    assert (kind == "with spaces inside pieces") == any(" " in piece.strip() for piece in pieces)
    several = 0
    for _ in range(1000):
        text = "".join(draw.choices([*pieces, *ODD * 5], k=draw.randrange(1, 60)))
        parts = list(pieces_of(text, tokenizer.cuts, draw.randrange(1, 60)))
        several += len(parts) > 1
        assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text), (text, parts)
    assert several > 500


@pytest.mark.parametrize(
    "settings",
    [{"model_type": "unigram"}, {"byte_fallback": False}, {"normalization_rule_name": "nmt_nfkc"},
     {"remove_extra_whitespaces": True}],
)  # fmt: skip
def test_a_tokenizer_whose_ids_depend_on_distant_text_gets_it_whole(
    model: Callable[..., Tokenizer], settings: dict[str, object]
) -> None:
    assert model(**settings).cuts is None


def test_texts_are_cut_to_pieces_of_the_size_where_possible(built: Built) -> None:
    tokenizer = Tokenizer(built.tokenizer)
    text = "It was the 7th day of the voyage. " * 5000
    assert max(map(len, pieces_of(text, tokenizer.cuts, 1000))) <= 1000
    assert list(pieces_of(text, None, 1000)) == [text]
    assert list(pieces_of("e" * 3000, cuts.UnjoinedCuts(frozenset(["ee"])), 1000)) == ["e" * 3000]
    parts = list(pieces_of("e" * 1500 + "7" + "e" * 200, cuts.UnjoinedCuts(frozenset(["ee"])), 1000))
    assert parts == ["e" * 1500, "7" + "e" * 200]


def test_a_build_of_a_long_document_gives_the_ids_of_the_whole(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(d.text for d in documents(built.code)) * 20
    assert len(text) > 2 * PIECE_CHARS
    (tmp_path / "a.txt").write_bytes(text.encode())
    tokenizer, sizes = Tokenizer(built.tokenizer), []
    encode = Tokenizer.encode_array

    def encode_array(self: Tokenizer, text: str) -> np.ndarray:
        sizes.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(tokenized.Tokenizer, "encode_array", encode_array)
    build_source("s", str(tmp_path / "a.txt"), built.tokenizer, str(tmp_path), SEQ_LEN, 0.0)
    assert streams(tmp_path / "s", "train")[0].tolist() == [1, *tokenizer.encode(text), 2]
    assert len(sizes) > 2 and max(sizes) <= PIECE_CHARS


def test_documents_of_all_lengths_keep_their_order_and_places(built: Built, tmp_path: Path) -> None:
    """Short ones are encoded together, long ones in pieces, and a file of one text ends a batch."""
    texts = [f"{i} " * (i * 7919 % 900) + f"text {i}" for i in range(400)]
    texts[100] = texts[250] = "a long one " * (PIECE_CHARS // 8)
    (tmp_path / "in").mkdir()
    write_lines(tmp_path / "in" / "a.jsonl", texts)
    (tmp_path / "in" / "b.txt").write_text("a single text")
    build_source("s", str(tmp_path / "in"), built.tokenizer, str(tmp_path), SEQ_LEN, 0.3)
    tokenizer = Tokenizer(built.tokenizer)
    for split, held_out in (("train", False), ("validation", True)):
        mine = [
            (f"{tmp_path}/in/a.jsonl:{i}", text)
            for i, text in enumerate(texts, 1)
            if in_validation(text, 0.3) == held_out
        ]
        if in_validation("a single text", 0.3) == held_out:
            mine.append((f"{tmp_path}/in/b.txt", "a single text"))
        wanted = [[1, *tokenizer.encode(text), 2] for _, text in mine]
        assert streams(tmp_path / "s", split)[0].tolist() == [i for ids in wanted for i in ids]
        found = {d.place: (d.length, d.digest) for d in index_of(tmp_path / "s", split, 0)}
        digests = [hashlib.sha256(text.encode()).digest()[:16] for _, text in mine]
        assert found == {place: (len(ids), d) for (place, _), ids, d in zip(mine, wanted, digests, strict=True)}


def test_a_text_that_cannot_be_encoded_is_named(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode_array(self: Tokenizer, text: str) -> np.ndarray:
        if "bad" in text:
            raise UserError("no ids")
        return np.zeros(3, np.uint32)

    write_lines(tmp_path / "a.jsonl", ["good", "x bad", "good"])
    monkeypatch.setattr(tokenized.Tokenizer, "encode_array", encode_array)
    with pytest.raises(UserError, match=r"^\S*a\.jsonl:2: no ids, or leave such documents out with --skip-bad$"):
        build_source("s", str(tmp_path / "a.jsonl"), built.tokenizer, str(tmp_path), SEQ_LEN, 0.0)


@given(st.text(st.sampled_from("ab\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029 ")), st.integers(1, 9))
def test_texts_are_cut_where_lines_end(text: str, max_chars: int) -> None:
    lines = text.splitlines(keepends=True)
    pieces, expected = list(cut_at_lines(text, max_chars)), [""]
    for line in lines:
        if expected[-1] and len(expected[-1]) + len(line) > max_chars:
            expected.append("")
        expected[-1] += line
    assert pieces == (expected if text else [])
