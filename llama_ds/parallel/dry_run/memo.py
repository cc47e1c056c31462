"""Memoizes operations on fake tensors, for steps of a hundred thousand operations.

FakeTensorMode computes or looks up the outputs' shapes in every call, and its cache is slow. A step repeats the same
operations for each micro-batch, so the first result is replayed here: outputs of the same shapes, in new storages or in
those of the same arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout)
_DEVICE = torch.ops.prim.device.default


class _Output(NamedTuple):
    same: int  # index of the argument that is returned itself; -1: none
    alias: int  # index of the argument whose storage it views; -1: a new storage
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    attributes: dict[str, Any]  # Python attributes of the fake tensor


class _Entry(NamedTuple):
    container: type | None  # tuple or list; None: one tensor
    outputs: list[_Output]


class Memo:
    """Runs operations on fake tensors, all of one mode."""

    def __init__(self) -> None:
        self._entries: dict[Any, _Entry | None] = {}

    def __call__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        """Return the result of `func`, and those of its outputs that have a new storage."""
        if func is _DEVICE:
            return args[0].fake_device, []
        if func.namespace != "aten":
            out = func(*args, **kwargs)
            return out, _tensors_of(out)
        tensors: list[FakeTensor] = []
        try:
            key = (func, _key(args, tensors), _key(tuple(kwargs.items()), tensors) if kwargs else ())
        except TypeError:  # an argument cannot be part of a key
            out = func(*args, **kwargs)
            return out, _tensors_of(out)
        entry = self._entries.get(key)
        if entry is not None:
            return self._repeat(entry, tensors)
        out = func(*args, **kwargs)
        if key not in self._entries:
            after: list[FakeTensor] = []
            unchanged = (func, _key(args, after), _key(tuple(kwargs.items()), after) if kwargs else ()) == key
            self._entries[key] = _entry(out, tensors) if unchanged else None
        return out, _tensors_of(out)

    def _repeat(self, entry: _Entry, tensors: list[FakeTensor]) -> tuple[Any, list[Tensor]]:
        made: list[Tensor] = []
        fresh: list[Tensor] = []
        for output in entry.outputs:
            if output.same >= 0:
                made.append(tensors[output.same])
                continue
            with no_dispatch():
                if output.alias >= 0:
                    storage = tensors[output.alias].untyped_storage()
                    empty = torch.empty(0, dtype=output.dtype, device="meta")
                    empty.set_(storage, output.offset, output.size, output.stride)
                else:
                    empty = torch.empty_strided(output.size, output.stride, dtype=output.dtype, device="meta")
            tensor = _fake(empty, output)
            made.append(tensor)
            if output.alias < 0:
                fresh.append(tensor)
        return (made[0] if entry.container is None else entry.container(made)), fresh


def _fake(empty: Tensor, like: _Output) -> FakeTensor:
    """Return the meta tensor `empty` as a fake one, as FakeTensor's constructor does, with recorded attributes."""
    tensor = Tensor._make_subclass(FakeTensor, empty, False, dispatch_device=True, device_for_backend_keys=like.device)
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    tensor.__dict__.update(like.attributes)
    return tensor


def _key(values: Any, tensors: list[FakeTensor]) -> tuple[Any, ...]:
    """Return a key that determines the outputs' shapes; append the tensors among `values` to `tensors`.

    Raises:
        TypeError: a value has another type.
    """
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            tensors.append(value)
            found.append((value.shape, value.stride(), value.storage_offset(), value.dtype))
        elif kind is tuple or kind is list or kind is torch.Size:
            found.append(_key(value, tensors))
        elif kind is torch.Generator:  # decides on values only
            found.append(kind)
        elif kind in _PLAIN:
            found.append((kind, value))
        else:
            raise TypeError
    return tuple(found)


def _entry(out: Any, tensors: list[FakeTensor]) -> _Entry | None:
    """Return how to replay `out`; None if it contains anything but fake tensors."""
    container = type(out) if type(out) in (tuple, list) else None
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    outputs: list[_Output] = []
    for value in [out] if container is None else out:
        if type(value) is not FakeTensor:
            return None
        storage = value.untyped_storage()
        same = next((i for i, tensor in enumerate(tensors) if tensor is value), -1)
        alias = storages.index(storage._cdata) if storage._cdata in storages else -1
        size, stride, offset = value.shape, value.stride(), int(value.storage_offset())
        needed = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if value.numel() else 0
        if alias < 0 and (offset or storage.nbytes() != needed * value.itemsize):
            return None
        outputs.append(_Output(same, alias, size, stride, offset, value.dtype, value.fake_device, dict(value.__dict__)))
    return _Entry(container, outputs)


def _tensors_of(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [item for item in out if isinstance(item, Tensor)] if isinstance(out, (tuple, list)) else []
