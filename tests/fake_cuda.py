"""A CUDA device of shapes and order, on a machine without one.

Tensors on it are fake: shapes, dtypes, strides and devices follow from the schemas of the operators, and nothing is
computed. Streams and events are real in one respect, the order that they put operators into (vector clocks). An
operator that uses memory which another stream has written, or writes what another has used, without such an order
raises a `Race`, and so does memory released while another stream may still use it. Reads and copies for which the
host waits are noted with the functions that make them.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._subclasses.fake_tensor as fake_tensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_ds.model import init, pointwise
from tests.fake_autograd import backward

PACKAGE = Path(init.__file__).resolve().parents[1]
DEVICE = torch.device("cuda", 0)
NAME, CAPABILITY, MEMORY = "NVIDIA H100 80GB HBM3", (9, 0), 80 << 30
Clock = dict[str, int]  # number of operators by stream


class Race(AssertionError):
    """Two streams use the same memory in no certain order."""


class Stream:
    """A stream; `seen` counts the operators of each stream that its next operator runs after."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name, self.seen = cuda, name, Clock()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.cuda)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.cuda.log.append(f"{self.name} waits for {event.recorded}")
        _join(self.seen, event.seen)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    """An event of a stream; `timed` events alone tell times."""

    def __init__(self, cuda: FakeCuda, timed: bool = False) -> None:
        self.cuda, self.timed, self.recorded, self.seen = cuda, timed, "nothing", Clock()

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.cuda.current
        self.recorded, self.seen = f"{stream.name}:{stream.seen.get(stream.name, 0)}", dict(stream.seen)
        self.cuda.log.append(f"event {self.recorded}")

    def synchronize(self) -> None:
        """Let the host, and with it what it issues later on any stream, run after the event."""
        assert self.recorded != "nothing", "an event is waited for before it is recorded"
        self.cuda.log.append(f"host waits for {self.recorded}")
        for stream in self.cuda.streams:
            _join(stream.seen, self.seen)
        _join(self.cuda.host, self.seen)

    def query(self) -> bool:
        return self.recorded != "nothing"

    def elapsed_time(self, other: Event) -> float:
        assert self.timed and other.timed and self.query() and other.query()
        return 1.0


class Graph:
    """A CUDA graph: its operators use no memory when they are captured, but whenever they are replayed."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.operators: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert self.cuda.current.name != "main", "the default stream cannot be captured"
        assert capture_error_mode == "thread_local", "other threads may use CUDA meanwhile"
        assert pool is not None, "each graph would have temporaries of its own"
        self.cuda.capturing = self

    def capture_end(self) -> None:
        assert self.cuda.capturing is self
        self.cuda.capturing = None

    def replay(self) -> None:
        assert self.cuda.capturing is None
        self.cuda.log.append(f"graph of {len(self.operators)} operators")
        for operator in self.operators:
            self.cuda.launch(*operator)


class _Use:
    """The operators of each stream that have used memory since it was last written, and the last that wrote it."""

    def __init__(self) -> None:
        self.read, self.written = Clock(), Clock()


class _Storage:
    """Uses of a storage's parts, by first byte and end; parts that are used apart may overlap."""

    def __init__(self, owner: Stream) -> None:
        self.owner, self.kept_for = owner, set[str]()
        self.parts: dict[tuple[int, int], _Use] = {}

    def overlapping(self, begin: int, end: int) -> list[_Use]:
        return [use for (other, other_end), use in self.parts.items() if begin < other_end and other < end]


class FakeCuda(TorchDispatchMode):
    """The state of the device; as a mode it sees every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.devices = 1
        self.ended = False
        self.races: list[str] = []  # early releases: no operator can raise them
        self.operators: set[str] = set()
        self.waits: list[str] = []  # files and functions that let the host wait for what a stream has been given
        self.streams: list[Stream] = []
        self.host = Clock()
        self.current = self.stream("main")
        self.uses: dict[int, _Storage] = {}
        self.capturing: Graph | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and otherwise the first operator imports the compiler

    def stream(self, name: str) -> Stream:
        made = Stream(self, name)
        made.seen = dict(self.host)
        self.streams.append(made)
        return made

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Issue what follows on `stream`."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def synchronize(self, device: Any = None) -> None:
        for stream in list(self.streams):
            stream.synchronize()

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        self._storage(tensor).kept_for.add(stream.name)

    def read(self, tensor: Tensor, value: Any) -> Any:
        """Return what the host reads of a tensor, for which it waits as for all else that the current stream does."""
        if tensor.is_cuda and not self.ended:
            self.launch("a read", [tensor], [])
            self._wait()
        return value

    def _wait(self) -> None:
        """Let the host wait for the current stream, and note who does."""
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        frame: FrameType | None = sys._getframe(1)
        while frame and not frame.f_code.co_filename.startswith(str(PACKAGE)):
            frame = frame.f_back
        self.waits.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}" if frame else "outside")
        self.current.synchronize()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        self.operators.add(name)
        if name == "_pin_memory":  # a build without CUDA pins nothing
            return args[0].clone()
        if name == "nonzero":  # as many as there can be
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device=args[0].device)
        if name == "_to_copy":
            args[0].constant = None  # the mode would move the value that it remembers of a small tensor
        result = _addmm(*args, **kwargs) if func is torch.ops.aten.addmm.dtype_out else func(*args, **kwargs)
        if func.namespace == "aten":
            self.launch(name, *_reads_and_writes(func._schema, args, kwargs, result))
        if name in ("copy_", "_to_copy") and _waits(func._schema, args, kwargs, result):
            self._wait()
        return result

    def launch(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        """Run an operator on the current stream, after all that this stream has waited for."""
        if self.capturing:
            self.capturing.operators.append((name, read, written))
            return
        stream = self.current
        read, written = ([x for x in tensors if x.is_cuda] for tensors in (read, written))
        if not read and not written:
            return
        number = stream.seen[stream.name] = stream.seen.get(stream.name, 0) + 1
        for tensor in read:
            storage, part = self._storage(tensor), _part(tensor)
            for use in storage.overlapping(*part):
                self._check(name, tensor, use.written)
            storage.parts.setdefault(part, _Use()).read[stream.name] = number
        for tensor in written:
            storage, part = self._storage(tensor), _part(tensor)
            for use in storage.overlapping(*part):
                self._check(name, tensor, use.read)
                self._check(name, tensor, use.written)
            begin, end = part  # this operator is now the last user of all that it covers
            storage.parts = {p: use for p, use in storage.parts.items() if not (begin <= p[0] and p[1] <= end)}
            storage.parts[part] = _Use()
            storage.parts[part].written = {stream.name: number}

    def _check(self, name: str, tensor: Tensor, others: Clock) -> None:
        late = {other: number for other, number in others.items() if number > self.current.seen.get(other, 0)}
        if late:
            raise Race(f"{name} on {self.current.name} uses {tuple(tensor.shape)} without waiting for {late}")

    def _storage(self, tensor: Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.uses:
            self.uses[key] = _Storage(self.current)
            weakref.finalize(storage, self._release, key, tuple(tensor.shape))
        return self.uses[key]

    def _release(self, key: int, shape: tuple[int, ...]) -> None:
        """Give memory back to its stream, which may use it at once for something else."""
        storage = self.uses.pop(key)
        if self.ended:
            return
        for others in (clock for use in storage.parts.values() for clock in (use.read, use.written)):
            for name, number in others.items():
                if name not in storage.kept_for and number > storage.owner.seen.get(name, 0):
                    self.races.append(f"{shape} is released while {name} uses it")


def _part(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and the end of its last."""
    begin, size = tensor.storage_offset(), tensor.element_size()
    length = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin * size, (begin + (length if tensor.numel() else 0)) * size


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Give torch a CUDA device within this context; memory released too early is reported at its end."""
    cuda = FakeCuda()
    with _guard_of_devices(), ExitStack() as stack:
        # Before CUDA seems available: torch.tensor then asks the mode for a device, instead of the device itself.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(cuda)
        for name, value in _torch_cuda(cuda).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for target, name, value in (
            (fake_tensors, "init_gpu_context", lambda device: None),
            (torch, "compile", lambda function, **_: function),
            (torch.autograd, "backward", backward),
            (init, "normal_shard", _unset_shard),
            (Tensor, "record_stream", lambda tensor, stream: cuda.record_stream(tensor, stream)),
            (nn.Module, "to", _move),
            # Addresses tell tensors apart, and those of fake ones are all 0.
            (FakeTensor, "data_ptr", lambda x: x.untyped_storage()._cdata + x.storage_offset() * x.itemsize),
            (FakeTensor, "tolist", lambda self: cuda.read(self, [0] * self.numel())),
            (FakeTensor, "item", lambda self: cuda.read(self, 1.0 if self.is_floating_point() else 1)),
            (FakeTensor, "__bool__", lambda self: cuda.read(self, False)),
            (FakeTensor, "__float__", lambda self: cuda.read(self, 1.0)),
            (FakeTensor, "__int__", lambda self: cuda.read(self, 1)),
        ):
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        stack.enter_context(mock.patch.dict("os.environ", DS_ACCELERATOR="cuda"))
        stack.callback(pointwise._compiled.cache_clear)
        pointwise._compiled.cache_clear()
        yield cuda
        cuda.ended = True  # what is released from now on has no successor
    assert not cuda.races, cuda.races


@contextmanager
def _guard_of_devices() -> Iterator[None]:
    """Register the guard that does nothing for CUDA too: a build without CUDA has none, and many operators ask it."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")  # CPU, CUDA
    before = guards[1]
    guards[1] = before or guards[0]
    try:
        yield
    finally:
        guards[1] = before


def _torch_cuda(cuda: FakeCuda) -> dict[str, Any]:
    properties = SimpleNamespace(name=NAME, total_memory=MEMORY, uuid="fake")
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: cuda.devices,
        "set_device": lambda device: cuda.log.append(f"device {device}"),
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": cuda.synchronize,
        "Stream": lambda device=None: cuda.stream(f"stream {len(cuda.streams)}"),
        "Event": lambda enable_timing=False: Event(cuda, enable_timing),
        "stream": cuda.on,
        "CUDAGraph": lambda: Graph(cuda),
        "graph_pool_handle": object,
        "current_stream": lambda device=None: cuda.current,
        "memory_allocated": lambda device=None: 1 << 20,
        "max_memory_allocated": lambda device=None: 3 << 20,
        "max_memory_reserved": lambda device=None: 4 << 20,
        "memory_reserved": lambda device=None: 4 << 20,
        "mem_get_info": lambda device=None: (MEMORY - (6 << 20), MEMORY),
        "reset_peak_memory_stats": lambda device=None: cuda.log.append("peak reset"),
        "empty_cache": lambda: cuda.log.append("cache emptied"),
        "get_rng_state": lambda: "a generator's state",
        "set_rng_state": lambda state: cuda.log.append("generator restored"),
    }


def _unset_shard(shape: tuple[int, int], dim: int, rank: int, size: int, *unused: Any) -> Tensor:
    """Return a shard of an initial matrix; drawing it takes 64 operators, whose results have no values here."""
    return torch.empty([length // size if n == dim else length for n, length in enumerate(shape)])


def _move(module: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
    """Do what Module.to does; replacing the data of a fake parameter leaves its device as it was."""
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                moved = parameter.detach().to(*arguments, **options)
                parameter.data, parameter.fake_device = moved, moved.fake_device
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else buffer.to(*arguments, **options)
    return module


def _addmm(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    """Check what the CUDA kernel checks: it has no fake implementation."""
    assert a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and out.shape == (a.shape[0], b.shape[1])
    assert a.dtype == b.dtype and total.dtype == out.dtype == dtype == torch.float32
    assert len({x.device for x in (total, a, b, out)}) == 1
    return out


def _reads_and_writes(schema: Any, args: Any, kwargs: Any, result: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that an operator reads and writes; a view does neither."""
    read, written = [], []
    values = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    for argument in schema.arguments:
        found = [x for x in tree_leaves(values.get(argument.name)) if isinstance(x, Tensor)]
        if argument.alias_info is None:
            read += found
        elif argument.alias_info.is_write:
            written += found
    for returned, value in zip(schema.returns, result if len(schema.returns) > 1 else (result,), strict=False):
        if returned.alias_info is None:
            written += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return read, written


def _waits(schema: Any, args: Any, kwargs: Any, result: Tensor) -> bool:
    """Return whether the host waits for a copy, as for one between host and device unless it is asynchronous."""
    values = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    devices = {x.device.type for x in (*tree_leaves(args), result) if isinstance(x, Tensor)}
    return len(devices) > 1 and not values.get("non_blocking")


def _join(clock: Clock, other: Clock) -> None:
    for name, number in other.items():
        clock[name] = max(clock.get(name, 0), number)
