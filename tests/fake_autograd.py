"""Autograd without the engine of autograd, for tensors of a device that this build of torch does not have."""

from __future__ import annotations

from collections import defaultdict
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
    todo = _in_order(given)
    while todo:
        node = todo.pop()
        found = given.pop(node, {})
        if not found:
            continue
        if hasattr(node, "variable"):
            leaf, grad = node.variable, found[0]
            found, wanted = ((x.shape, x.dtype, x.device) for x in (grad, leaf))
            assert found == wanted, f"a gradient of {found} for a weight of {wanted}"
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad
            for hook in (leaf._post_accumulate_grad_hooks or {}).values():
                hook(leaf)
            continue
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


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _in_order(roots: Any) -> list[Any]:
    """Return the nodes below `roots`, each before those that call it."""
    order: list[Any] = []
    seen: set[Any] = set()
    todo = [(root, False) for root in roots]
    while todo:
        node, done = todo.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            todo.append((node, True))
            todo += [(target, False) for target, _ in node.next_functions if target is not None]
    return order
