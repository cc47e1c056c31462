"""Products beside tensor-parallel collectives: while one chunk of tokens travels, another one is multiplied.

Shapes: N tokens of a micro-batch, M of this rank (`tensor_parallel.py`), D hidden size, I inputs and O outputs of a
product. A pass with one chunk issues a collective for all tokens and waits for it. With more chunks

    reduce 0, reduce 1, pass on 0, reduce 2, pass on 1, ..., multiply 0, pass on last, multiply 1, ...

are a layer's steps from one row-parallel product to the next column-parallel one: `reduce` multiplies a chunk and
issues its sum, `pass on` waits for the sum, computes what lies between (a norm) and issues the gather, and `multiply`
waits for that. From three chunks on, a product lies between the issue of each collective and its wait; without sequence
parallelism, where nothing is gathered, from two on. Products write to slices of one tensor, so that everything else
sees whole tensors, and each element is the same sum as without chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama_ds.model.pointwise import rms_norm_backward
from llama_ds.model.tensor_parallel import Pending, TensorParallel

Multiply = Callable[[Tensor, Tensor | None], Tensor]  # (N, I) -> (N, O), written to the second argument if given


class Gathering:
    """The gather of this rank's tokens (M, D) to those of all ranks (N, D), issued and awaited by chunks."""

    def __init__(self, tp: TensorParallel, tokens: int, count: int) -> None:
        """`tokens` is M, and `count` the number of chunks: 1 or `tp.chunks_of(tokens)`."""
        self.count = count
        self._tp, self._tokens = tp, tokens
        self._whole: Tensor | None = None
        self._pending: list[Pending] = []
        self._chunks: list[Tensor] = []

    def issue(self, x: Tensor) -> None:
        """Issue the gather of the next chunk: (M / count, D)."""
        tp = self._tp
        if tp.sequence_parallel and self._whole is None:
            self._whole = x.new_empty(self._tokens * tp.size, x.shape[1])
        out = None if self._whole is None else self._whole.chunk(self.count)[len(self._pending)]
        self._pending.append(tp.gather_tokens(x, out, tp.chunks_of(self._tokens) // self.count))

    def chunk(self, i: int) -> Tensor:
        """Wait for chunk i, after those before it: (N / count, D)."""
        if i == len(self._chunks):
            self._chunks.append(self._pending[i]())
        return self._chunks[i]

    def whole(self) -> Tensor:
        """Wait for all chunks: (N, D)."""
        chunks = [self.chunk(i) for i in range(self.count)]
        return joined(chunks) if self._whole is None else self._whole


class Reduction:
    """The sum over ranks of a product's partial outputs, to this rank's tokens, issued and awaited by chunks."""

    def __init__(self, tp: TensorParallel, x: Tensor, multiply: Multiply, width: int, count: int) -> None:
        """Multiply x (N, I) to partial outputs of this width, D, by chunks."""
        self.count = count
        self._tp, self._multiply = tp, multiply
        self._tokens = len(x) // tp.size if tp.sequence_parallel else len(x)
        self._inputs = list(x.chunk(count))
        self._pending: list[Pending] = []
        self._sums: list[Tensor] = []
        # Without sequence parallelism the partial outputs become the sums.
        self._whole = x.new_empty(self._tokens, width) if count > 1 else None

    def issue(self) -> None:
        """Multiply the next chunk and issue its sum."""
        tp, chunks = self._tp, self._tp.chunks_of(self._tokens) // self.count
        out = None if self._whole is None else self._whole.chunk(self.count)[len(self._pending)]
        partial = self._multiply(self._inputs.pop(0), None if tp.sequence_parallel else out)
        self._pending.append(tp.reduce_tokens(partial, out, chunks))

    def issue_all(self, pass_on: Callable[[int], None] | None = None) -> None:
        """Issue all chunks, and call `pass_on` for each but the last, as soon as the next one travels."""
        for i in range(self.count):
            self.issue()
            if i and pass_on:
                pass_on(i - 1)

    def chunk(self, i: int) -> Tensor:
        """Wait for chunk i, after those before it: (M / count, D)."""
        if i == len(self._sums):
            self._sums.append(self._pending[i]())
        return self._sums[i]

    def whole(self) -> Tensor:
        """Wait for all chunks: (M, D)."""
        chunks = [self.chunk(i) for i in range(self.count)]
        return chunks[0] if self._whole is None else self._whole


def multiply_gathered(
    gathering: Gathering, multiply: Multiply, width: int, pass_last_on: Callable[[], None] | None = None
) -> Tensor:
    """Multiply the chunks of a gathering as they arrive: (N, `width`).

    `pass_last_on` issues the last chunk: before the first product, or behind it if there are several.
    """
    count, out, product = gathering.count, None, None
    for i in range(count):
        if pass_last_on and i == min(1, count - 1):
            pass_last_on()
        x = gathering.chunk(i)
        if count > 1 and out is None:
            out = x.new_empty(len(x) * count, width)
        product = multiply(x, None if out is None else out.chunk(count)[i])
    assert product is not None
    return product if out is None else out


def gather(tp: TensorParallel, x: Tensor, count: int) -> Gathering:
    """Issue the gather of x (M, D), in `count` chunks where tokens travel."""
    gathering = Gathering(tp, len(x), count if tp.sequence_parallel else 1)
    for chunk in x.chunk(gathering.count):
        gathering.issue(chunk)
    return gathering


class NormBackward:
    """`pointwise.rms_norm_backward` by chunks: the gradients of x (M, D), and the sum of those of the weight."""

    def __init__(self, x: Sequence[Tensor], weight: Tensor, eps: float, residuals: Sequence[Tensor]) -> None:
        self._x, self._weight, self._eps, self._residuals = x, weight, eps, residuals
        self.grads: list[Tensor] = []  # (M / count, D) each
        self.grad_weight = weight.new_zeros(())

    def chunk(self, grad: Tensor) -> Tensor:
        """Return the gradient of the next chunk of x, with that of the residual branch: (M / count, D)."""
        i = len(self.grads)
        grad_x, grad_weight = rms_norm_backward(grad, self._x[i], self._weight, self._eps, self._residuals[i])
        self.grads.append(grad_x)
        self.grad_weight = self.grad_weight + grad_weight if i else grad_weight
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


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return parts below each other as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
