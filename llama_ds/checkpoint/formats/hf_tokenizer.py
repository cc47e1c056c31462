"""Conversion of a sentencepiece BPE model to Hugging Face's tokenizer.json, with equal ids for every text.

Differences between the two libraries that matter here:
- sentencepiece spells a space as U+2581. The vocabulary here spells it " ", so a literal U+2581 in a text stays
  distinct: it becomes its three bytes, as in `llama_ds.data.text.sentencepiece_model`.
- sentencepiece merges any two neighbours whose concatenation is a piece, by best score and then leftmost position.
  Here every split of every piece is a merge, in the order of the pieces' scores.
- sentencepiece treats names of control ids in a text ("<s>") as text; split_special_tokens does the same here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import tokenizers

SPACE_MARK = "\u2581"
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
# Covers everything in which sentencepiece models differ: normalisation, spaces, digits, bytes, control names, U+2581.
PROBE = "  Two  spaces, ﬁne 2048 ｆｕｌｌ e\u0301é 漢字 😀\t\x00\r\n\u3000<s>\u2581 end "


class Sentencepiece(Protocol):
    """Interface of a sentencepiece model, as implemented by `llama_ds.data.text.sentencepiece_model`."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def pieces(self) -> Sequence[tuple[str, float, bool]]:
        """Return the vocabulary by id in the form that `tokenizer_json` accepts."""

    @property
    def prefixed(self) -> bool:
        """Whether the model puts a space before every text."""


def imitation(ours: Sentencepiece) -> dict[str, Any] | None:
    """Return the content of tokenizer.json for a sentencepiece model; None if it would give different ids."""
    pieces = ours.pieces()
    if not {UNK, BOS, EOS} <= {piece[0] for piece in pieces}:
        return None
    content = tokenizer_json(pieces, ours.prefixed)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True  # the effect of split_special_tokens
    return content if theirs.encode(PROBE, add_special_tokens=False).ids == ours.encode(PROBE) else None


def tokenizer_json(pieces: Sequence[tuple[str, float, bool]], prefixed: bool) -> dict[str, Any]:
    """Return the content of tokenizer.json.

    Args:
        pieces: by id, (text in sentencepiece's spelling, score, ordinary: neither byte nor control nor unknown id).
        prefixed: the model puts a space before every text (LLaMA's original does), and reads U+2581 as a space.
    """
    vocabulary = {text.replace(SPACE_MARK, " "): i for i, (text, _, _) in enumerate(pieces)}
    ordinary = {text.replace(SPACE_MARK, " "): score for text, score, ordinary in pieces if ordinary}
    prefix = [_step("Prepend", prepend=" "), _step("Replace", pattern={"String": SPACE_MARK}, content=" ")]
    strip = [_step("Strip", content=" ", start=1, stop=0)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_control(vocabulary[name], name) for name in (UNK, BOS, EOS)],
        "normalizer": _step("Sequence", normalizers=prefix) if prefixed else None,
        "pre_tokenizer": None,
        "post_processor": _begin_with_bos(vocabulary[BOS]),
        "decoder": _step("Sequence", decoders=[_step("ByteFallback"), _step("Fuse"), *(strip if prefixed else [])]),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(ordinary),
        },
    }


def tokenizer_config(bos: str = BOS, eos: str = EOS, **others: str) -> dict[str, Any]:
    """Return the content of the tokenizer_config.json of a converted tokenizer; `others` are its other tokens."""
    return {
        # Not LlamaTokenizer: transformers 5 would replace our normalizer and pre-tokenizer by its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        **others,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return every pair of pieces whose concatenation is a piece, best score first.

    Pairs with the same concatenation share one rank in sentencepiece and have two here. They compete if three
    neighbours a b c contain the piece twice, as ab and as bc. The leftmost, (a, b), must win; its rival (b, c) is the
    pair whose left part is also the end of the piece.
    """
    merges = []
    for piece in sorted((p for p in scores if len(p) > 1), key=lambda p: -scores[p]):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(left, right) for left, right in cuts if left in scores and right in scores]
        merges += sorted(pairs, key=lambda pair: piece.endswith(pair[0]))
    return merges


def _begin_with_bos(bos: int) -> dict[str, Any]:
    first, text = {"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    special = {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}}
    return _step("TemplateProcessing", single=[first, text], pair=[first, text, second], special_tokens=special)


def _control(index: int, name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": name, **flags}


def _step(kind: str, **settings: Any) -> dict[str, Any]:
    return {"type": kind, **settings}
