"""Positions at which a long text may be cut, so that the ids of its parts are the ids of the whole text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

WINDOW = 256  # characters at the end of a text that are searched first

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


def last_pair(pattern: re.Pattern[str], text: str) -> int:
    """Return the position inside the last match of `pattern`, which matches two characters; 0: there is none."""
    window = WINDOW
    while True:
        start = max(0, len(text) - window)
        found = [match.start() for match in pattern.finditer(text, start)]
        if found or not start:
            return found[-1] + 1 if found else 0
        window *= 8


def pairs_of_bpe(encode: Callable[[str], Sequence[int]], vocabulary: Iterable[str]) -> re.Pattern[str] | None:
    """Return the PAIRS between which a BPE tokenizer with any pre-tokenizer may be cut, if there are any.

    A pair qualifies if no entry of `vocabulary` contains it, so that no merge spans it, and if the pre-tokenizer treats
    both sides independently, which samples show.
    """
    spelled = "\0".join(vocabulary).replace("\u0120", " ").replace("\u010a", "\n").replace("\u2581", " ")
    usable = [pair for pair in PAIRS if not re.search(pair, spelled) and _independent(encode, pair)]
    return re.compile("|".join(usable)) if usable else None


def _independent(encode: Callable[[str], Sequence[int]], pair: str) -> bool:
    rights = RIGHT[pair[-1]]
    lefts = [left for left in LEFT if re.search(pair, left[-1] + rights[0])]
    apart = {text: list(encode(text)) for text in (*lefts, *rights)}
    return all(list(encode(left + right)) == apart[left] + apart[right] for left in lefts for right in rights)
