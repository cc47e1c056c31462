"""Process groups on the device of `fake_cuda.py`, as NCCL's as far as order goes; nothing is communicated.

A collective runs on a stream of its group: it waits for what its caller has issued, and its caller waits for it in
`wait`. Of gloo, whose collectives keep that order too, differs what it cannot: messages of tensors on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from llama_ds.parallel import gathering
from llama_ds.parallel.backend import backend
from tests.fake_cuda import Event, FakeCuda


class _Work:
    """A collective in flight, which holds its tensors as NCCL's work does."""

    def __init__(self, cuda: FakeCuda, event: Event, tensors: list[Tensor]) -> None:
        self.cuda, self.event, self.tensors = cuda, event, tensors

    def wait(self, timeout: Any = None) -> bool:
        self.cuda.current.wait_event(self.event)
        self.tensors = []
        return True

    def get_future(self) -> Any:
        raise RuntimeError("a CUDA rank has no use for futures")


class _Group(dist.ProcessGroup):
    """One rank of a group of NCCL, or of gloo: collectives and messages on a stream of the group."""

    def __init__(self, cuda: FakeCuda, rank: int, size: int, name: str, backend: str) -> None:
        super().__init__(rank, size)
        self.cuda, self.stream, self.named, self.backend = cuda, cuda.stream(name), "", backend

    @property
    def group_name(self) -> str:
        return self.named

    def _set_group_name(self, name: str) -> None:
        self.named = name

    def getBackendName(self) -> str:
        return self.backend

    def _issue(self, name: str, read: Any, written: Any) -> _Work:
        read, written = (tree_leaves(x) for x in (read, written))
        self.stream.wait_stream(self.cuda.current)
        self.cuda.log.append(f"{name} on {self.stream.name}")
        with self.cuda.on(self.stream):
            self.cuda.launch(name, read, written)
        return _Work(self.cuda, self.stream.record_event(), [*read, *written])

    def allreduce(self, tensors: Any, options: Any = None) -> Any:
        return self._issue("all_reduce", [], tensors)

    def broadcast(self, tensors: Any, options: Any = None) -> Any:
        return self._issue("broadcast", [], tensors)

    def _allgather_base(self, output: Tensor, own: Tensor, options: Any = None) -> Any:
        assert output.numel() == self.size() * own.numel() and output.dtype == own.dtype
        return self._issue("all_gather", own, output)

    def _reduce_scatter_base(self, output: Tensor, whole: Tensor, options: Any = None) -> Any:
        assert whole.numel() == self.size() * output.numel() and output.dtype == whole.dtype
        return self._issue("reduce_scatter", whole, output)

    def alltoall_base(
        self, output: Tensor, given: Tensor, counts: Sequence[int] = (), sizes: Sequence[int] = (), options: Any = None
    ) -> Any:
        own = self.rank()
        if counts or sizes:
            assert (sum(counts), sum(sizes)) == (len(output), len(given)) and counts[own] == sizes[own]
        else:
            assert output.numel() == given.numel()
        assert output.dtype == given.dtype
        return self._issue("all_to_all", given, output)

    # The names of torch 2.13.
    all_gather_single, reduce_scatter_single = _allgather_base, _reduce_scatter_base
    all_to_all_single = alltoall_base

    def _check_message(self, tensors: Any) -> None:
        """Refuse what would be an address of the device, for gloo and for NCCL of the host."""
        assert all(tensor.is_cuda == (self.backend == "nccl") for tensor in tensors), f"a message by {self.backend}"

    def send(self, tensors: Any, rank: int, tag: int) -> Any:
        self._check_message(tensors)
        return self._issue("send", tensors, [])

    def recv(self, tensors: Any, rank: int, tag: int) -> Any:
        self._check_message(tensors)
        return self._issue("receive", [], tensors)

    def barrier(self, opts: Any = None) -> Any:
        return self._issue("barrier", [], [])


@contextmanager
def fake_ranks(cuda: FakeCuda, size: int, rank: int = 0) -> Iterator[None]:
    """Act as one rank of a job of `size`, with groups of the backend that the environment chooses."""
    chosen = backend()

    def create(options: Any, *unused: Any) -> _Group:
        return _Group(cuda, options.group_rank, options.group_size, f"group {len(cuda.streams)}", chosen)

    if not hasattr(dist.Backend, "ORDERED"):
        dist.Backend.register_backend("ordered", create, extended_api=True, devices=["cuda", "cpu"])
    dist.Backend._plugins["ORDERED"] = dist.Backend._plugins["ORDERED"]._replace(creator_fn=create)
    dist.init_process_group("ordered", rank=rank, world_size=size, store=dist.HashStore())
    try:
        with ExitStack() as stack:
            for name, value in (
                ("get_backend", lambda group=None: chosen),
                ("gather_object", lambda own, every=None, *_: _fill(every, own)),
            ):
                stack.enter_context(mock.patch.object(dist, name, value))
            stack.enter_context(
                mock.patch.object(gathering, "gather_bytes", lambda own, width, _: [own.ljust(width)] * size)
            )
            yield
    finally:
        dist.destroy_process_group()


def _fill(every: list[Any], own: Any) -> None:
    every[:] = [own] * len(every)
