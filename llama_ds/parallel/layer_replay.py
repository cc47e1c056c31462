"""A decoder layer's work on the first micro-batch of a step, recorded and computed again.

The record has what the layer was given, its input and the gradient of its output, and the fingerprints of what it
returned: its output, the gradient of its input, and those of its weights. The first micro-batch adds its weight
gradients to buffers that are still zero, so that their contents can be repeated. Recording changes no result.

Shapes: B rows, S tokens of this rank, D hidden size, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from llama_ds.model.decoder import DecoderLayer, LayerContext
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.parallel import messages
from llama_ds.parallel.fingerprints import combined, fingerprint

RESULTS = ("output", "gradient of the input", "weight gradients")  # in the order of their fingerprints


@dataclass(frozen=True)
class Given:
    """What a layer is given in the forward and backward of a micro-batch."""

    x: Tensor  # (B, S, D)
    grad: Tensor  # (B, S, D), of the output
    document_start: Tensor | None  # (B, T)
    deferred: bool = False  # whether the backward left weight gradients for later, and so was cut into chunks

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.x, self.grad] if self.document_start is None else [self.x, self.grad, self.document_start]


class LayerRecord:
    """Records one layer from its construction until `close`."""

    def __init__(self, layer: DecoderLayer, context: LayerContext) -> None:
        self._weight_gradients = context.weight_gradients
        self._index = {id(p): i for i, p in enumerate(layer.parameters())}
        self._x: Tensor | None = None
        self._document_start: Tensor | None = None
        self._grad: Tensor | None = None
        self._deferred = False
        self._prints: dict[int, Tensor] = {}  # by number of the weight
        self._output: Tensor | None = None
        self._grad_x: Tensor | None = None
        self._weight_gradients.observers.append(self._add)
        self._hooks = [layer.register_forward_hook(self._forward)]
        self._hooks += [p.register_hook(lambda grad, p=p: self._add(p, grad)) for p in layer.parameters()]

    def close(self) -> None:
        """Stop recording."""
        self._weight_gradients.observers.remove(self._add)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def given(self) -> Given:
        """What the layer was given."""
        assert self._x is not None and self._grad is not None, "the layer has computed nothing"
        return Given(self._x, self._grad, self._document_start, self._deferred)

    @property
    def results(self) -> Tensor:
        """The fingerprints of `RESULTS`: (3, 6)."""
        assert self._output is not None and self._grad_x is not None
        return torch.stack([self._output, self._grad_x, _in_order(self._prints)])

    def _forward(self, layer: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        output = result[0] if isinstance(result, tuple) else result
        if self._x is not None or not output.requires_grad:  # a later micro-batch, or one that is recomputed later
            return
        x, *rest = arguments[0] if isinstance(arguments[0], tuple) else arguments
        self._x, self._document_start = x.detach().clone(), rest[0] if rest else None
        self._output = fingerprint(output)
        output.register_hook(self._keep_grad)
        x.register_hook(self._keep_grad_x)

    def _keep_grad(self, grad: Tensor) -> None:
        self._grad, self._deferred = grad.detach().clone(), self._weight_gradients.deferred

    def _keep_grad_x(self, grad: Tensor) -> None:
        self._grad_x = fingerprint(grad)

    def _add(self, weight: nn.Parameter, gradient: Tensor | None, micro_batches: int = 1) -> None:
        # gradient is None: an observer gets it later
        number = self._index.get(id(weight))
        if gradient is not None and number is not None and number not in self._prints:
            self._prints[number] = fingerprint(gradient)


def replay(layer: DecoderLayer, context: LayerContext, given: Given) -> Tensor:
    """Compute a layer again; return the fingerprints of `RESULTS`: (3, 6). Collective over ranks that share it.

    Gradients go nowhere else. Needs memory for the gradients of one layer.
    """
    parameters = list(layer.parameters())
    index = {id(p): i for i, p in enumerate(parameters)}
    prints: dict[int, Tensor] = {}

    def add(weight: nn.Parameter, gradient: Tensor, micro_batches: int = 1) -> None:
        prints[index[id(weight)]] = fingerprint(gradient)

    with ExitStack() as during:
        if any(hasattr(p, "ds_id") for p in parameters):  # ZeRO-3
            during.enter_context(deepspeed.zero.GatheredParameters(parameters))
        during.enter_context(_on_its_own(layer, context, add, given.deferred))
        during.enter_context(torch.enable_grad())
        x = given.x.detach().requires_grad_()
        # Its `forward`, not the module: hooks of ZeRO-3, of the pipeline's optimizer and of norms are for the step.
        outputs = layer.forward(x if given.document_start is None else (x, given.document_start))
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        grad_x, *grads = torch.autograd.grad(output, [x, *parameters], given.grad, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                add(parameter, grad)
        return torch.stack([fingerprint(output), fingerprint(grad_x), _in_order(prints)])


def exchange(given: Given, to: int, source: int) -> Given:
    """Send what this rank's layer was given to rank `to`; return what that of rank `source` was. Collective."""
    sent = given.tensors
    received = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in sent]
    outgoing = [(tensor.contiguous(), to) for tensor in sent]
    for handle in messages.exchange([(tensor, source) for tensor in received], outgoing, None):
        handle.wait()
    x, grad, *rest = received
    return replace(given, x=x, grad=grad, document_start=rest[0] if rest else None)


@contextmanager
def _on_its_own(
    layer: DecoderLayer, context: LayerContext, added: Callable[[nn.Parameter, Tensor, int], None], in_chunks: bool
) -> Iterator[None]:
    """Let a layer compute without its stage: no early collectives and recomputes, gradients into zeroed memory.

    `in_chunks`: whether its backward cuts tokens as that of a deferring schedule does.
    """
    gradients = context.weight_gradients
    buffer_of = gradients.buffer_of
    changes: list[tuple[Any, dict[str, Any]]] = [
        (gradients, {"deferred": False, "observers": [added], "added": lambda parameter: None})
    ]
    if isinstance(layer, ManualBackwardLayer):
        changes.append((layer, {"first": True, "recomputes_early": False, "cuts_backward": in_chunks, "graphs": None}))
        if buffer_of is not None:
            matrices = [p for p in layer.parameters() if p.dim() > 1]
            scratch = dict(zip(map(id, matrices), _zeroed([buffer_of(p) for p in matrices]), strict=True))
            changes.append((gradients, {"buffer_of": lambda parameter: scratch[id(parameter)]}))
    before = [(owner, {name: getattr(owner, name) for name in values}) for owner, values in changes]
    try:
        for owner, values in changes:
            vars(owner).update(values)
        yield
    finally:
        for owner, values in before:
            vars(owner).update(values)


def _zeroed(buffers: Sequence[Tensor]) -> list[Tensor]:
    """Return zeros like `buffers`, as far apart in memory. A product for adjacent ones may round differently."""
    first = min(buffers, key=lambda buffer: buffer.data_ptr())
    size = first.element_size()
    begins = [(buffer.data_ptr() - first.data_ptr()) // size for buffer in buffers]
    span = max(begin + buffer.numel() for begin, buffer in zip(begins, buffers, strict=True))
    if span > 2 * sum(buffer.numel() for buffer in buffers):  # not neighbours in one flat buffer
        return [torch.zeros_like(buffer) for buffer in buffers]
    flat = torch.zeros(span, dtype=first.dtype, device=first.device)
    return [flat[begin:][: buffer.numel()].view_as(buffer) for begin, buffer in zip(begins, buffers, strict=True)]


def _in_order(prints: dict[int, Tensor]) -> Tensor:
    return combined([prints[number] for number in sorted(prints)])
