"""The norm of this rank's own gradient of its decoder layers' matrices, before it is reduced over ranks.

Where layers add their gradients to fp32 buffers it is that of the whole step, else that of the last micro-batch. Either
is comparable between data-parallel ranks, and neither needs a communication or a synchronisation.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from llama_ds.model.decoder import DecoderLayer, LayerContext


class LocalGradientNorm:
    """Measures the steps between `begin` and `take`."""

    def __init__(self, module: nn.Module, context: LayerContext, accumulation: int, device: torch.device) -> None:
        """`accumulation` is the number of micro-batches of a step."""
        self._accumulation, self._device = accumulation, device
        self._active = False
        self._seen: Counter[int] = Counter()  # micro-batches, by id of the matrix
        self._norms: list[Tensor] = []
        layers = [part for part in module.modules() if isinstance(part, DecoderLayer)]
        matrices = [p for layer in layers for p in layer.parameters() if len(getattr(p, "ds_shape", p.shape)) > 1]
        self._own = {id(p) for p in matrices}
        for matrix in matrices:
            matrix.register_hook(lambda grad, matrix=matrix: self._add(matrix, grad))
        context.weight_gradients.observers.append(self._add)

    def begin(self) -> None:
        """Measure the step that follows."""
        self._active, self._norms = True, []
        self._seen.clear()

    def take(self) -> Tensor:
        """Return the norm of the step's gradient, a scalar on the device, and measure no more."""
        self._active = False
        return (
            torch.linalg.vector_norm(torch.stack(self._norms)) if self._norms else torch.zeros((), device=self._device)
        )

    @torch.no_grad()
    def _add(self, matrix: nn.Parameter, gradient: Tensor | None, micro_batches: int = 1) -> None:
        # gradient is None: an observer gets it later
        if not self._active or gradient is None or id(matrix) not in self._own:
            return
        self._seen[id(matrix)] += micro_batches
        if self._seen[id(matrix)] == self._accumulation:
            self._norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))
