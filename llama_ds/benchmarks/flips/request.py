"""What to flip, and where."""

from __future__ import annotations

from dataclasses import dataclass

# Sites in a step of the run, then those in what it stores and sends.
IN_STEP = (
    "weights",
    "masters",
    "moments",
    "activations of the checked layer",
    "activations of another layer",
    "activations, always the same bit",
    "weight gradients of the checked layer",
    "weight gradients of another layer",
    "gradients after the reduction",
    "gradients after the checks",
)
STORED = ("state in memory", "state on its way to another host", "checkpoint file")
SITES = IN_STEP + STORED


@dataclass(frozen=True)
class FlipRequest:
    """Numbers of flips at each site and of steps without any, which follow them; fewer if the time is over."""

    ranks: int = 3
    flips: int = 84
    clean: int = 1000
    seed: int = 0
    seconds: float = 0.0  # time for all of them, 0: no limit


@dataclass(frozen=True)
class Flip:
    """One bit."""

    site: str
    rank: int
    layer: float  # selects a layer, tensor or file: from 0 to 1
    element: float  # selects an element: from 0 to 1
    bit: int  # number from the least significant one, modulo the bits of the element
