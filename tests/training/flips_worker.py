"""One rank of `benchmarks/flips`, with two flips: the highest bit of the exponent of one rank's reduced gradient."""

from __future__ import annotations

from llama_ds.benchmarks.flips import rank
from llama_ds.benchmarks.flips.request import Flip, FlipRequest


def drawn(request: FlipRequest) -> list[Flip]:
    return [Flip(f"gradients after the {part}", 2, 0.1, 0.3, 30) for part in ("checks", "reduction")]


if __name__ == "__main__":
    rank.drawn = drawn
    rank.main()
