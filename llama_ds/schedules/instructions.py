"""The instructions of a pipeline rank within one step, and the placement of the model's stages on the ranks.

A pipeline of p ranks splits the model into p * c stages; each rank holds c of them, its chunks 0 .. c - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Op(Enum):
    """Kinds of instructions. The values are the labels in diagrams and traces."""

    FORWARD = "F"
    BACKWARD = "BW"  # gradients of input and weights
    INPUT_BACKWARD = "B"  # gradient of the input only; WEIGHT_BACKWARD computes the others
    WEIGHT_BACKWARD = "W"
    POST_ACTIVATION = "post activation"  # post the receive that FORWARD will wait for
    POST_GRAD = "post grad"  # post the receive that a backward will wait for
    SEND_ACTIVATION = "send activation"  # start the send without waiting for it
    SEND_GRAD = "send grad"

    __hash__ = object.__hash__  # schedules look up millions; that of Enum is slower


BACKWARDS = (Op.BACKWARD, Op.INPUT_BACKWARD)
COMPUTES = (Op.FORWARD, *BACKWARDS, Op.WEIGHT_BACKWARD)
POSTS = (Op.POST_ACTIVATION, Op.POST_GRAD)
SENDS = (Op.SEND_ACTIVATION, Op.SEND_GRAD)


class Instruction(NamedTuple):
    """One instruction. Posts and sends name the chunk that receives or sends the message of the micro-batch."""

    op: Op
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.op.name.lower().replace('_', ' ')} of micro-batch {self.micro_batch}, chunk {self.chunk}"


@dataclass(frozen=True)
class Placement:
    """Placement of stages on ranks: every chunk in rank order ("loop"), or odd chunks in reverse order ("v")."""

    ranks: int
    chunks: int
    shape: str = "loop"

    @property
    def stages(self) -> int:
        """Number of stages of the model."""
        return self.ranks * self.chunks

    def stage(self, rank: int, chunk: int) -> int:
        """Return the stage that is chunk `chunk` of `rank`."""
        position = self.ranks - 1 - rank if self.shape == "v" and chunk % 2 else rank
        return chunk * self.ranks + position

    def home(self, stage: int) -> tuple[int, int]:
        """Return the rank that holds `stage`, and its chunk there."""
        chunk, position = divmod(stage, self.ranks)
        return (self.ranks - 1 - position if self.shape == "v" and chunk % 2 else position), chunk
