"""Root mean square of the residual stream behind every decoder layer, under every layout.

Ranks add up the squares and the number of the elements that they compute. Tensor-parallel replicas add both alike, and
so does a recomputed layer, so that the quotient is that of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llama_ds.layout.weights import Key, key_of
from llama_ds.model.decoder import DecoderLayer

RESIDUAL = "residual"


class ActivationNorms:
    """Observes the decoder layers of a module between `begin` and `sums`."""

    def __init__(self, module: nn.Module, layers: int) -> None:
        """`layers` is the number of decoder layers of the model, of which `module` may have some."""
        self.keys: list[Key] = [(layer, RESIDUAL) for layer in range(1, layers + 1)]
        named = module.named_modules()
        self._layers = {key_of(f"{name}.")[0] - 1: part for name, part in named if isinstance(part, DecoderLayer)}
        self._hooks: list[RemovableHandle] = []
        self._squares, self._counts = torch.zeros(0), [0] * layers

    def begin(self, device: torch.device) -> None:
        """Observe every forward from now on."""
        self._squares, self._counts = torch.zeros(len(self.keys), device=device), [0] * len(self.keys)
        for number, layer in self._layers.items():
            self._hooks.append(layer.register_forward_hook(lambda _, __, out, number=number: self._add(number, out)))

    def sums(self) -> Tensor:
        """Return (2, L), squares and numbers of elements, and observe no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return torch.stack([self._squares, torch.tensor(self._counts, device=self._squares.device).float()])

    @torch.no_grad()
    def _add(self, number: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        norm = torch.linalg.vector_norm(hidden.detach(), dtype=torch.float32)
        self._squares[number] += norm.square()
        self._counts[number] += hidden.numel()
