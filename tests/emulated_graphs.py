"""CUDA graphs on a CPU, which show what a real graph would compute wrongly.

A capture records each operator with its tensors. A replay runs the same operators on the same memory: numbers of
Python are those of the capture, and a tensor that has moved since is read where it was. A capture on a GPU computes
nothing, so what it wrote is undone. Memory of a graph's temporaries is overwritten after each replay, as other graphs
of the pool would, and that of its results until the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_ds.model.graphs import tensors_of

T = TypeVar("T")
_WAITS = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero")  # for the device
_ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_POISON = 0xFF  # NaN in every floating-point dtype, -1 in signed integers


class EmulatedGraphs:
    """Counts captures and replays."""

    computes = True

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        recording = _Recording()
        with recording:
            result = function()
        recording.end(result)
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return result, replay


class _Operator(NamedTuple):
    func: Any
    args: Any
    kwargs: Any
    new: list[tuple[int, Tensor]]  # results with memory of their own, by number
    precision: str  # decides which library multiplies on a CPU (`model/cpu_products.py`)


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._operators: list[_Operator] = []
        self._own: dict[int, Any] = {}  # storages that were allocated during the capture
        self._temporary: list[Any] = []
        self._before: dict[int, tuple[Any, Any]] = {}  # others that it wrote, and what they held

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _WAITS or func.namespace == "c10d":
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}\nmore of CUDA's words")
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _written(func._schema, args, kwargs):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own and storage._cdata not in self._before:
                self._before[storage._cdata] = storage, storage.clone()
        result = func(*args, **kwargs)
        new = [(i, x) for i, x in enumerate(_outputs(result)) if x.untyped_storage()._cdata not in given]
        self._own.update({x.untyped_storage()._cdata: x.untyped_storage() for _, x in new})
        if name not in _ALLOCATES and (new or list(_written(func._schema, args, kwargs))):
            self._operators.append(_Operator(func, args, kwargs, new, torch.get_float32_matmul_precision()))
        return result

    def end(self, result: Any) -> None:
        """Undo what the capture computed. Only tensors in `result` keep their memory."""
        for storage, before in self._before.values():
            storage.copy_(before)
        kept = {tensor.untyped_storage()._cdata for tensor in tensors_of(result)}
        self._temporary = [storage for key, storage in self._own.items() if key not in kept]
        for storage in self._own.values():
            storage.fill_(_POISON)

    @torch.no_grad()
    def replay(self) -> None:
        before = torch.get_float32_matmul_precision()
        for func, args, kwargs, new, precision in self._operators:
            torch.set_float32_matmul_precision(precision)
            results = list(_outputs(func(*args, **kwargs)))
            for i, recorded in new:
                recorded.copy_(results[i])
        torch.set_float32_matmul_precision(before)
        for storage in self._temporary:
            storage.fill_(_POISON)


def _outputs(result: Any) -> Iterator[Tensor]:
    return (x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, Tensor))


def _written(schema: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[i] if i < len(args) else kwargs.get(argument.name))


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
