"""Where the gradients of a stage's matrices go: to autograd, straight into wide buffers, or into a queue for later.

Shapes: N tokens, (O, I) a matrix; dL/dW = dY^T X for Y = X W^T with dY (N, O) and X (N, I).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llama_ds.model.linear import ShardedLinear, adjacent

Work = tuple[list[nn.Parameter], Tensor, Tensor]  # matrices stacked by rows, dY, X


class WeightGradients:
    """Shared by a stage's layers; the engine says where gradients accumulate and whether they may wait."""

    def __init__(self) -> None:
        # The buffer, of the matrix's shape, that a matrix's gradient is added to; None: autograd gets it.
        self.buffer_of: Callable[[nn.Parameter], Tensor] | None = None
        # Told of every matrix whose gradient of a micro-batch has been added to its buffer.
        self.added: Callable[[nn.Parameter], None] = lambda parameter: None
        self.deferred = False  # True: layers keep the work in a queue until their weight_grads() is called

    def compute(self, weights: Sequence[nn.Parameter], grad: Tensor, x: Tensor) -> Sequence[Tensor | None]:
        """Compute dY^T X for matrices that share X, as one product; return each one's gradient, None where it is added.

        `grad` holds their output gradients side by side: (N, sum of O).
        """
        if self.buffer_of is None:
            return (grad.t() @ x).split([len(w) for w in weights])
        buffers = [self.buffer_of(w) for w in weights]
        whole = adjacent(buffers)
        if whole is not None:
            add_product(whole, grad, x)
        else:
            for buffer, part in zip(buffers, grad.split([len(w) for w in weights], 1), strict=True):
                add_product(buffer, part, x)
        for weight in weights:
            self.added(weight)
        return [None] * len(weights)

    def add(self, weight: nn.Parameter, grad: Tensor, factor: Tensor | None) -> Tensor | None:
        """Put a gradient that is computed already, times `factor`, where it belongs; return it if that is autograd."""
        if self.buffer_of is None:
            return (grad if factor is None else grad * factor).to(weight.dtype)
        buffer = self.buffer_of(weight)
        if factor is None:
            buffer.add_(grad)
        else:
            buffer.addcmul_(grad, factor)  # the gradient of the head's matrix is large: no second one
        self.added(weight)
        return None


class LayerWeightGradients:
    """One layer's matrices: gradients computed now, or queued micro-batch by micro-batch."""

    def __init__(self, shared: WeightGradients) -> None:
        self._shared = shared
        self._open: list[Work] = []  # of the backward that is running
        self._waiting: deque[list[Work]] = deque()

    def of(self, modules: Sequence[ShardedLinear], grad: Tensor, x: Tensor) -> Sequence[Tensor | None]:
        """Return the gradients of linear layers that share x (N, I), for autograd; None where it has none to take."""
        weights = [module.weight for module in modules]
        if not self._shared.deferred:
            return self._shared.compute(weights, grad, x)
        self._open.append((weights, grad, x))
        return [None] * len(weights)

    def end_micro_batch(self) -> None:
        """Close the backward of one micro-batch."""
        if self._shared.deferred:
            self._waiting.append(self._open)
            self._open = []

    def __len__(self) -> int:
        """Return how many micro-batches wait."""
        return len(self._waiting)

    @torch.no_grad()
    def run_oldest(self) -> None:
        """Do the work of the micro-batch that has waited longest and add the gradients where they belong."""
        for weights, grad, x in self._waiting.popleft():
            for weight, own in zip(weights, self._shared.compute(weights, grad, x), strict=True):
                if own is not None:
                    weight.grad = own if weight.grad is None else weight.grad.add_(own)


def add_product(buffer: Tensor, grad: Tensor, x: Tensor) -> None:
    """buffer += dY^T X, in the buffer's width."""
    if buffer.dtype == grad.dtype:
        buffer.addmm_(grad.t(), x)
    elif buffer.is_cuda:  # one kernel: bf16 in, float32 out, no rounding between
        torch.ops.aten.addmm.dtype_out(buffer, grad.t(), x, buffer.dtype, out=buffer)
    else:
        buffer.add_(grad.t() @ x)
