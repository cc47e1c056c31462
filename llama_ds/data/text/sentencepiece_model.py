"""Sentencepiece models (LLaMA 1 and 2, tools/tokenizer.py train): encoding, decoding and training."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import sentencepiece

SPACE_MARK = "\u2581"  # how sentencepiece spells a space; it decodes this mark in a text to a space
SAMPLE = "  Two  spaces, ﬁne ｆｕｌｌ e\u0301 end "  # changes if a model normalizes


class VocabularyPiece(NamedTuple):
    """One vocabulary entry as sentencepiece spells it: a space is SPACE_MARK."""

    text: str
    score: float  # BPE merges the pair whose concatenation scores highest first
    ordinary: bool  # not a byte, a control id or the unknown id


class SentencepieceModel:
    """A sentencepiece model. Names of control ids in a text ("<s>") are text."""

    KIND = "sentencepiece"

    def __init__(self, content: bytes) -> None:
        """Load a serialized model.

        Raises:
            RuntimeError: it is none.
        """
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(content)
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id()))
        self._mark_ids = self._space_mark_ids()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        if not self._mark_ids or SPACE_MARK not in text:
            return self._model.encode(text)
        first, *others = (self._model.encode(part) for part in text.split(SPACE_MARK))
        return first + [i for part in others for i in (*self._mark_ids, *part)]

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of `encode` without creating a Python object for each."""
        if self._mark_ids and SPACE_MARK in text:
            return np.array(self.encode(text), np.int32)
        return self._model.encode(text, out_type="numpy")

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return self._model.decode(ids)

    def last_cut(self, text: str) -> int:
        """Return the last position between two characters that no piece contains side by side; 0: there is none.

        BPE without normalization cannot merge across it. A model that prepends a space to every text is cut before a
        space, which `rest` leaves out.
        """
        if self._joined is None:
            return 0
        spelled = text.replace(SPACE_MARK, " ") if self.prefixed else text
        for position in range(len(text) - 1, 0, -1):
            pair = spelled[position - 1 : position + 1]
            if pair not in self._joined and (not self.prefixed or (text[position] == " " and pair != "  ")):
                return position
        return 0

    def rest(self, text: str) -> str:
        """Return what to encode for the part of a text after a cut."""
        return text[1:] if self.prefixed else text

    def pieces(self) -> list[VocabularyPiece]:
        """Return the vocabulary by id."""
        model = self._model
        special = (model.is_byte, model.is_control, model.is_unknown, model.is_unused)
        return [
            VocabularyPiece(model.id_to_piece(i), model.get_score(i), not any(test(i) for test in special))
            for i in range(self.vocab_size)
        ]

    @cached_property
    def prefixed(self) -> bool:
        """Whether the model prepends a space to every text, as the original LLaMA tokenizer does."""
        return self._model.normalize("a").startswith(SPACE_MARK)  # not its ids: "a" need not be a piece

    @cached_property
    def _joined(self) -> frozenset[str] | None:
        """The pairs of neighbouring characters inside pieces; None: texts of this model cannot be cut."""
        pieces = self.pieces()
        # Other models score by log probabilities.
        is_bpe = all(piece.score == int(piece.score) for piece in pieces if piece.ordinary)
        if not is_bpe or self.decode(self.encode(SAMPLE)) != SAMPLE:
            return None
        texts = [piece.text.replace(SPACE_MARK, " ") for piece in pieces]
        return frozenset(text[i : i + 2] for text in texts for i in range(len(text) - 1))

    def _space_mark_ids(self) -> list[int]:
        # Byte pieces are decoded verbatim, so a mark encoded as bytes survives. Models that prepend a space to a text
        # (the original LLaMA tokenizer) would prepend one to every part, so for them marks are not encoded as bytes.
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        return [] if self._model.unk_id() in ids or self.prefixed else ids


def train(sentences: Iterable[str], vocab_size: int) -> bytes:
    """Return a serialized BPE model as in LLaMA: digits split, byte fallback, and lossless.

    Raises:
        RuntimeError: the trainer's error, or one that `sentences` raised, in the trainer's words.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
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
    return model.getvalue()
