"""Sentencepiece models (LLaMA 1 and 2, tools/tokenizer.py train): encoding, decoding and training."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from llama_ds.data.text.cuts import UnjoinedCuts

SPACE_MARK = "\u2581"  # how sentencepiece spells a space; it decodes this mark in a text to a space


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
        self._proto = content
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id()))
        self.unk_id: int = self._model.unk_id()
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else None
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
        """Return the text of ids; those of padding rows, which the model does not have, add nothing."""
        return self._model.decode([i for i in ids if i < self.vocab_size])

    @cached_property
    def cuts(self) -> UnjoinedCuts | None:
        """Where a text may be cut without a change of its ids; None: nowhere that is certain.

        Certain are cuts for BPE without normalization, if no character is unknown: unknown ones would be joined.
        """
        normalizer, trainer = self._settings.normalizer_spec, self._settings.trainer_spec
        normalizes = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
        if trainer.model_type != trainer.BPE or normalizes or not normalizer.escape_whitespaces:
            return None
        if self._model.unk_id() in (self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)):
            return None
        texts = [piece.text.replace(SPACE_MARK, " ") for piece in self.pieces()]
        adjacent = frozenset(text[i : i + 2] for text in texts for i in range(len(text) - 1))
        return UnjoinedCuts(adjacent, SPACE_MARK, normalizer.add_dummy_prefix)

    def piece_types(self) -> list[int]:
        """Return the type of each piece: 1 ordinary, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""
        return [int(piece.type) for piece in self._settings.pieces]

    def beyond_merges(self) -> list[str]:
        """Return what the model does besides merging characters by score, as predicates; LLaMA's does nothing else."""
        normalizer, trainer = self._settings.normalizer_spec, self._settings.trainer_spec
        found = {
            "is no BPE model": trainer.model_type != trainer.BPE,
            f"normalizes texts ({normalizer.name})": bool(normalizer.precompiled_charsmap),
            "removes white space": normalizer.remove_extra_whitespaces,
            "does not write spaces as U+2581": not normalizer.escape_whitespaces,
            "puts the space of a word behind it": trainer.treat_whitespace_as_suffix,
            "has no pieces for bytes": 6 not in self.piece_types(),
            "has unused pieces": 5 in self.piece_types(),
        }
        return [what for what, does in found.items() if does]

    @cached_property
    def _settings(self) -> Any:
        from sentencepiece import sentencepiece_model_pb2

        return sentencepiece_model_pb2.ModelProto.FromString(self._proto)

    def pieces(self) -> list[VocabularyPiece]:
        """Return the vocabulary by id."""
        model = self._model
        special = (model.is_byte, model.is_control, model.is_unknown, model.is_unused)
        return [
            VocabularyPiece(model.id_to_piece(i), model.get_score(i), not any(test(i) for test in special))
            for i in range(self.vocab_size)
        ]

    @property
    def controls(self) -> list[int]:
        """The ids whose names in a text are text: bos, eos, padding and other control ids."""
        return [i for i in range(self.vocab_size) if self._model.is_control(i)]

    @cached_property
    def user_defined(self) -> list[int]:
        """The ids of pieces that are found in a text before any merge."""
        pieces = self._settings.pieces
        # A piece with a space itself is found nowhere, because spaces have become SPACE_MARK by then.
        return [i for i, piece in enumerate(pieces) if piece.type == piece.USER_DEFINED and " " not in piece.piece]

    @cached_property
    def prefixed(self) -> bool:
        """Whether the model prepends a space to every text, as the original LLaMA tokenizer does."""
        return self._model.normalize("a").startswith(SPACE_MARK)  # not its ids: "a" need not be a piece

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
