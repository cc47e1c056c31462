"""SentencePiece BPE as in LLaMA: split digits, byte fallback, and lossless: decode(encode(x)) == x."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece

from llama_ds.data.text.corpus import cut_at_lines, documents, source_files
from llama_ds.errors import UserError

SPACE_MARK = "\u2581"  # how sentencepiece spells a space; it decodes this mark in a text to a space
SENTENCE_CHARS = 2000  # the trainer skips very long sentences, and merges never cross whitespace: any cut is valid


class VocabularyPiece(NamedTuple):
    """One vocabulary entry as sentencepiece spells it: a space is SPACE_MARK."""

    text: str
    score: float  # BPE merges the pair whose concatenation scores highest first
    ordinary: bool  # not a byte, a control id or the unknown id


class Tokenizer:
    """A trained sentencepiece model: text to ids and back.

    With a model from `train_tokenizer`, decode(encode(x)) == x for every str that can be written as UTF-8.

    Raises:
        UserError: the file is missing or not a sentencepiece model.
    """

    def __init__(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                model = file.read()
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(model)
        except OSError as error:
            raise UserError(
                f"{path}: cannot read the tokenizer ({error.strerror}); train one with tools/tokenizer.py train"
            ) from None
        except RuntimeError:
            raise UserError(
                f"{path}: not a sentencepiece model, or a damaged one ({len(model)} bytes); "
                "train one with tools/tokenizer.py train"
            ) from None
        self.path = path
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self._mark_ids = self._space_mark_ids()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without bos and eos."""
        if not self._mark_ids or SPACE_MARK not in text:
            return self._model.encode(text)
        first, *others = (self._model.encode(part) for part in text.split(SPACE_MARK))
        return first + [i for part in others for i in (*self._mark_ids, *part)]

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of `encode` as int32, without creating a Python object per id."""
        if self._mark_ids and SPACE_MARK in text:
            return np.array(self.encode(text), np.int32)
        return self._model.encode(text, out_type="numpy")

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of each text, in order, encoded on `threads` threads."""
        ids = self._model.encode(list(texts), num_threads=threads)
        if self._mark_ids:
            for i, text in enumerate(texts):
                if SPACE_MARK in text:
                    ids[i] = self.encode(text)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`; bos and eos add nothing, invalid UTF-8 becomes U+FFFD."""
        return self._model.decode([int(i) for i in ids])

    def pieces(self) -> list[VocabularyPiece]:
        """Return the vocabulary by id, for conversion to other formats."""
        model = self._model
        special = (model.is_byte, model.is_control, model.is_unknown, model.is_unused)
        return [
            VocabularyPiece(model.id_to_piece(i), model.get_score(i), not any(test(i) for test in special))
            for i in range(self.vocab_size)
        ]

    @property
    def prefixed(self) -> bool:
        """Whether the model prepends a space to every text, as the original LLaMA tokenizer does."""
        return self._model.normalize("a").startswith(SPACE_MARK)  # not its ids: "a" need not be a piece

    def _space_mark_ids(self) -> list[int]:
        # Byte pieces are decoded verbatim, so a mark encoded as bytes survives. Models that prepend a space to a text
        # (the original LLaMA tokenizer) would prepend one to every part, so for them marks are not encoded as bytes.
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        return [] if self._model.unk_id() in ids or self.prefixed else ids


def train_tokenizer(patterns: Sequence[str], out_prefix: str, vocab_size: int, sample_mb: float = 16.0) -> str:
    """Train a BPE tokenizer on an even sample of about `sample_mb` of the documents; write out_prefix.model.

    ids: unk 0, bos 1, eos 2, then 256 bytes, then merges; no padding id. The result is deterministic.

    Returns:
        The path of the model.

    Raises:
        UserError: a document is bad, or the vocabulary is too large for the text or too small for its characters.
    """
    model = io.BytesIO()
    sample = _Sample(patterns, sample_mb * 1e6)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            # Without a piece of its own a space becomes the bytes of SPACE_MARK, and is decoded to that mark.
            required_chars=SPACE_MARK,
            split_digits=True,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            # The next three settings make it lossless: no normalization, runs of spaces kept, no prepended space.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=1,  # stored in the model, so it would change the checksum
            minloglevel=2,
        )
    except RuntimeError as error:
        if sample.error:  # a bad document, which the trainer reports in its own words
            raise sample.error from None
        problem = f"vocab_size = {vocab_size} does not suit {' '.join(patterns)}"
        raise UserError(f"{problem}: {_vocab_limit(str(error))}") from None
    path = f"{out_prefix}.model"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.tmp", "wb") as file:
        file.write(model.getvalue())
    os.replace(f"{path}.tmp", path)
    return path


class _Sample:
    """Iterates over an even sample of about `limit` bytes of the documents; `error` is what ended it early."""

    def __init__(self, patterns: Sequence[str], limit: float) -> None:
        self._patterns, self._limit = patterns, limit
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._pieces()
        except Exception as error:
            self.error = error
            raise

    def _pieces(self) -> Iterator[str]:
        # Take every k-th piece of all documents, k = size / limit, with an accumulator: deterministic and in one pass.
        size = sum(os.path.getsize(path) for pattern in self._patterns for path in source_files(pattern))
        share, credit = min(1.0, self._limit / size) if size else 1.0, 0.5
        for pattern in self._patterns:
            for document in documents(pattern):
                for piece in cut_at_lines(document.text, SENTENCE_CHARS):
                    credit += share
                    if credit >= 1.0:
                        credit -= 1.0
                        yield piece


def _vocab_limit(error: str) -> str:
    # The trainer's messages for its two limits: "... too high (N). ... <= MAX" and "... smaller ... N vs MIN. ..."
    if largest := re.search(r"too high .*<= (\d+)", error):
        return f"its text makes {largest[1]} pieces; use at most {largest[1]}, or more text"
    if smallest := re.search(r"smaller than .* vs (\d+)", error):
        return f"bytes and the distinct characters alone are {smallest[1]} ids; use more than {smallest[1]}"
    return f"the trainer reports: {error.strip().splitlines()[-1]}"
