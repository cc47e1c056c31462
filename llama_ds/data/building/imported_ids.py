"""Importing documents whose ids were made by another program with the same tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llama_ds.data.text.megatron import MegatronFile, open_megatron
from llama_ds.data.text.piece_reader import EMPTY_DOCUMENT, LeftOut, TextPiece
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

CHECKED = 64  # documents of a piece whose texts are encoded again, to compare the vocabularies
CHECKED_IDS = 1 << 16  # longer documents are not encoded again


class ImportedIds:
    """Iterates over (line, ids, text) of a piece; the ids are without bos and eos at their ends.

    Raises:
        UserError: the file is damaged, its ids are of another vocabulary, or a document is empty or holds bos or eos.
    """

    def __init__(self, piece: TextPiece, tokenizer: Tokenizer, skip_bad: bool) -> None:
        self.piece = piece
        self.lines = 0
        self.share = 0.0
        self.left_out: dict[str, LeftOut] = {}
        self._tokenizer, self._skip_bad = tokenizer, skip_bad

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, str]]:
        file = open_megatron(self.piece.path)
        first, stop = self.piece.start, len(file) if self.piece.stop is None else self.piece.stop
        self._check_vocabulary(file, first, stop)
        for ids in file.documents(first, stop):
            self.lines += 1
            self.share = self.lines / (stop - first)
            ids = self._bare(ids)
            if reason := self._problem(ids):
                if not self._skip_bad:
                    raise UserError(f"{self.where(self.lines)}: {reason}; leave such documents out with --skip-bad")
                self.left_out.setdefault(reason, LeftOut(0, self.lines)).count += 1
            else:
                yield self.lines, ids, self._tokenizer.decode(ids)

    def _bare(self, ids: np.ndarray) -> np.ndarray:
        """Return the ids without a bos at the start and an eos at the end; a build adds its own."""
        ids = ids[1:] if len(ids) and ids[0] == self._tokenizer.bos_id else ids
        return ids[:-1] if len(ids) and ids[-1] == self._tokenizer.eos_id else ids

    def _problem(self, ids: np.ndarray) -> str:
        if not len(ids):
            return EMPTY_DOCUMENT
        if outside := self._outside(ids):
            size = self._tokenizer.vocab_size
            raise UserError(self._other(self.where(self.lines), f"id {outside[0]} is outside 0 to {size - 1}"))
        marks = [i for i in (self._tokenizer.bos_id, self._tokenizer.eos_id) if i is not None]
        special = np.isin(ids, marks)
        return "bos or eos within a document" if special.any() else ""

    def _outside(self, ids: np.ndarray) -> list[int]:
        """Return the least and the greatest id if they are not ids of the vocabulary."""
        return [i for i in (int(ids.min()), int(ids.max())) if not 0 <= i < self._tokenizer.vocab_size]

    def _check_vocabulary(self, file: MegatronFile, first: int, stop: int) -> None:
        """Compare the ids of the first documents with those that the tokenizer gives for their texts."""
        same = checked = 0
        for ids in file.documents(first, min(stop, first + CHECKED)):
            ids = self._bare(ids)
            if 0 < len(ids) <= CHECKED_IDS and not self._outside(ids):
                checked += 1
                same += np.array_equal(self._tokenizer.encode_array(self._tokenizer.decode(ids)), ids)
        if 2 * same < checked:
            why = f"only {same} of {checked} documents are encoded to their ids again"
            raise UserError(self._other(self.piece.path, why))

    def _other(self, where: str, why: str) -> str:
        return f"{where}: its ids are not of the tokenizer {self._tokenizer.path} ({why}); name the one that made them"

    def where(self, line: int) -> str:
        """Return file:document, counted from the start of the file."""
        return f"{self.piece.path}:{self.piece.start + line}"
