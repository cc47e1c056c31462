"""What a pipeline rank does in one step, as a list; and which stage of the model a chunk of a rank is.

A pipeline of p ranks cuts the model into p * c stages; each rank holds c of them, its chunks 0 .. c - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Op(Enum):
    """Kinds of instructions. Values are the letters that pictures and traces use."""

    FORWARD = "F"
    BACKWARD = "BW"  # the whole backward
    INPUT_BACKWARD = "B"  # only the gradient of the input; the weights' follow in WEIGHT_BACKWARD
    WEIGHT_BACKWARD = "W"
    POST_ACTIVATION = "post activation"  # have a buffer ready for what FORWARD will wait for
    POST_GRAD = "post grad"  # the same for a backward
    SEND_ACTIVATION = "send activation"  # hand over and go on
    SEND_GRAD = "send grad"


BACKWARDS = (Op.BACKWARD, Op.INPUT_BACKWARD)
COMPUTES = (Op.FORWARD, *BACKWARDS, Op.WEIGHT_BACKWARD)
POSTS = (Op.POST_ACTIVATION, Op.POST_GRAD)
SENDS = (Op.SEND_ACTIVATION, Op.SEND_GRAD)


class Instruction(NamedTuple):
    """One instruction: for posts and sends, of the message that the chunk receives or sends for the micro-batch."""

    op: Op
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.op.name.lower().replace('_', ' ')} of micro-batch {self.micro_batch}, chunk {self.chunk}"


@dataclass(frozen=True)
class Placement:
    """Which rank holds which stage: chunk by chunk round the ranks ("loop"), or there and back again ("v")."""

    ranks: int
    chunks: int
    shape: str = "loop"

    @property
    def stages(self) -> int:
        """Number of stages of the model."""
        return self.ranks * self.chunks

    def stage(self, rank: int, chunk: int) -> int:
        """Return the stage that is chunk `chunk` of `rank`."""
        place = self.ranks - 1 - rank if self.shape == "v" and chunk % 2 else rank
        return chunk * self.ranks + place

    def home(self, stage: int) -> tuple[int, int]:
        """Return the rank and the chunk that `stage` is."""
        chunk, place = divmod(stage, self.ranks)
        return (self.ranks - 1 - place if self.shape == "v" and chunk % 2 else place), chunk
