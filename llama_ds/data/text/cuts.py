"""Cuts of a long text into pieces that give, encoded one by one, the ids of the whole text.

Encoders take about 50 bytes of memory for each byte of a text, so that one long document could fill the memory. A kind
of tokenizer says by its `Cuts` where a text may be cut, or by None that it may not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

PIECE_CHARS = 1 << 18  # shorter texts are encoded as a whole

# Pairs of neighbouring characters between which pre-tokenizers of byte-level BPE cut: their patterns end a match after
# a run of letters, before white space or a full stop. Letters of scripts that Unicode has had from the beginning.
LETTER = "A-Za-zÀ-ÖØ-öΑ-Ρα-ωА-яא-תぁ-ん一-龥가-힣"
PAIRS = (f"[{LETTER}] ", f"[{LETTER}]\n", "[ぁ-ん一-龥][、。，]")
LEFT = (
    "word",
    " a",
    "x, 12 cd",
    "\n\n  e",
    "don't",
    "  Ünïcode",
    "1.5e",
    "e\u0301x",
    "\tif x",
    "漢字",
    "一。二",
    "</s>a",
)
RIGHT = {
    " ": (" b", "  b", " 12", " \n x", " .", " 漢", " '", "   "),
    "\n": ("\nb", "\n\n b", "\n1", "\n.", "\n  x", "\n"),
    "]": tuple(stop + then for stop in "、。，" for then in ("b", "漢", "\n", " ", "。", "1", "'s")),
}


class Cuts(Protocol):
    """Says where a text may be cut."""

    @property
    def at_spaces(self) -> bool:
        """Whether the encoder puts a space before every text: cuts are before spaces, which pieces omit."""

    def may_cut(self, text: str, at: int) -> bool:
        """Whether `text` may be cut before its character number `at`."""


@dataclass(frozen=True)
class UnjoinedCuts:
    """Cuts between two characters that are adjacent in no entry of a BPE vocabulary: no merge can cross them.

    Every symbol of byte pair encoding is an entry of the vocabulary, from the first merge to the last, and the order of
    merges on one side of such a cut does not depend on the other side.
    """

    adjacent: frozenset[str]  # all pairs of adjacent characters inside the entries
    avoided: str = ""  # a character that the tokenizer treats in a way of its own: no cut beside it
    at_spaces: bool = False

    def may_cut(self, text: str, at: int) -> bool:
        """Whether `text` may be cut before its character number `at`."""
        pair = text[at - 1 : at + 1]
        if self.at_spaces and pair[1:] != " ":
            return False
        return pair not in self.adjacent and not (self.avoided and self.avoided in pair)


@dataclass(frozen=True)
class PairCuts:
    """Cuts inside the matches of a pattern of two characters, between which a tokenizer's pre-tokenizer always cuts."""

    pairs: re.Pattern[str]
    at_spaces: bool = False

    def may_cut(self, text: str, at: int) -> bool:
        """Whether `text` may be cut before its character number `at`."""
        return self.pairs.fullmatch(text, at - 1, at + 1) is not None


def pieces_of(text: str, cuts: Cuts | None, chars: int = PIECE_CHARS) -> Iterator[str]:
    """Yield pieces of about `chars` characters whose ids, concatenated, are those of `text`.

    A longer stretch without a cut is one piece; without `cuts`, so is the whole text.
    """
    start = 0
    while cuts and len(text) - start > chars:
        at = _cut(text, start, chars, cuts)
        if at is None:
            break
        yield text[start:at]
        start = at + cuts.at_spaces
    yield text[start:]


def _cut(text: str, start: int, chars: int, cuts: Cuts) -> int | None:
    last = len(text) - 2  # an omitted space must not be the last character
    before = range(min(start + chars, last), start + chars // 2, -1)
    after = range(start + chars + 1, last + 1)
    return next((at for places in (before, after) for at in places if cuts.may_cut(text, at)), None)


def pairs_of_bpe(encode: Callable[[str], Sequence[int]], vocabulary: Iterable[str]) -> PairCuts | None:
    """Return the cuts of a BPE tokenizer with any pre-tokenizer, between those PAIRS that it never joins.

    A pair qualifies if no entry of `vocabulary` contains it, so that no merge spans it, and if the pre-tokenizer treats
    both sides independently, which samples show.
    """
    spelled = "\0".join(vocabulary).replace("\u0120", " ").replace("\u010a", "\n").replace("\u2581", " ")
    usable = [pair for pair in PAIRS if not re.search(pair, spelled) and _independent(encode, pair)]
    return PairCuts(re.compile("|".join(usable))) if usable else None


def _independent(encode: Callable[[str], Sequence[int]], pair: str) -> bool:
    rights = RIGHT[pair[-1]]
    lefts = [left for left in LEFT if re.search(pair, left[-1] + rights[0])]
    apart = {text: list(encode(text)) for text in (*lefts, *rights)}
    return all(list(encode(left + right)) == apart[left] + apart[right] for left in lefts for right in rights)
