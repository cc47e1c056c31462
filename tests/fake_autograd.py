"""Autograd without the engine of autograd, for tensors of a device that this build of torch does not have."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge


def backward(outputs: Any, grads: Any = None, *unused: Any, **options: Any) -> None:
    """Call the nodes of a graph in order: autograd's own engine wants threads and streams of the device."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    grads = [grads] if grads is None or isinstance(grads, Tensor) else list(grads)
    given: dict[Any, dict[int, Tensor]] = defaultdict(dict)  # gradients by node and output
    for output, grad in zip(outputs, grads, strict=True):
        edge = get_gradient_edge(output) if isinstance(output, Tensor) else output
        given[edge.node][edge.output_nr] = torch.ones_like(output) if grad is None else grad
    # Nodes not called yet that give a gradient to a node.
    uses = Counter(target for node in _below(given) for target, _ in node.next_functions)
    ready = [(_priority(node), node) for node in given if not uses[node]]
    while ready:
        entry = min(ready, key=lambda entry: entry[0])
        ready.remove(entry)
        node = entry[1]
        found = given.pop(node, {})
        if found and hasattr(node, "variable"):
            _accumulate(node.variable, found[0])
        elif found:
            _call(node, found, given)
        for target, _ in node.next_functions:
            uses[target] -= 1
            if target is not None and not uses[target]:
                ready.append((_priority(target), target))


def _priority(node: Any) -> float:
    """Return a number that is the lower, the sooner a node is called: leaves at once, others the last one first.

    Hooks that release a weight rely on it.
    """
    return -float("inf") if hasattr(node, "variable") else -node._sequence_nr()


def _call(node: Any, found: dict[int, Tensor], given: dict[Any, dict[int, Tensor]]) -> None:
    """Call a node for the gradients of its outputs, and add what it returns to those given to other nodes."""
    arguments = [found.get(i) for i in range(1 + max(found))]
    with torch.no_grad():
        if isinstance(node, BackwardCFunction):  # returns a gradient for every argument, tensor or not
            results = _as_tuple(node.apply(*arguments))
            results = tuple(x for x, needed in zip(results, node.needs_input_grad, strict=False) if needed)
            edges = [edge for edge in node.next_functions if edge[0] is not None]
        else:
            results, edges = _as_tuple(node(*arguments)), node.next_functions
    for (target, number), grad in zip(edges, results, strict=False):
        if target is not None and grad is not None:
            given[target][number] = given[target][number] + grad if number in given[target] else grad


def _accumulate(leaf: Tensor, grad: Tensor) -> None:
    found, wanted = ((x.shape, x.dtype, x.device) for x in (grad, leaf))
    assert found == wanted, f"a gradient of {found} for a weight of {wanted}"
    leaf.grad = grad if leaf.grad is None else leaf.grad + grad
    for hook in (leaf._post_accumulate_grad_hooks or {}).values():
        hook(leaf)


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _below(roots: Any) -> set[Any]:
    """Return the nodes of the graph that `roots` begin."""
    seen, todo = set(roots), list(roots)
    while todo:
        for target, _ in todo.pop().next_functions:
            if target is not None and target not in seen:
                seen.add(target)
                todo.append(target)
    return seen
