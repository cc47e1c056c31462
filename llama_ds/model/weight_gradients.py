"""Destination of the matrices' gradients: autograd, accumulation buffers in fp32, or a queue of deferred work.

Shapes: N tokens, (O, I) a matrix; dL/dW = dY^T X for Y = X W^T with dY (N, O) and X (N, I).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llama_ds.layout.joint_products import multiplied_jointly
from llama_ds.model.linear import ShardedLinear, adjacent
from llama_ds.model.products import Products

Work = tuple[Sequence[ShardedLinear], Tensor, Tensor]  # linear layers that share X, dY, X


class Share(NamedTuple):
    """Micro-batches that a product is for, of those that are computed together."""

    micro_batches: int = 1
    last: bool = True  # whether it includes the last of them


_ONE = Share()


class Added(NamedTuple):
    """A gradient that was added to the buffer of its matrix."""

    weight: nn.Parameter
    buffer: Tensor
    share: Share


class WeightGradients:
    """Shared by a stage's layers; the engine sets where gradients accumulate and whether they are deferred."""

    def __init__(self) -> None:
        # Returns the buffer, of the matrix's shape, in which its gradient accumulates; None: autograd gets it.
        self.buffer_of: Callable[[nn.Parameter], Tensor] | None = None
        # Called for each matrix after a micro-batch's gradient, or those of several, were added to its buffer.
        self.added: Callable[[nn.Parameter], None] = lambda parameter: None
        # Called before it with the matrix, its buffer, and the number of micro-batches that were added at once.
        self.observers: list[Callable[[nn.Parameter, Tensor, int], None]] = []
        self.deferred = False  # True: layers queue the work until their run_deferred_wgrad() is called
        self._withheld: list[Added] | None = None  # collects what `added` and `observers` are not told

    def compute(
        self, modules: Sequence[ShardedLinear], grad: Tensor, x: Tensor, products: Products, share: Share = _ONE
    ) -> Sequence[Tensor | None]:
        """Compute dY^T X for linear layers that share X, as one product; return their gradients, None where added.

        `grad` is the concatenation of their output gradients: (N, sum of O). The tokens may be those of several
        micro-batches.
        """
        weights = [module.weight for module in modules]
        rows, computed = [len(w) for w in weights], products.weight_gradient(grad, x, modules)
        if self.buffer_of is None:
            return (grad.t() @ x if computed is None else computed.to(x.dtype)).split(rows)
        buffers = [self.buffer_of(w) for w in weights]
        whole = adjacent(buffers)
        if computed is not None:
            for buffer, gradient in zip(buffers, computed.split(rows), strict=True):
                buffer.add_(gradient)
        elif whole is not None:
            add_product(whole, grad, x)
        else:
            for buffer, part in zip(buffers, grad.split(rows, 1), strict=True):
                add_product(buffer, part, x)
        for weight, buffer in zip(weights, buffers, strict=True):
            self._has_added(weight, buffer, share)
        return [None] * len(weights)

    def add(self, weight: nn.Parameter, grad: Tensor, factor: Tensor | None) -> Tensor | None:
        """Deliver a computed gradient times `factor` to its destination; return it if that is autograd, else None."""
        if self.buffer_of is None:
            return (grad if factor is None else grad * factor).to(weight.dtype)
        buffer = self.buffer_of(weight)
        if factor is None:
            buffer.add_(grad)
        else:
            buffer.addcmul_(grad, factor)  # fused: the head's gradient is too large for a temporary
        self._has_added(weight, buffer, _ONE)
        return None

    @contextmanager
    def withholding(self) -> Iterator[list[Added]]:
        """Collect the gradients that are added inside, about which `added` and `observers` are told later (`tell`)."""
        self._withheld = []
        try:
            yield self._withheld
        finally:
            self._withheld = None

    def tell(self, added: Sequence[Added]) -> None:
        """Tell `added` and `observers` about gradients that were added to these buffers."""
        for weight, buffer, share in added:
            assert self.buffer_of is not None, "gradients are added to buffers only"
            current = self.buffer_of(weight)  # also marks it as filled
            if current.data_ptr() != buffer.data_ptr():
                raise RuntimeError("a gradient was added to a buffer that is not the matrix's any more")
            self._has_added(weight, current, share)

    def _has_added(self, weight: nn.Parameter, buffer: Tensor, share: Share) -> None:
        if self._withheld is not None:
            self._withheld.append(Added(weight, buffer, share))
            return
        for observe in self.observers:
            observe(weight, buffer, share.micro_batches)
        if share.last:
            self.added(weight)


class LayerWeightGradients:
    """Gradients of one layer's matrices, computed at once or queued per micro-batch."""

    def __init__(self, stage: WeightGradients, products: Products) -> None:
        self._stage, self._products = stage, products
        self._current: list[Work] = []  # deferred work of the running backward
        self._deferred: deque[list[Work]] = deque()

    def of(self, modules: Sequence[ShardedLinear], grad: Tensor, x: Tensor) -> Sequence[Tensor | None]:
        """Return the gradients of linear layers that share x (N, I) for autograd, None where it gets none."""
        if not self._stage.deferred:
            return self._stage.compute(modules, grad, x, self._products)
        self._current.append((modules, grad, x))
        return [None] * len(modules)

    @property
    def deferred(self) -> bool:
        """Whether the running backward queues its work."""
        return self._stage.deferred

    def end_micro_batch(self) -> None:
        """Close the backward of one micro-batch."""
        if self._stage.deferred:
            self._deferred.append(self._current)
            self._current = []

    def __len__(self) -> int:
        """Return the number of deferred micro-batches."""
        return len(self._deferred)

    def take_newest(self) -> list[Work]:
        """Remove and return the deferred work of the last backward; [] where none is deferred."""
        return self._deferred.pop() if self._stage.deferred else []

    def run_oldest(self, micro_batches: int = 1) -> None:
        """Compute and accumulate the gradients of the oldest deferred micro-batches, as one product where it pays."""
        self.run([self._deferred.popleft() for _ in range(micro_batches)])

    @torch.no_grad()
    def run(self, oldest: Sequence[list[Work]]) -> None:
        """Compute and accumulate the gradients of micro-batches' deferred work, as `run_oldest` does."""
        for (modules, grad, x), share in chain.from_iterable(map(_joined, zip(*oldest, strict=True))):
            computed = self._stage.compute(modules, grad, x, self._products, share)
            for weight, grad_weight in zip((m.weight for m in modules), computed, strict=True):
                if grad_weight is not None:
                    weight.grad = grad_weight if weight.grad is None else weight.grad.add_(grad_weight)


def _joined(works: Sequence[Work]) -> Iterator[tuple[Work, Share]]:
    """Yield the products for the same linear layers in several micro-batches: one for all, or one for each."""
    modules, grad, x = works[0]
    if len(works) > 1 and multiplied_jointly(len(x), grad.shape[1], x.shape[1], len(works), x.element_size()):
        _, grads, inputs = zip(*works, strict=True)
        yield (modules, torch.cat(grads), torch.cat(inputs)), Share(len(works))
        return
    for i, work in enumerate(works, 1):
        yield work, Share(last=i == len(works))


def bias_gradients(modules: Sequence[ShardedLinear], grad: Tensor) -> list[Tensor]:
    """Return dL/db = the sum of dY over tokens for linear layers with biases, [] for layers without.

    `grad` is the concatenation of their output gradients (N, sum of O), of all tokens: every rank then has the entire
    gradient of a replicated bias. Like those of norms, the gradients go to autograd at once, also where those of the
    matrices are deferred: a sum is cheap.
    """
    biases = [module.bias for module in modules if module.bias is not None]
    if not biases:
        return []
    total = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)
    return list(total.split([len(bias) for bias in biases]))


def add_product(buffer: Tensor, grad: Tensor, x: Tensor) -> None:
    """Compute buffer += dY^T X, accumulating in the buffer's dtype."""
    if buffer.dtype == grad.dtype:
        buffer.addmm_(grad.t(), x)
    elif buffer.is_cuda:  # one kernel, bf16 in and float32 out, without intermediate rounding
        torch.ops.aten.addmm.dtype_out(buffer, grad.t(), x, buffer.dtype, out=buffer)
    else:
        buffer.add_(grad.t() @ x)
