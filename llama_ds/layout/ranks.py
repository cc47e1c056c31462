"""Which ranks a person means."""

from __future__ import annotations

from itertools import product

from llama_ds.errors import UserError, did_you_mean
from llama_ds.layout.axes import Axes

ALL_DISTINCT = "all-distinct"
_STAGES = ("first", "middle", "last")
_WORDS = (*_STAGES, "all", ALL_DISTINCT, "none")


def choose_ranks(wanted: str, axes: Axes, option: str) -> list[int]:
    """Return the global ranks that `wanted` names, in order: words and numbers with commas between.

    first, middle and last are pipeline stages and mean their first ranks; all-distinct is `distinct_ranks`.

    Args:
        option: command-line option that `wanted` was given to, for messages.

    Raises:
        UserError: neither a rank of the job nor a word.
    """
    stages = dict(zip(_STAGES, (0, axes.pp // 2, axes.pp - 1), strict=True))
    last = axes.world - 1
    chosen: set[int] = set()
    for word in map(str.strip, wanted.split(",")):
        if word == "all":
            chosen.update(range(axes.world))
        elif word == ALL_DISTINCT:
            chosen.update(distinct_ranks(axes))
        elif word in stages:
            chosen.add(axes.rank(pp=stages[word]))
        elif word.isascii() and word.isdigit() and len(word) < 10:
            if int(word) > last:
                raise UserError(f"{option} {word}: the layout has {axes.world} ranks, {axes.words()}; use 0 to {last}")
            chosen.add(int(word))
        elif word != "none":
            raise UserError(
                f"{option} {word!r} is not a rank{did_you_mean(word, _WORDS)}; use numbers from 0 to {last}, "
                f"{', '.join(_WORDS)}, with commas between"
            )
    return sorted(chosen)


def distinct_ranks(axes: Axes) -> list[int]:
    """Return ranks of every kind, and of every kind of group two members.

    Ranks differ by their pipeline position, by being first or later along an axis that cuts tensors (what all ranks of
    such a group hold counts once), and by the last data-parallel rank's part (padding). Of each position: the first
    rank, and along every other axis the last beside it.
    """
    inner = [axis for axis in axes.sizes._asdict() if axis != "pp"]
    corners = [{}, *({axis: getattr(axes, axis) - 1} for axis in inner)]
    return sorted({axes.rank(pp=stage, **corner) for stage, corner in product(range(axes.pp), corners)})
