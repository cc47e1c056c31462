"""Tensors located in files: headers are parsed without loading tensors, and ranges of elements are read on demand.

No pickled code is ever executed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import threading
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from llama_ds.errors import UserError

CHUNK_ELEMENTS = 4 << 20  # chunk size of a read that converts the dtype: 16 MiB of fp32
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

REFUSED_OBJECT = re.compile(r"\b(?:GLOBAL|global|class) ([\w.]+\.\w+)")  # in torch.load's messages

_ALLOWING = threading.Lock()  # what torch.load allows is a setting of the whole process


@dataclass(frozen=True)
class Stored:
    """A contiguous tensor in a file."""

    path: str
    offset: int  # bytes from the start of the file
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self, out: Tensor, start: int = 0) -> None:
        """Fill `out`, contiguous and on the CPU, with the elements from `start` on in row-major order.

        Raises:
            UserError: the file is truncated or cannot be read.
        """
        out = out.view(-1)
        if out.dtype == self.dtype:
            self._read_bytes(out, start)
            return
        buffer = torch.empty(min(len(out), CHUNK_ELEMENTS), dtype=self.dtype)
        for begin in range(0, len(out), CHUNK_ELEMENTS):
            part = out[begin : begin + CHUNK_ELEMENTS]
            self._read_bytes(buffer[: len(part)], start + begin)
            part.copy_(buffer[: len(part)])

    def _read_bytes(self, out: Tensor, start: int) -> None:
        if not len(out):
            return
        left = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
        position = self.offset + start * self.dtype.itemsize
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                while left:
                    count = os.preadv(file, [left], position)
                    if not count:
                        raise UserError(f"{self.path}: ends at byte {position}, the file is truncated; copy it again")
                    left, position = left[count:], position + count
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); copy it again") from None


@dataclass(frozen=True)
class Loaded(Stored):
    """A tensor that torch has read, because its elements are not contiguous in the file, or have no known position."""

    tensor: Tensor  # contiguous

    def _read_bytes(self, out: Tensor, start: int) -> None:
        out.copy_(self.tensor.view(-1)[start : start + len(out)])


class StandIn:
    """Takes the place of an object of a class that is not loaded. It ignores all that a pickle does with it."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def torch_tensors(path: str) -> dict[str, Stored]:
    """Return the tensors of a state dict written by torch.save, by name.

    Files of torch before version 1.6 and tensors that are not contiguous are read into memory.

    Raises:
        UserError: the file is damaged, or it holds objects that are not allowed; none of them is executed.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # the import takes seconds

    if not _is_zip(path):
        return {name: _loaded(path, tensor) for name, tensor in _state_dict(path, nullcontext()).items()}
    located = {name: _located(path, tensor) for name, tensor in _state_dict(path, FakeTensorMode()).items()}
    scattered = [name for name, stored in located.items() if stored is None]
    mapped = _state_dict(path, nullcontext(), mmap=True) if scattered else {}
    return {name: stored or _loaded(path, mapped[name]) for name, stored in located.items()}


def _is_zip(path: str) -> bool:
    """Return whether a file has the format of torch.save since version 1.6."""
    try:
        with open(path, "rb") as file:
            return file.read(4) in (b"PK\x03\x04", b"")  # an empty file is reported like a damaged one
    except OSError:
        return True


def torch_content(path: str, inert: bool = False) -> Any:
    """Return what torch.save wrote, with tensors that have no data but know where it is (`located`).

    Args:
        inert: objects are allowed: `argparse.Namespace` with its attributes, any other class as a `StandIn`. False:
            only tensors and plain data are.

    Raises:
        UserError: the file is damaged, or it holds objects that are not allowed; none of them is executed.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # the import takes seconds

    return _load(path, FakeTensorMode(), inert=inert)


def located(path: str, content: object) -> dict[str, Stored]:
    """Return where the tensors of a state dict are stored. `content` is a part of what `torch_content` returns.

    Raises:
        UserError: it is no state dict, or a tensor is not contiguous in the file.
    """
    found = {name: _located(path, tensor) for name, tensor in _checked(path, content).items()}
    if scattered := [name for name, stored in found.items() if stored is None]:
        raise UserError(f"{path}: tensor {scattered[0]} is not stored contiguously; save a contiguous copy of it")
    return {name: stored for name, stored in found.items() if stored}


def flat(state: object, prefix: str = "") -> dict[str, object]:
    """Return the values of nested dicts by their keys joined with dots; None and empty dicts are left out."""
    if not isinstance(state, dict):
        return {} if state is None else {prefix: state}
    found: dict[str, object] = {}
    for key, value in state.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def embedded_tensor(path: str, offset: int, length: int) -> Stored:
    """Return a tensor that torch.save has written into `length` bytes of a file, from byte `offset` on.

    Raises:
        UserError: the bytes are damaged or hold something else; nothing in them is executed.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # the import takes seconds

    with open(path, "rb") as file:
        window = Window(file, offset, min(length, max(0, os.path.getsize(path) - offset)))
        tensor = _load(path, FakeTensorMode(), file=cast(IO[bytes], window))
    stored = _located(path, tensor) if isinstance(tensor, Tensor) else None
    if stored is None:
        raise UserError(f"{path}: holds no contiguous tensor at byte {offset}; save the checkpoint again")
    return replace(stored, offset=stored.offset + offset)


def embedded_content(path: str, offset: int, length: int) -> Any:
    """Return `torch_content` of `length` bytes of a file, from byte `offset` on, with objects as inert ones.

    Raises:
        UserError: the bytes are damaged.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # the import takes seconds

    with open(path, "rb") as file:
        window = Window(file, offset, min(length, max(0, os.path.getsize(path) - offset)))
        return _load(path, FakeTensorMode(), inert=True, file=cast(IO[bytes], window))


class Window(io.RawIOBase):
    """Some bytes of an open file, as a file of their own."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def seekable(self) -> bool:
        """Return True: any position can be read."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position within the window, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, and return it."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with bytes from the position on, and return their number."""
        left = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:left])  # type: ignore[attr-defined]
        self._position += count
        return int(count)


def _state_dict(path: str, mode: AbstractContextManager[object], mmap: bool = False) -> dict[str, Tensor]:
    return _checked(path, _load(path, mode, mmap))


def _load(
    path: str,
    mode: AbstractContextManager[object],
    mmap: bool = False,
    inert: bool = False,
    file: IO[bytes] | None = None,
) -> Any:
    try:
        with mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of other pickle protocols
            if inert:
                return _inert_content(file or path)
            return torch.load(file or path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can raise any exception
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> UserError:
    """Return what to say of an error of torch.load, whose own text advises to execute what the file holds."""
    text = str(error)
    if object_name := REFUSED_OBJECT.search(text):
        return UserError(
            f"{path}: holds {object_name[1]}, which is neither a tensor nor plain data, and nothing in a file is "
            "executed; save the tensors alone, as a state dict"
        )
    reason = text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0] or type(error).__name__
    reason = reason.partition(". This is an internal")[0]  # five sentences on corruption follow
    return UserError(f"{path}: cannot be read as a file of torch tensors ({reason}); copy it again")


def _inert_content(file: str | IO[bytes]) -> Any:
    with _ALLOWING:
        with safe_globals([argparse.Namespace]):
            unknown = get_unsafe_globals_in_checkpoint(file)
        if not isinstance(file, str):
            file.seek(0)
        with safe_globals([argparse.Namespace, *((StandIn, name) for name in unknown)]):
            return torch.load(file, map_location="cpu", weights_only=True)


def _checked(path: str, content: object) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path}: holds no state dict (tensors by name); give a state dict written by torch.save")
    return {str(name): tensor for name, tensor in content.items()}


def _located(path: str, tensor: Tensor) -> Stored | None:
    """Return the position of a tensor in the file; None if its elements are not contiguous there."""
    begin: Any = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if begin is None or not tensor.is_contiguous():
        return None
    return Stored(path, begin + tensor.storage_offset() * tensor.element_size(), tensor.dtype, tuple(tensor.shape))


def _loaded(path: str, tensor: Tensor) -> Loaded:
    return Loaded(path, 0, tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous())


def safetensors_tensors(path: str) -> dict[str, Stored]:
    """Return the tensors of a safetensors file by name.

    Format: 8 bytes with the little-endian length of the JSON header, the header, then the tensor data.

    Raises:
        UserError: the file is no valid safetensors file, or a tensor has an unsupported dtype.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {name: _safetensor(path, 8 + length, size, name, entry) for name, entry in header.items()}
        _check_cover(found, 8 + length, size)
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as a safetensors file ({error}); copy it again") from None
    return found


def _check_cover(found: dict[str, Stored], begin: int, size: int) -> None:
    """Check that tensors cover the data of a safetensors file once, as its format demands."""
    for name, stored in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != begin:
            raise ValueError(f"tensor {name} begins at byte {stored.offset}, the one before it ends at byte {begin}")
        begin += stored.nbytes
    if begin != size:
        raise ValueError(f"its tensors end at byte {begin} of {size}")


def _safetensor(path: str, base: int, size: int, name: str, entry: dict[str, Any]) -> Stored:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise UserError(
            f"{path}: tensor {name} has dtype {entry['dtype']}, not one of {', '.join(SAFETENSORS_DTYPES)}; "
            "quantised models cannot be trained: give the original weights"
        )
    stored = Stored(path, base + begin, SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]))
    if base + end > size:
        raise UserError(f"{path}: tensor {name} ends at byte {base + end} of {size}, the file is truncated; copy again")
    if stored.nbytes != end - begin:
        raise ValueError(f"tensor {name}: {end - begin} bytes for shape {list(stored.shape)}")
    return stored
