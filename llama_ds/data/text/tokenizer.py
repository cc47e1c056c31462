"""Tokenizers of every kind: text to ids and back.

`Tokenizer` recognizes a file by its content and passes each call on to the class of its kind: `sentencepiece_model.py`,
`tokenizer_json.py` or `tiktoken_ranks.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from llama_ds.atomic_files import write_atomically
from llama_ds.config.document_marks import DocumentMarks
from llama_ds.data.text import sentencepiece_model, tokenizer_json
from llama_ds.data.text.corpus import cut_at_lines, documents
from llama_ds.data.text.cuts import Cuts
from llama_ds.data.text.formats import ReadOptions
from llama_ds.data.text.input_storage import input_size
from llama_ds.data.text.inputs import find_inputs
from llama_ds.data.text.sentencepiece_model import SentencepieceModel
from llama_ds.data.text.tiktoken_ranks import TiktokenRanks, is_tiktoken
from llama_ds.data.text.tokenizer_json import TokenizerJson, is_json
from llama_ds.errors import UserError

MODEL = "tokenizer.model"  # name of a tokenizer's copy in a checkpoint, except that of a tokenizer.json
SENTENCE_CHARS = 2000  # the trainer skips very long sentences, and merges never cross whitespace: any cut is valid


class Vocabulary(Protocol):
    """Interface of the kinds of tokenizers."""

    KIND: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without bos and eos."""

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of `encode` as an array of integers."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; bos, eos and ids above the vocabulary add nothing, invalid UTF-8 becomes U+FFFD."""

    @property
    def cuts(self) -> Cuts | None:
        """Where a text may be cut without a change of its ids; None: nowhere that is certain."""


class Tokenizer:
    """A tokenizer file of any kind.

    With a model from `train_tokenizer`, decode(encode(x)) == x for every str that can be written as UTF-8.

    Raises:
        UserError: the file is missing, damaged or of no known kind.
    """

    def __init__(self, path: str) -> None:
        content = _read(path)
        self.path = path
        self.vocabulary: Vocabulary = _vocabulary(path, content)
        self.kind = self.vocabulary.KIND
        self.vocab_size = self.vocabulary.vocab_size
        self.bos_id, self.eos_id = self.vocabulary.bos_id, self.vocabulary.eos_id
        if isinstance(self.vocabulary, TokenizerJson):  # its bos and eos stand in other files
            content += json.dumps([self.bos_id, self.eos_id]).encode()
        self.sha256 = hashlib.sha256(content).hexdigest()

    @property
    def marks(self) -> DocumentMarks:
        """The ids that mark documents.

        Raises:
            UserError: the tokenizer has no eos, or it is not known.
        """
        if self.eos_id is None:
            fix = "train one with tools/tokenizer.py train"
            if isinstance(self.vocabulary, TokenizerJson):
                where = os.path.join(os.path.dirname(self.path), tokenizer_json.CONFIG)
                fix = f'set eos_token in {where}, and bos_token if it has one: {{"eos_token": "..."}}'
            raise UserError(f"{self.path}: names no eos id, which ends every document; {fix}")
        return DocumentMarks(self.bos_id, self.eos_id)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without bos and eos."""
        return self.vocabulary.encode(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of `encode` as an array of integers."""
        return self.vocabulary.encode_array(text)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of each text, in order, encoded on `threads` threads."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`; bos, eos and ids above the vocabulary add nothing, invalid UTF-8 becomes U+FFFD."""
        return self.vocabulary.decode([int(i) for i in ids])

    @property
    def cuts(self) -> Cuts | None:
        """Where a text may be cut without a change of its ids; None: nowhere that is certain."""
        return self.vocabulary.cuts


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except IsADirectoryError:
        names = (tokenizer_json.FILE, MODEL)
        raise UserError(f"{path}: is a folder; name the tokenizer in it: {' or '.join(names)}") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the tokenizer ({error.strerror}); train one with tools/tokenizer.py train"
        ) from None


def _vocabulary(path: str, content: bytes) -> Vocabulary:
    if is_json(content):
        return TokenizerJson(path, content)
    if is_tiktoken(content):
        return TiktokenRanks(path, content)
    try:
        return SentencepieceModel(content)
    except RuntimeError:
        raise UserError(
            f"{path}: not a sentencepiece model, a tokenizer.json or Llama 3's tokenizer.model, or a damaged one "
            f"({len(content)} bytes); copy it again, or train one with tools/tokenizer.py train"
        ) from None


def tokenizer_files(path: str) -> dict[str, bytes]:
    """Return the files that hold a tokenizer in a checkpoint, by name.

    Raises:
        UserError: the file cannot be read, or it is a damaged tokenizer.json.
    """
    content = _read(path)
    if not is_json(content):
        return {MODEL: content}
    names = TokenizerJson(path, content).special_names()
    return {tokenizer_json.FILE: content, **tokenizer_json.files_beside(path, names)}


def train_tokenizer(
    patterns: Sequence[str],
    out_prefix: str,
    vocab_size: int,
    sample_mb: float = 16.0,
    options: ReadOptions | None = None,
) -> str:
    """Train a BPE tokenizer on an even sample of about `sample_mb` of the documents; write out_prefix.model.

    ids: unk 0, bos 1, eos 2, then 256 bytes, then merges; no padding id. The result is deterministic.

    Returns:
        The path of the model.

    Raises:
        UserError: a document is bad, or the vocabulary is too large for the text or too small for its characters.
    """
    sample = _Sample(patterns, sample_mb * 1e6, options or ReadOptions())
    try:
        model = sentencepiece_model.train(sample, vocab_size)
    except RuntimeError as error:
        if sample.error:  # a bad document, which the trainer reports in its own words
            raise sample.error from None
        problem = f"vocab_size = {vocab_size} does not suit {' '.join(patterns)}"
        raise UserError(f"{problem}: {_vocab_limit(str(error))}") from None
    path = f"{out_prefix}.model"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_atomically(path, model)
    return path


class _Sample:
    """Iterates over an even sample of about `limit` bytes of the documents; `error` is what ended it early."""

    def __init__(self, patterns: Sequence[str], limit: float, options: ReadOptions) -> None:
        self._patterns, self._limit, self._options = patterns, limit, options
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._pieces()
        except Exception as error:
            self.error = error
            raise

    def _pieces(self) -> Iterator[str]:
        # Take every k-th piece of all documents, k = size / limit, with an accumulator: deterministic and in one pass.
        paths = [path for pattern in self._patterns for path in find_inputs(pattern, self._options).paths]
        size = sum(input_size(path) for path in paths)
        share, credit = min(1.0, self._limit / size) if size else 1.0, 0.5
        for pattern in self._patterns:
            for document in documents(pattern, options=self._options):
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
