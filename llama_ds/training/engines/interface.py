"""The interface between the training loop and an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from llama_ds.model.decoder import LayerContext
from llama_ds.model.key_value_cache import LayerCache
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.next_token import DecodePass
from llama_ds.parallel.trace import Trace
from llama_ds.training.device_batches import Batch, Batches

Branches = Callable[[int], LayerCache]  # takes the number of a micro-batch


@dataclass(frozen=True)
class StepResult:
    """The result of a step, still on the device: reading it synchronises."""

    loss: Tensor  # mean over the labels of the global batch; with a single stage, the sum over dp that `work` makes
    norm: Tensor | float  # norm of the gradients before clipping
    ready: Any = None  # CUDA event after both; None on a CPU, or where the next step completes them
    work: Any = None  # a sum over ranks in flight


class Engine(Protocol):
    """One rank's part of the model, its optimizer and its position in the grid."""

    deepspeed: Any  # the DeepSpeed engine
    dp_rank: int
    reads_data: bool  # True on the first and the last pipeline stage
    trace: Trace
    loss: NextTokenLoss  # called by the ranks of the last stage
    context: LayerContext  # context of this rank's layers
    any_row_length: bool  # whether `evaluate` also takes branches, and rows shorter than those of training

    def train_step(self, batches: Iterator[Batch], lr: float) -> StepResult:
        """Take one optimizer step over `accumulation` micro-batches."""

    def read(self, result: StepResult) -> tuple[float, float]:
        """Return a step's global mean loss and gradient norm, the same on all ranks. Collective; synchronises."""

    def evaluate(
        self, batches: Batches, count: int, tokens: int | None = None, branches: Branches | None = None
    ) -> float:
        """Return the mean loss over the labels of `count` micro-batches of every data-parallel rank. Collective.

        Args:
            tokens: of a row; None: those of training.
            branches: returns the branches of a micro-batch of this rank's rows; None: the rows are whole.
        """

    def next_tokens(self, passes: Sequence[DecodePass]) -> list[Tensor]:
        """Return the next ids (B,) of every pass, on all ranks of its pipeline.

        Collective within the pipeline and the tensor-parallel group, and under ZeRO-3 over all ranks.
        """
