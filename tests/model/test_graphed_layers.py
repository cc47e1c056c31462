"""Layers computed by CUDA graphs give the same bits as without, and what a graph would compute wrongly ends the run.

The graphs are emulated (`tests/emulated_graphs.py`), on micro-batches in the orders of pipelines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from llama_ds.config.recompute import POLICIES
from llama_ds.errors import UserError
from llama_ds.layout.activation_memory import LayerWork
from llama_ds.layout.recompute import kept_bytes
from llama_ds.model import graphed_layers, manual_backward, weight_gradients
from llama_ds.model.graphed_layers import GraphedChunk
from llama_ds.model.graphs import CudaGraphs, Graphs
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.schedules.schedule import Held
from tests.emulated_graphs import EmulatedGraphs
from tests.model.test_manual_backward import SHAPES, context_for

T = TypeVar("T")
ROWS, TOKENS, LAYERS = 2, 24, 2
# Passes of micro-batches: forward, backward, input backward, weight backward (of two: joint).
ONE_AT_A_TIME = ["F0", "B0", "F1", "B1"]
TWO_IN_FLIGHT = ["F0", "F1", "B0", "F2", "B1", "B2"]
SPLIT = ["F0", "F1", "B0", "F2", "I1", "W1", "F3", "I2", "I3", "W2", "W3"]
JOINT = ["F0", "F1", "I0", "W0", "F2", "I1", "F3", "I2", "W1 2", "I3", "W3"]


class Chunk:
    """Layers with fp32 buffers for the gradients of their matrices."""

    def __init__(self, shape: str, policy: str, buffers: bool = True, device: str = "cpu") -> None:
        context = context_for(SHAPES[shape], "sdpa" if device == "cpu" else "reference")
        self.device = device
        self.layers = [ManualBackwardLayer(context, i, policy).to(device) for i in range(LAYERS)]
        for layer in self.layers:
            layer.lay_weights_together()
        self.parameters = [p for layer in self.layers for p in layer.parameters()]
        self.gradients = context.weight_gradients
        self.sums = {id(p): torch.zeros_like(p) for p in self.parameters}
        self.told: list[int] = []
        if buffers:
            self.gradients.buffer_of = lambda p: self.sums[id(p)]
        self.gradients.added = lambda p: self.told.append([id(one) for one in self.parameters].index(id(p)))

    def step(self, passes: list[str], seed: int = 0, rows: int = ROWS) -> list[Tensor]:
        """Run the passes and update the weights; return outputs and gradients, read after the last pass."""
        found: list[Tensor] = []
        inputs, outputs = dict[str, Tensor](), dict[str, Tensor]()
        for kind, numbers in ((name[0], name[1:].split()) for name in passes):
            self.gradients.deferred = kind == "I"
            if kind == "W":
                for layer in self.layers[::-1]:
                    layer.run_deferred_wgrad(int(numbers[1]) if len(numbers) > 1 else 1)
                continue
            generator = torch.Generator().manual_seed(10 * seed + int(numbers[0]))
            x, grad = torch.randn(2, rows, TOKENS, 32, generator=generator).to(self.device)
            if kind == "F":
                inputs[numbers[0]] = x.requires_grad_()
                for layer in self.layers:
                    x = layer(x)
                outputs[numbers[0]] = x
                found.append(x.detach().clone())
            else:
                outputs.pop(numbers[0]).backward(grad)
        found += [x.grad for x in inputs.values() if x.grad is not None]
        with torch.no_grad():
            for p in self.parameters:
                total = self.sums[id(p)]
                if p.grad is not None:
                    total += p.grad
                found.append(total.clone())
                p.sub_(0.01 * total)
                total.zero_()
                p.grad = None
        return found


def graphed(chunk: Chunk, graphs: Graphs | None = None) -> Chunk:
    GraphedChunk(chunk.layers, chunk.gradients, graphs or EmulatedGraphs())
    return chunk


def assert_same_bits(chunk: Chunk, eager: Chunk, passes: list[str]) -> None:
    for step in range(3):
        found, wanted = chunk.step(passes, step), eager.step(passes, step)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)
    assert chunk.told == eager.told


@pytest.mark.parametrize("passes", [ONE_AT_A_TIME, TWO_IN_FLIGHT, SPLIT, JOINT], ids=["1", "2", "split", "joint"])
@pytest.mark.parametrize("policy", POLICIES)
def test_graphs_compute_the_same_bits(policy: str, passes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradients, "multiplied_jointly", lambda tokens, outputs, inputs, *_: outputs > inputs)
    assert_same_bits(graphed(Chunk("grouped_query", policy)), Chunk("grouped_query", policy), passes)


@pytest.mark.gpu
@pytest.mark.parametrize("passes", [ONE_AT_A_TIME, TWO_IN_FLIGHT, SPLIT, JOINT], ids=["1", "2", "split", "joint"])
@pytest.mark.parametrize("policy", POLICIES)
def test_graphs_of_a_gpu_compute_the_same_bits(policy: str, passes: list[str]) -> None:
    chunk, eager = (Chunk("grouped_query", policy, device="cuda") for _ in range(2))
    assert_same_bits(graphed(chunk, CudaGraphs()), eager, passes)


@pytest.mark.parametrize("shape", ["biases", "qkv_bias_and_norms"])
def test_gradients_of_biases_and_norms_outlast_their_slot(shape: str) -> None:
    """Also without buffers, where autograd sums the gradients of all weights."""
    for buffers in (True, False):
        passes = TWO_IN_FLIGHT
        assert_same_bits(graphed(Chunk(shape, "selective", buffers)), Chunk(shape, "selective", buffers), passes)


def test_graphs_are_captured_once_for_each_micro_batch_in_flight() -> None:
    graphs = EmulatedGraphs()
    chunk = graphed(Chunk("grouped_query", "none"), graphs)
    chunk.step(SPLIT)
    # Of two slots the forwards and the split backwards with their weight gradients, of the first one a whole backward.
    first, replays = graphs.captures, graphs.replays
    assert first == LAYERS * (2 + 1 + 2 + 2)
    for step in range(2):
        chunk.step(SPLIT, step)
    assert graphs.captures == first and graphs.replays == replays + 2 * LAYERS * len(SPLIT)


@pytest.mark.parametrize("passes", [TWO_IN_FLIGHT, JOINT], ids=["whole", "deferred"])
@pytest.mark.parametrize("policy", POLICIES)
def test_slots_hold_what_the_cost_table_says(policy: str, passes: list[str]) -> None:
    chunk = graphed(Chunk("grouped_query", policy))
    passes = [one for one in passes if one[0] != "B"] if passes is JOINT else passes
    chunk.step(passes)
    held: dict[int, int] = {}
    slots = [slot for layer in chunk.layers if layer.graphs for slot in layer.graphs._slots.values()]
    for slot in slots:
        for found in slot.backwards.values():
            for tensor in (
                slot.x,
                slot.y,
                *graphed_layers._floats([slot.saved, found.grad_y, found.grad_x, found.work]),
            ):
                held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    work = LayerWork(SHAPES["grouped_query"], TOKENS, ROWS, element_bytes=4)
    at_once = Held(len(slots) // LAYERS, int(passes is not TWO_IN_FLIGHT))
    flights = [at_once._replace(to_backward=at_once.to_backward - at_once.to_weights)]
    assert sum(held.values()) == kept_bytes(work, {policy: LAYERS}, flights, graphed=1)


def test_validation_is_eager_and_uses_no_slot() -> None:
    graphs = EmulatedGraphs()
    chunk, eager = graphed(Chunk("grouped_query", "none"), graphs), Chunk("grouped_query", "none")
    with torch.no_grad():
        x = torch.randn(1, 7, 32)
        assert torch.equal(chunk.layers[0](x), eager.layers[0](x))
    assert graphs.captures == 0
    assert_same_bits(chunk, eager, TWO_IN_FLIGHT)


def test_discarded_forwards_return_their_slots() -> None:
    chunk, eager = graphed(Chunk("grouped_query", "none")), Chunk("grouped_query", "none")
    chunk.step(["F0", "F1"])
    for layer in chunk.layers:
        layer.discard_forwards()
    assert_same_bits(chunk, eager, TWO_IN_FLIGHT)
    graph = chunk.layers[0].graphs
    assert graph is not None and len(graph._slots) == 2


def test_a_slot_that_is_reused_too_early_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation finds what it is for: the forward of a second micro-batch overwrites what the first one saved."""

    def take(self: GraphedChunk) -> None:
        self.slot = 0
        self._users[0] = 2 * LAYERS

    monkeypatch.setattr(GraphedChunk, "take", take)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_same_bits(graphed(Chunk("grouped_query", "none")), Chunk("grouped_query", "none"), TWO_IN_FLIGHT)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_memory_of_temporaries_shows_as_nan(kept: int) -> None:
    """A result that the capture forgets to hold would be overwritten by other graphs of the pool."""
    graphs = EmulatedGraphs()
    weight = torch.ones(3)
    held: list[Tensor] = []

    def compute() -> Tensor:
        held.extend([weight + 1, weight * 2, weight - 1])
        return held[kept]

    result, replay = graphs.capture(compute)
    assert result.isnan().all(), "a capture computes nothing"
    replay()
    assert not result.isnan().any() and sum(bool(x.isnan().all()) for x in held) == 2


def test_weights_that_move_end_the_run() -> None:
    chunk = graphed(Chunk("grouped_query", "none"))
    chunk.step(ONE_AT_A_TIME)
    weight = chunk.layers[1].mlp.down_proj.weight
    weight.data = weight.data.clone()
    refused(lambda: chunk.step(ONE_AT_A_TIME), "decoder layer 1 has weights that have moved")


def test_buffers_that_move_end_the_run() -> None:
    chunk = graphed(Chunk("grouped_query", "none"))
    chunk.step(ONE_AT_A_TIME)
    weight = chunk.layers[0].mlp.down_proj.weight
    chunk.sums[id(weight)] = torch.zeros_like(weight)
    with pytest.raises(RuntimeError, match="not the matrix's any more"):
        chunk.step(ONE_AT_A_TIME)


def test_rows_of_another_shape_end_the_run() -> None:
    chunk = graphed(Chunk("grouped_query", "none"))
    chunk.step(ONE_AT_A_TIME)
    refused(lambda: chunk.step(ONE_AT_A_TIME, rows=3), r"captured for hidden states \[2, 24, 32\], and not for \[3, 24")


def test_a_layer_that_waits_for_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def swiglu(gate_up: Tensor) -> Tensor:
        assert gate_up.sum().item() != 0
        return original(gate_up)

    original = manual_backward.swiglu
    monkeypatch.setattr(manual_backward, "swiglu", swiglu)
    chunk = graphed(Chunk("grouped_query", "none"))
    refused(lambda: chunk.step(ONE_AT_A_TIME), r"decoder layer 0 cannot be captured \(operation not permitted [^)]*\)")


def test_a_lack_of_memory_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer explains it by what the rank holds."""

    def capture(self: EmulatedGraphs, function: Callable[[], T]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(EmulatedGraphs, "capture", capture)
    with pytest.raises(torch.OutOfMemoryError):
        graphed(Chunk("grouped_query", "none")).step(ONE_AT_A_TIME)


class Wrong(EmulatedGraphs):
    """Adds `size` to one element of what the graph of a number computes: a result, or else `buffer`."""

    def __init__(self, number: int, size: float = 1e-5, buffer: Tensor | None = None) -> None:
        super().__init__()
        self.number, self.size, self.buffer = number, size, buffer

    def capture(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        result, replay = super().capture(function)
        if self.captures != self.number:
            return result, replay
        changed = next(iter(graphed_layers._floats(result)), self.buffer)
        assert changed is not None

        def wrong() -> None:
            replay()
            changed.view(-1)[0] += self.size

        return result, wrong


@pytest.mark.parametrize(("number", "what"), [(1, "layer 0 .*forward"), (2, "layer 1 .*forward"), (3, "1 .*backward")])
def test_a_first_replay_with_another_result_ends_the_run(number: int, what: str) -> None:
    refused(lambda: graphed(Chunk("grouped_query", "none"), Wrong(number)).step(ONE_AT_A_TIME), what)


def test_weight_gradients_of_another_value_end_the_run() -> None:
    chunk = Chunk("grouped_query", "none")
    wrong = Wrong(2 * LAYERS + 1, buffer=chunk.sums[id(chunk.layers[1].mlp.down_proj.weight)])
    refused(lambda: graphed(chunk, wrong).step(["F0", "I0", "W0"]), r"layer 1 .*\(weight gradients\)")


@pytest.mark.parametrize("size", [1e-5, 1e-2])
def test_attention_that_adds_in_any_order_may_differ_by_its_own_variation(
    size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of queries and keys differ by 1e-6 from one run to the next. So may a graph's, but not by much more."""
    back, generator = manual_backward.rotate_heads_back, torch.Generator().manual_seed(3)

    def varying(grads: Any, tables: Any) -> Tensor:
        total = back(grads, tables)
        return total + 1e-6 * torch.randn(total.shape, generator=generator)

    monkeypatch.setattr(manual_backward, "rotate_heads_back", varying)
    chunk = graphed(Chunk("grouped_query", "none"), Wrong(3, size))
    if size < 1e-3:
        chunk.step(ONE_AT_A_TIME)
    else:
        refused(lambda: chunk.step(ONE_AT_A_TIME), "computes something else as a graph")


def refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=f"parallel.cuda_graphs = true: .*{words}.*; set it to false"):
        call()
