"""Cuts of a long text into pieces that give, encoded one by one, the ids of the whole text.

Encoders take about 50 bytes of memory for each byte of a text, so that one long document could fill the memory. A kind
of tokenizer says by its `Cuts` where a text may be cut, or by None that it may not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PIECE_CHARS = 1 << 18  # shorter texts are encoded as a whole


@dataclass(frozen=True)
class Cuts:
    """Cuts between two characters that are adjacent in no entry of a BPE vocabulary: no merge can cross them.

    Every symbol of byte pair encoding is an entry of the vocabulary, from the first merge to the last, and the order of
    merges on one side of such a cut does not depend on the other side.
    """

    adjacent: frozenset[str]  # all pairs of adjacent characters inside the entries
    avoided: str = ""  # a character that the tokenizer treats in a way of its own: no cut beside it
    at_spaces: bool = False  # the encoder puts a space before every text: cut before spaces, and omit those

    def may_cut(self, text: str, at: int) -> bool:
        """Whether `text` may be cut before its character number `at`."""
        pair = text[at - 1 : at + 1]
        if self.at_spaces and pair[1:] != " ":
            return False
        return pair not in self.adjacent and not (self.avoided and self.avoided in pair)


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
