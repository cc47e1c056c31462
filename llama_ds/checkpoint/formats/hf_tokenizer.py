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
from dataclasses import dataclass
from typing import Any, Protocol

import tokenizers

SPACE_MARK = "\u2581"
# Covers everything in which sentencepiece models differ: normalisation, spaces, digits, bytes, control names, U+2581.
PROBE = "  Two  spaces, ﬁne 2048 ｆｕｌｌ e\u0301é 漢字 😀\t\x00\r\n\u3000<s>\u2581 end "
# LlamaTokenizer replaces the normalizer and pre-tokenizer of a tokenizer.json by its own, so that its ids would differ.
# The constructor of a tokenizer refuses a setting with the name of something callable in its class. These names are
# callable in LlamaTokenizer only (`model` in transformers 5, `get_spm_processor` in 4), which thus fails with an error.
ONLY_AUTO = dict.fromkeys(("model", "get_spm_processor"), "load this tokenizer with AutoTokenizer, not LlamaTokenizer")


class Sentencepiece(Protocol):
    """Interface of a sentencepiece model, as implemented by `llama_ds.data.text.sentencepiece_model`."""

    unk_id: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def pieces(self) -> Sequence[tuple[str, float, bool]]:
        """Return the vocabulary by id in the form that `tokenizer_json` accepts."""

    @property
    def prefixed(self) -> bool:
        """Whether the model puts a space before every text."""

    @property
    def controls(self) -> list[int]:
        """The ids whose names in a text are text."""

    @property
    def user_defined(self) -> list[int]:
        """The ids of pieces that are found in a text before any merge."""


@dataclass(frozen=True)
class SpecialPieces:
    """Ids with a meaning of their own; the default is LLaMA's."""

    unk: int = 0
    begin: int | None = 1  # id before every text; None: nothing is
    end: int | None = None  # id after every text; None: nothing is
    controls: Sequence[int] = (1, 2)
    user_defined: Sequence[int] = ()


def imitation(ours: Sentencepiece, bos: bool | None = None, eos: bool = False) -> dict[str, Any] | None:
    """Return the content of tokenizer.json for a sentencepiece model; None if it would give different ids.

    `bos` and `eos` say whether a text gets these ids; None: as a document of the training does.
    """
    pieces = ours.pieces()
    begins = ours.bos_id != ours.eos_id if bos is None else bos  # as `DocumentMarks.begin`
    begin, end = ours.bos_id if begins else None, ours.eos_id if eos else None
    special = SpecialPieces(ours.unk_id, begin, end, ours.controls, ours.user_defined)
    content = tokenizer_json(pieces, ours.prefixed, special)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True  # the effect of split_special_tokens
    names = [pieces[i][0].replace(SPACE_MARK, " ") for i in (*ours.user_defined, *ours.controls)]
    probe = PROBE + "".join(f"{name} a{name}" for name in names)
    return content if theirs.encode(probe, add_special_tokens=False).ids == ours.encode(probe) else None


def tokenizer_json(
    pieces: Sequence[tuple[str, float, bool]], prefixed: bool, special: SpecialPieces | None = None
) -> dict[str, Any]:
    """Return the content of tokenizer.json.

    Args:
        pieces: by id, (text in sentencepiece's spelling, score, ordinary: neither byte nor control nor unknown id).
        prefixed: the model puts a space before every text (LLaMA's original does), and reads U+2581 as a space.
        special: the ids that are not ordinary, or are found before any merge; None: LLaMA's.
    """
    special = special or SpecialPieces()
    names = [text.replace(SPACE_MARK, " ") for text, _, _ in pieces]
    # A piece with a space itself is never found: sentencepiece looks for pieces when spaces have become SPACE_MARK.
    ordinary = {names[i]: score for i, (text, score, ordinary) in enumerate(pieces) if ordinary and " " not in text}
    prefix = [_step("Prepend", prepend=" "), _step("Replace", pattern={"String": SPACE_MARK}, content=" ")]
    strip = [_step("Strip", content=" ", start=1, stop=0)]
    added = [(i, True) for i in {special.unk, *special.controls}] + [(i, False) for i in special.user_defined]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, names[i], is_special) for i, is_special in sorted(added)],
        "normalizer": _step("Sequence", normalizers=prefix) if prefixed else None,
        "pre_tokenizer": None,
        "post_processor": _frame(special.begin, special.end, names),
        "decoder": _step("Sequence", decoders=[_step("ByteFallback"), _step("Fuse"), *(strip if prefixed else [])]),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[special.unk],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": _merges(ordinary),
        },
    }


def sentencepiece_config(ours: Sentencepiece) -> dict[str, Any]:
    """Return the content of tokenizer_config.json for a sentencepiece model and the tokenizer.json made of it."""
    pieces = ours.pieces()
    ids = {"unk": ours.unk_id, "bos": ours.bos_id, "eos": ours.eos_id, "pad": ours.pad_id}
    tokens = {f"{kind}_token": pieces[index][0] for kind, index in ids.items() if index is not None}
    # llama.cpp's converter reads tokenizer.model and these settings; by default it adds the space and bos.
    begins = ours.bos_id is not None and ours.bos_id != ours.eos_id
    return tokenizer_config(add_prefix_space=ours.prefixed, add_bos_token=begins, add_eos_token=False, **tokens)


def tokenizer_config(**settings: Any) -> dict[str, Any]:
    """Return the content of the tokenizer_config.json of a converted tokenizer; `settings` are its tokens and more."""
    return {
        # Not LlamaTokenizer: transformers 5 would replace our normalizer and pre-tokenizer by its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **ONLY_AUTO,
        **settings,
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


def _frame(begin: int | None, end: int | None, names: Sequence[str]) -> dict[str, Any] | None:
    """Return the step that puts ids around a text; None: it puts none."""
    if begin is None and end is None:
        return None
    before, after = ([] if i is None else [{"SpecialToken": {"id": names[i], "type_id": 0}}] for i in (begin, end))
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    special = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in (begin, end) if i is not None}
    single, pair = [*before, first, *after], [*before, first, second, *after]
    return _step("TemplateProcessing", single=single, pair=pair, special_tokens=special)


def _added(index: int, name: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": index, "content": name, **flags}


def _step(kind: str, **settings: Any) -> dict[str, Any]:
    return {"type": kind, **settings}
