"""Which ranks a dry run is for."""

from __future__ import annotations

from itertools import product

from llama_ds.config.layout import Layout
from llama_ds.errors import UserError, did_you_mean

ALL_DISTINCT = "all-distinct"
_WORDS = ("first", "middle", "last", ALL_DISTINCT)


def choose_ranks(wanted: str, layout: Layout) -> list[int]:
    """Return the global ranks that `wanted` names, in order: numbers and words, with commas between.

    Raises:
        UserError: neither a rank of the layout nor a word.
    """
    chosen: set[int] = set()
    for item in wanted.split(","):
        word = item.strip()
        if word == ALL_DISTINCT:
            chosen.update(distinct_ranks(layout))
        elif word in _WORDS:
            chosen.add({"first": 0, "middle": layout.world // 2, "last": layout.world - 1}[word])
        elif word.isascii() and word.isdigit() and len(word) < 10:
            if int(word) >= layout.world:
                raise UserError(
                    f"--rank {word}: the layout has {layout.world} ranks, pp {layout.pp} x dp {layout.dp} x tp "
                    f"{layout.tp}; use 0 to {layout.world - 1}"
                )
            chosen.add(int(word))
        else:
            raise UserError(
                f"--rank {word!r} is not a rank{did_you_mean(word, _WORDS)}; use numbers from 0 to "
                f"{layout.world - 1}, first, middle, last or {ALL_DISTINCT}, with commas between"
            )
    return sorted(chosen)


def distinct_ranks(layout: Layout) -> list[int]:
    """Return ranks of every kind, and of every kind of group two members.

    Ranks differ by their pipeline position, by being the first or a later tensor-parallel rank (what all of them hold
    counts once), and by the last data-parallel rank's part (padding). Of each position: the first rank, the last
    beside it in its tensor-parallel group, the last in its data-parallel group.
    """
    corners = [(0, 0), (0, layout.tp - 1), (layout.dp - 1, 0)]
    return sorted({layout.rank_at(pp, dp, tp) for pp, (dp, tp) in product(range(layout.pp), corners)})
