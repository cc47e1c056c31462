"""Records a rank's allocations and communication from torch's dispatcher, which sees every tensor operation.

It counts the same for fake and for real tensors. A storage counts once, however many views it has, from the operation
that allocates it until its last tensor is released.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, WORKING = "weights", "gradients", "optimizer", "activations", "working"
MATRICES = "matrices"  # what Muon's step allocates
OTHER = "other"  # everything else held before the step: tables, buffers of ids


class Call(NamedTuple):
    """A collective, send or receive, in the order in which the rank issued it."""

    kind: str
    group: tuple[int, ...]  # global ranks
    name: str  # group name: two groups may have the same ranks
    peer: int  # global rank of a message's peer or a collective's root; -1: none
    bytes: int  # full buffer: output of all-gather, input of reduce-scatter and all-to-all


UNEVEN = "all_to_all_v"  # an all-to-all of which each rank states its own sizes

# For each operation: kind, and the positions of the counted buffer, the process group and the peer in its arguments.
_OPERATIONS = {
    "allreduce_": ("all_reduce", 0, 1, None),
    "allreduce_coalesced_": ("all_reduce", 0, 1, None),
    "_allgather_base_": ("all_gather", 0, 2, None),
    "allgather_": ("all_gather", 0, 2, None),
    "allgather_coalesced_": ("all_gather", 0, 2, None),
    "allgather_into_tensor_coalesced_": ("all_gather", 0, 2, None),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 2, None),
    "reduce_scatter_": ("reduce_scatter", 1, 2, None),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, 2, None),
    "alltoall_base_": ("all_to_all", 1, 2, None),
    "alltoall_": ("all_to_all", 1, 2, None),
    "broadcast_": ("broadcast", 0, 1, 2),
    "reduce_": ("reduce", 0, 1, 3),
    "gather_": ("gather", 1, 2, 3),
    "scatter_": ("scatter", 0, 2, 3),
    "barrier": ("barrier", None, 1, None),
    "monitored_barrier_": ("barrier", None, 1, None),
    "send": ("send", 0, 1, 2),
    "recv_": ("receive", 0, 1, 2),
}
_SPLIT_SIZES = 4  # position of an all-to-all's sizes to send


class Ledger(TorchDispatchMode):
    """Records while its context is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.now: Counter[str] = Counter()  # bytes held, by category
        self.peak: dict[str, int] = {}
        self.peak_bytes = 0
        self.total = 0
        self.high = 0  # the most in total since it was set
        self.most_matrices = 0  # the most bytes of MATRICES at a time
        self._held: dict[int, tuple[int, str, weakref.ref[Any]]] = {}  # bytes, category and storage, by address
        self._groups: dict[str, tuple[int, ...]] = {}
        self._new = WORKING  # category of what is allocated
        self._fused = False
        self._passing = False
        self.execute = _execute  # runs an operation; returns its result and the possibly new tensors

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and checking it for every operation is slow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, tensors = self.execute(func, args, kwargs or {})
        if func.namespace == "c10d":
            self._communicate(func, args)
        else:
            for tensor in tensors:
                self._hold(tensor)
        return out

    def restart(self) -> None:
        """Reset calls and peak; held memory stays counted."""
        self.calls = []
        self.peak, self.peak_bytes, self.most_matrices = dict(self.now), self.total, 0

    def mark(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count the storages of `tensors` under `category` until they are released."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._held:
                self._take(storage)
            self._move(storage._cdata, category)

    def mark_rest(self, category: str) -> None:
        """Count all current working memory under `category` from now on."""
        for key in [key for key, held in self._held.items() if held[1] == WORKING]:
            self._move(key, category)

    def saved(self, tensor: Tensor) -> Tensor:
        """Count a tensor saved by autograd as an activation unless it has another category; a saved-tensor hook."""
        storage = tensor.untyped_storage()
        if not self._passing and storage._cdata in self._held and self._held[storage._cdata][1] == WORKING:
            self._move(storage._cdata, ACTIVATIONS)
        return tensor.detach()  # detached: an output of its own node would keep itself alive

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Ignore temporaries released within this context: on a GPU it is one kernel."""
        outer, self._fused = self._fused, True
        try:
            yield
        finally:
            self._fused = outer
            self._look()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Keep what autograd saves within this context as working memory: its backward follows at once."""
        self._passing = True
        try:
            yield
        finally:
            self._passing = False

    @contextmanager
    def matrices(self) -> Iterator[None]:
        """Count what is allocated within this context as MATRICES."""
        outer, self._new = self._new, MATRICES
        try:
            yield
        finally:
            self._new = outer

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._take(storage)

    def _take(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._held[key] = size, self._new, weakref.ref(storage, lambda _: self._release(key))
        self.now[self._new] += size
        self.total += size
        self.most_matrices = max(self.most_matrices, self.now[MATRICES])
        self._look()

    def _look(self) -> None:
        if self._fused:
            return
        self.high = max(self.high, self.total)
        if self.total > self.peak_bytes:
            self.peak_bytes, self.peak = self.total, dict(self.now)

    def _release(self, key: int) -> None:
        size, category, _ = self._held.pop(key)
        self.now[category] -= size
        self.total -= size

    def _move(self, key: int, category: str) -> None:
        size, old, reference = self._held[key]
        self.now[old] -= size
        self.now[category] += size
        self._held[key] = size, category, reference

    def _communicate(self, func: Any, args: Any) -> None:
        name = func._schema.name.partition("::")[2]
        if name not in _OPERATIONS:
            raise NotImplementedError(f"the ledger has no entry for the collective {name}; add it to _OPERATIONS")
        kind, counted, group_at, peer_at = _OPERATIONS[name]
        if name == "alltoall_base_" and args[_SPLIT_SIZES]:
            kind = UNEVEN
        group = dist.ProcessGroup.unbox(args[group_at])
        ranks = self._ranks(group)
        peer = -1 if peer_at is None else ranks[args[peer_at]]
        size = 0 if counted is None else sum(tensor.nbytes for tensor in tensors_in(args[counted]))
        self.calls.append(Call(kind, ranks, group.group_name, peer, size))

    def _ranks(self, group: Any) -> tuple[int, ...]:
        if group.group_name not in self._groups:
            self._groups[group.group_name] = tuple(dist.get_process_group_ranks(group))
        return self._groups[group.group_name]


def _execute(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    out = func(*args, **kwargs)
    items = out if isinstance(out, (tuple, list)) else (out,)
    return out, [item for item in items if isinstance(item, Tensor)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value of nested lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def within(context: Callable[[], AbstractContextManager[None]], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` wrapped in `context`, as a ledger's `fused`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return run
