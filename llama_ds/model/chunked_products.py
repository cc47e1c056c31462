"""Products beside tensor-parallel collectives: while one chunk of tokens travels, another one is multiplied.

Shapes: N tokens of a micro-batch, M of this rank (`tensor_parallel.py`), D hidden size, I inputs and O outputs of a
product. With one chunk, a collective is issued for all tokens and then awaited. With more, a layer goes from a
row-parallel product to the next column-parallel one in steps of one chunk: multiply and issue the sum; pass on, which
is to wait for the sum, compute what lies between (a norm) and issue the gather; wait for the gather and multiply.
`llama_ds.layout.chunk_order` has their order, in which products of other chunks hide the collectives. Products write to
slices of one tensor, so that everything else sees whole tensors, and each element is the same sum as without chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama_ds.layout.chunk_order import passed_before
from llama_ds.model.pointwise import rms_norm_backward
from llama_ds.model.tensor_parallel import Pending, TensorParallel

PassOn = Callable[[int], None]  # receives the number of the chunk
Multiply = Callable[[Tensor, Tensor | None], Tensor]  # (N, I) -> (N, O), written to the second argument if given


class _Travelling:
    """Chunks whose collectives are issued one by one, and awaited in the same order."""

    def __init__(self, tp: TensorParallel, tokens: int, count: int) -> None:
        """`tokens` is M, and `count` the number of chunks: 1 or `tp.chunks_of(tokens)`."""
        self.count = count
        self._tp, self._tokens = tp, tokens
        self._whole: Tensor | None = None  # the tensor of which chunks are slices
        self._pending: list[Pending] = []
        self._arrived: list[Tensor] = []

    def chunk(self, i: int) -> Tensor:
        """Wait for chunk i, after those before it: (N / count, D) of a gather, (M / count, D) of a sum."""
        if i == len(self._arrived):
            self._arrived.append(self._pending[i]())
        return self._arrived[i]

    def whole(self) -> Tensor:
        """Wait for all chunks: (N, D) of a gather, (M, D) of a sum."""
        chunks = [self.chunk(i) for i in range(self.count)]
        return joined(chunks) if self._whole is None else self._whole


class Gathering(_Travelling):
    """The gather of this rank's tokens (M, D) to those of all ranks (N, D)."""

    def issue(self, x: Tensor) -> None:
        """Issue the gather of the next chunk: (M / count, D)."""
        tp = self._tp
        if tp.sequence_parallel and self._whole is None:
            self._whole = x.new_empty(self._tokens * tp.size, x.shape[1])
        out = None if self._whole is None else cut(self._whole, self.count)[len(self._pending)]
        self._pending.append(tp.gather_tokens(x, out, tp.chunks_of(self._tokens) // self.count))

    @property
    def issued(self) -> int:
        """The number of chunks whose gathers are issued."""
        return len(self._pending)


class Reduction(_Travelling):
    """The sum over ranks of a product's partial outputs, to this rank's tokens (M, D)."""

    def __init__(self, tp: TensorParallel, x: Tensor, multiply: Multiply, width: int, count: int) -> None:
        """Multiply x (N, I) to partial outputs of this width, D, by chunks."""
        super().__init__(tp, len(x) // tp.size if tp.sequence_parallel else len(x), count)
        self._multiply, self._inputs = multiply, list(cut(x, count))
        if count > 1:  # without sequence parallelism the partial outputs become the sums
            self._whole = x.new_empty(self._tokens, width)

    def issue(self) -> None:
        """Multiply the next chunk and issue its sum."""
        tp, chunks = self._tp, self._tp.chunks_of(self._tokens) // self.count
        out = None if self._whole is None else self._whole.chunk(self.count)[len(self._pending)]
        partial = self._multiply(self._inputs.pop(0), None if tp.sequence_parallel else out)
        self._pending.append(tp.reduce_tokens(partial, out, chunks))

    def issue_all(self, pass_on: PassOn | None = None, early: bool = True) -> None:
        """Issue all chunks, and call `pass_on` for the chunks whose turn comes before the last product."""
        passed = 0
        for until in passed_before(self.count, early)[: self.count]:
            while pass_on and passed < until:
                pass_on(passed)
                passed += 1
            self.issue()


def multiply_gathered(
    gathering: Gathering, multiply: Multiply, width: int, pass_on: PassOn | None = None, early: bool = True
) -> Tensor:
    """Multiply the chunks of a gathering as they arrive, to (N, `width`), and call `pass_on` for those not issued."""
    count = gathering.count
    out = product = None
    for i, until in enumerate(passed_before(count, early)[count:]):
        while pass_on and gathering.issued < until:
            pass_on(gathering.issued)
        x = gathering.chunk(i)
        if count > 1 and out is None:
            out = x.new_empty(len(x) * count, width)
        product = multiply(x, None if out is None else out.chunk(count)[i])
    assert product is not None
    return product if out is None else out


def gather(tp: TensorParallel, x: Tensor, count: int) -> Gathering:
    """Issue the gather of x (M, D), in `count` chunks where tokens travel."""
    gathering = Gathering(tp, len(x), count if tp.sequence_parallel else 1)
    for chunk in cut(x, gathering.count):
        gathering.issue(chunk)
    return gathering


class NormBackward:
    """`pointwise.rms_norm_backward` by chunks: the gradients of x (M, D), and the sum of those of the weight."""

    def __init__(self, x: Sequence[Tensor], weight: Tensor, eps: float, residuals: Sequence[Tensor]) -> None:
        self._x, self._weight, self._eps, self._residuals = x, weight, eps, residuals
        self.grads: list[Tensor] = []  # (M / count, D) each
        self._grad_weights: list[Tensor] = []  # (D,)

    @property
    def grad_weight(self) -> Tensor:
        """The sum of all chunks: (D,)."""
        first, *rest = self._grad_weights
        return sum(rest, first)

    def chunk(self, grad: Tensor) -> Tensor:
        """Return the gradient of the next chunk of x, with that of the residual branch: (M / count, D)."""
        i = len(self.grads)
        grad_x, grad_weight = rms_norm_backward(grad, self._x[i], self._weight, self._eps, self._residuals[i])
        self.grads.append(grad_x)
        self._grad_weights.append(grad_weight)
        return grad_x


class GathersAhead:
    """The gather of a layer's input gradient, issued before the layer below asks for it."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Gathering] | None = None

    def put(self, x: Tensor, gathering: Gathering) -> None:
        """Keep the gathering of x, and x, so that its address is not reused."""
        self._last = x, gathering

    def take(self, x: Tensor) -> Gathering | None:
        """Return the gathering of x if it is the last one that was kept."""
        if self._last is None or self._last[0].data_ptr() != x.data_ptr():
            return None
        gathering = self._last[1]
        self._last = None
        return gathering


def cut(x: Tensor, count: int) -> Sequence[Tensor]:
    """Return `count` equal chunks of x."""
    return (x,) if count == 1 else x.chunk(count)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return parts below each other as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
