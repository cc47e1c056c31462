"""Selection of ranks by words and numbers, as command-line options take them."""

from __future__ import annotations

from itertools import product

from llama_ds.errors import UserError, did_you_mean
from llama_ds.layout.axes import Axes

ALL_DISTINCT = "all-distinct"
_STAGES = ("first", "middle", "last")
_WORDS = (*_STAGES, "all", ALL_DISTINCT, "none")


def choose_ranks(wanted: str, axes: Axes, option: str) -> list[int]:
    """Return the sorted global ranks that `wanted` selects, a comma-separated list of words and numbers.

    first, middle and last select the first rank of that pipeline stage; all-distinct selects `distinct_ranks`.

    Args:
        option: command-line option with the value `wanted`, for error messages.

    Raises:
        UserError: An item is neither a rank of the job nor a known word.
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
    """Return a sample of ranks that covers every kind of rank and two members of every kind of group.

    Ranks differ by pipeline position, by being first or not along an axis that shards tensors (replicated tensors count
    once), and by the padding in the last data-parallel shard. The sample has, for each pipeline position, the first
    rank and the last rank along each other axis.
    """
    inner = [axis for axis in axes.sizes._asdict() if axis != "pp"]
    corners = [{}, *({axis: getattr(axes, axis) - 1} for axis in inner)]
    return sorted({axes.rank(pp=stage, **corner) for stage, corner in product(range(axes.pp), corners)})
