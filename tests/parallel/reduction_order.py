"""Watches the order in which a rank adds its last weight gradients of a step and begins to reduce them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from llama_ds.schedules.instructions import COMPUTES, Op

Event = tuple[str, int, int, int]  # add or reduce, chunk, layer of the chunk, micro-batches that are added


@contextmanager
def watched_reductions(engine: Any) -> Iterator[None]:
    """Check the order of a step of our pipeline engine, by one matrix of each decoder layer."""
    events: list[Event] = []
    layers = {
        id(layer.mlp.gate_proj.weight): (chunk, i)
        for chunk, own in enumerate(engine.manual_layers)
        for i, layer in enumerate(own)
    }

    def added(weight: nn.Parameter, buffer: Tensor, micro_batches: int) -> None:
        if id(weight) in layers:
            events.append(("add", *layers[id(weight)], micro_batches))

    observers, buckets = engine._context.weight_gradients.observers, engine.optimizer._buckets
    for bucket in buckets:
        own = [layers[id(p)] for i in bucket.groups for p in engine.optimizer.bf16_groups[i] if id(p) in layers]

        def start(begin: Any = bucket.start_reduction, bucket: Any = bucket, own: Any = own) -> None:
            if own and not bucket._reduced:
                events.append(("reduce", *own[0], 0))
            begin()

        bucket.start_reduction = start
    observers.append(added)
    yield
    observers.remove(added)
    for bucket in buckets:
        del bucket.start_reduction
    _check(engine, events)


def _check(engine: Any, events: list[Event]) -> None:
    """Check that each layer's reduction began before the last deferred gradients of the layer below were computed."""
    computations = [step for step in engine._instructions if step.op in COMPUTES]
    runs = [list(run) for _, run in groupby(computations, lambda step: (step.op, step.chunk))]
    for chunk, layers in enumerate(engine.manual_layers):
        run = next(run for run in reversed(runs) if run[0].chunk == chunk and run[0].op.value in ("BW", "W"))
        if run[0].op is not Op.WEIGHT_BACKWARD:
            continue
        at = events.index(("reduce", chunk, 0, 0))
        for layer in range(len(layers)):  # the one that is reduced last comes first
            assert events[at] == ("reduce", chunk, layer, 0), events
            left = len(run)
            while left:
                at -= 1
                assert events[at][:3] == ("add", chunk, layer), events
                left -= events[at][3]
            at -= 1
