"""Decoder layers whose forward, backward and deferred weight gradients are CUDA graphs, for stages that are
launch-bound: the host launches a pass of a layer by one call.

A graph reads and writes fixed memory, so each micro-batch in flight needs memory of its own: a slot. A slot of a chunk
(the layers of a stage on this rank) holds of each layer the output, what the save policy keeps, the gradient of the
input, and the factors of deferred weight gradients. A layer's output is the next layer's input, and the gradient of an
input that of the output below, in the same memory. A forward of the chunk's first layer takes a free slot; the last use
by any layer returns it. Slots are captured when they are first needed, so there are as many as the schedule keeps
micro-batches in flight. Graphs have the memory of temporaries in common, because they run one after the other.

Each graph is checked before its result is used: the eager layer and the first replay compute the same micro-batch, and
must agree to the bit. Where the eager layer does not repeat itself to the bit (attention that adds in no fixed order),
they may differ by a few times its own variation. Whatever else could go wrong silently, moved weights or buffers, other
shapes, ends the run.

What the host does besides launching, such as starting the reduction of a gradient, is not part of a graph and follows
each replay. Everything outside of the layers stays eager, and so do layers without gradients, as in validation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from llama_ds.errors import UserError
from llama_ds.log import logger
from llama_ds.model.graphs import Graphs, Replay, T, tensors_of
from llama_ds.model.manual_backward import ManualBackwardLayer, Saved, backward, forward
from llama_ds.model.weight_gradients import Added, WeightGradients, Work

# Two runs that add in any order differ from each other by about as much as each of them from a third.
_VARIATION = 4.0


@dataclass
class _Backward:
    """A graph of a backward and its memory."""

    grad_y: Tensor
    grad_x: Tensor
    grads: list[Tensor | None]  # gradients of the parameters in order
    work: list[Work]  # deferred weight gradients
    added: list[Added]
    replay: Replay


@dataclass
class _Forward:
    """A graph of a forward in a slot and its memory, and those of the backwards that belong to it."""

    x: Tensor
    y: Tensor
    saved: Saved
    replay: Replay
    backwards: dict[bool, _Backward] = field(default_factory=dict)  # by whether weight gradients are deferred


class GraphedChunk:
    """Consecutive layers of a stage, and the slots for the micro-batches that they hold."""

    def __init__(self, layers: Sequence[ManualBackwardLayer], gradients: WeightGradients, graphs: Graphs) -> None:
        """Let `layers` compute by `graphs` in training. Their weights must stay where they are."""
        self.gradients, self.graphs = gradients, graphs
        self.slot = -1  # slot of the running forward
        self._count = 0
        self._free: deque[int] = deque()
        self._users: dict[int, int] = {}  # layers that still use a slot
        self._layers: list[GraphedLayer] = []
        for layer in layers:
            graphed = GraphedLayer(self, layer, self._layers[-1] if self._layers else None)
            layer.graphs, layer.recomputes_early = graphed, False
            self._layers.append(graphed)

    def take(self) -> None:
        """Take the slot that has been free for longest for a forward of all layers, or a new one."""
        if not self._free:
            self._free.append(self._count)
            self._count += 1
        self.slot = self._free.popleft()
        self._users[self.slot] = len(self._layers)

    def release(self, slot: int) -> None:
        """Return a slot that one of the layers does not need any more."""
        self._users[slot] -= 1
        if not self._users[slot]:
            self._free.append(slot)

    def discard_forwards(self) -> None:
        """Return all slots: the backwards of the forwards so far will not run."""
        self._free = deque(range(self._count))


class GraphedLayer:
    """The graphs of one layer."""

    above: GraphedLayer | None = None  # the next layer of the chunk

    def __init__(self, chunk: GraphedChunk, layer: ManualBackwardLayer, below: GraphedLayer | None) -> None:
        """`below` is the layer before it in its chunk."""
        self.layer, self.below = layer, below
        if below is not None:
            below.above = self
        self._chunk = chunk
        self._slots: dict[int, _Forward] = {}
        self._deferred: deque[int] = deque()  # slots whose weight gradients are to be computed
        self._weight_graphs: dict[tuple[int, ...], tuple[list[Added], Replay]] = {}
        self._addresses: list[int] = []  # addresses of the weights at the first capture

    def __call__(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return _Graphed.apply(x, self, *self.layer.parameters_in_order())

    def forward(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, int]:
        """Compute the layer for x (B, S, D), without autograd; return its output and the slot that the backward needs.

        The output keeps its value until the backward has run.
        """
        if self.below is None:
            self._chunk.take()
        slot = self._chunk.slot
        self._check_in_place(weights)
        if slot not in self._slots:
            self._slots[slot] = self._capture_forward(slot, x)
        else:
            found = self._slots[slot]
            self._place(x, found.x, owned=self.below is None)
            found.replay()
        return self._slots[slot].y.detach(), slot

    def backward(self, slot: int, grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradient of the input (B, S, D) and those of the parameters, for that of the output."""
        chunk, deferred = self._chunk, self._chunk.gradients.deferred
        known = self._slots[slot].backwards
        if deferred not in known:
            known[deferred] = self._capture_backward(slot, grad)
        else:
            self._place(grad, known[deferred].grad_y, owned=self.above is None)
            known[deferred].replay()
        found = known[deferred]
        # Copies of all that leaves the chunk: a message, or a sum of autograd, may outlast the use of the slot.
        grad_x = found.grad_x.clone() if self.below is None else found.grad_x.detach()
        grads = [None if grad is None else grad.clone() for grad in found.grads]
        chunk.gradients.tell(found.added)
        if deferred:
            self._deferred.append(slot)
        else:
            chunk.release(slot)
        return grad_x, grads

    def run_oldest(self, micro_batches: int = 1) -> None:
        """Compute the weight gradients of the oldest deferred micro-batches, as `LayerWeightGradients` does."""
        slots = tuple(self._deferred.popleft() for _ in range(micro_batches))
        if slots in self._weight_graphs:
            self._weight_graphs[slots][1]()
        else:
            self._weight_graphs[slots] = self._capture_weights(slots)
        self._chunk.gradients.tell(self._weight_graphs[slots][0])
        for slot in slots:
            self._chunk.release(slot)

    def discard_forwards(self) -> None:
        """Forget the forwards of the chunk whose backward will not run."""
        self._chunk.discard_forwards()

    def _capture_forward(self, slot: int, x: Tensor) -> _Forward:
        if self.below is None:
            logger.info("parallel.cuda_graphs: capturing layers from %s on, slot %d", self._name, slot)
        static = torch.empty_like(x) if self.below is None else self.below._slots[slot].y

        def compute(x: Tensor) -> tuple[Tensor, Saved]:
            y, saved = forward(self.layer, x, None, self.layer.policy)
            assert y is not None
            return y, saved

        def place() -> None:
            self._place(x, static, owned=self.below is None)

        (y, saved), replay = self._verified("forward", compute, x, static, place, [])
        return _Forward(static, y, saved, replay)

    def _capture_backward(self, slot: int, grad: Tensor) -> _Backward:
        gradients, saved = self._chunk.gradients, self._slots[slot].saved
        deferred = gradients.deferred
        static = torch.empty_like(grad) if self.above is None else self.above._slots[slot].backwards[deferred].grad_x

        def compute(grad: Tensor) -> tuple[Tensor, list[Tensor | None], list[Work], list[Added]]:
            kept = saved
            if self.layer.policy == "full":
                _, kept = forward(self.layer, saved.x, None, "none", output=False)
            with gradients.withholding() as added:
                grad_x, grads = backward(self.layer, grad, kept, None)
            return grad_x, grads, self.layer.weight_grads.take_newest(), added

        def place() -> None:
            self._place(grad, static, owned=self.above is None)

        buffers = [] if deferred else self._buffers()
        (grad_x, grads, work, added), replay = self._verified("backward", compute, grad, static, place, buffers)
        return _Backward(static, grad_x, grads, work, added, replay)

    def _capture_weights(self, slots: tuple[int, ...]) -> tuple[list[Added], Replay]:
        def compute(works: list[list[Work]]) -> list[Added]:
            with self._chunk.gradients.withholding() as added:
                self.layer.weight_grads.run(works)
            return added

        works = [self._slots[slot].backwards[True].work for slot in slots]
        return self._verified("weight gradients", compute, works, works, lambda: None, self._buffers())

    def _verified(
        self,
        what: str,
        compute: Callable[[Any], T],
        given: Any,
        static: Any,
        place: Callable[[], None],
        buffers: Sequence[Tensor],
    ) -> tuple[T, Replay]:
        """Capture `compute(static)`, and compare the first replay with `compute(given)`; return what `capture` does.

        Args:
            place: gives `static` the value of `given`.
            buffers: to which `compute` adds; in the end the replay has added to them once.

        Raises:
            UserError: the work cannot be captured, or the replay's result is another one.
        """
        before = [buffer.clone() for buffer in buffers]

        def restore() -> None:
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)

        def eager() -> list[Tensor]:
            found = [*_floats(compute(given)), *(buffer.clone() for buffer in buffers)]
            restore()
            return found

        # The eager layer comes first: it also compiles kernels and gets workspaces, which a capture cannot do.
        expected = eager()
        try:
            result, replay = self._chunk.graphs.capture(lambda: compute(static))
        except torch.OutOfMemoryError:  # explained by what the rank holds
            raise
        except RuntimeError as error:
            raise self._refusal(f"cannot be captured ({str(error).splitlines()[0]})", what) from None
        place()
        replay()
        found = [*_floats(result), *buffers]
        if self._chunk.graphs.computes and not _same(expected, found):
            found = [tensor.clone() for tensor in found]
            restore()
            if not _vary(expected, eager(), found):
                raise self._refusal("computes something else as a graph", what)
            replay()
        return result, replay

    def _place(self, given: Tensor, static: Tensor, owned: bool) -> None:
        """Give a graph's input its value. One that is not `owned` is the output of a neighbour's graph, in place."""
        if given.shape != static.shape:
            shapes = f"{list(static.shape)}, and not for {list(given.shape)}"
            raise self._refusal(f"is captured for hidden states {shapes}", "training")
        if owned:
            static.copy_(given)
        elif given.data_ptr() != static.data_ptr():
            raise RuntimeError(f"{self._name} is not given what its neighbour in the same slot has computed")

    def _check_in_place(self, weights: Sequence[Tensor]) -> None:
        addresses = [weight.data_ptr() for weight in weights]
        self._addresses = self._addresses or addresses
        if addresses != self._addresses:
            raise self._refusal("has weights that have moved since it was captured", "training")

    def _buffers(self) -> list[Tensor]:
        buffer_of = self._chunk.gradients.buffer_of
        return [buffer_of(p) for p in self.layer.parameters_in_order() if p.dim() > 1] if buffer_of else []

    @property
    def _name(self) -> str:
        number, _ = self.layer.self_attn.q_proj.named
        return f"decoder layer {number}"

    def _refusal(self, problem: str, what: str) -> UserError:
        return UserError(f"parallel.cuda_graphs = true: {self._name} {problem} ({what}); set it to false")


class _Graphed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: GraphedLayer, *parameters: Tensor) -> Tensor:
        ctx.layer = layer
        y, ctx.slot = layer.forward(x, parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_x, grads = ctx.layer.backward(ctx.slot, grad)
        return grad_x, None, *grads


def _floats(result: Any) -> list[Tensor]:
    """Return the floating-point tensors that a graph computes, without the buffers to which it adds.

    The state of a dropout that does nothing may differ.
    """
    return [tensor for tensor in tensors_of(result, without=Added) if tensor.is_floating_point()]


def _same(expected: Iterable[Tensor], found: Iterable[Tensor]) -> bool:
    """Return whether all numbers are the same; NaN is the same as NaN."""
    pairs = zip(expected, found, strict=True)
    return all(bool(((one == other) | (one.isnan() & other.isnan())).all()) for one, other in pairs)


def _vary(expected: list[Tensor], repeated: list[Tensor], found: list[Tensor]) -> bool:
    """Return whether the eager layer does not repeat itself, and `found` is as near to `expected` as it is itself."""
    if _same(expected, repeated):
        return False
    for one, again, other in zip(expected, repeated, found, strict=True):
        unit = torch.finfo(one.dtype).eps * one.double().norm()
        variation = (again.double() - one.double()).norm()
        if not (other.double() - one.double()).norm() <= _VARIATION * variation + unit:
            return False
    return True
