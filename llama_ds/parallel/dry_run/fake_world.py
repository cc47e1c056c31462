"""Runs a process as one rank of a large run, with a fake process group and tensors without data.

Collectives and messages on torch's `fake` group return at once and transfer nothing; a FakeTensor has a shape, a dtype
and a storage size, but no data. Reads of values are patched here: numbers are 1, comparisons false.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import deepspeed.runtime.bf16_optimizer
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.zero import utils as zero_utils
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from llama_ds.model import attention_kernels, fp8, fp8_delayed, loss, pointwise, weight_gradients
from llama_ds.parallel.dry_run.ledger import Ledger, within
from llama_ds.parallel.dry_run.memo import Memo
from llama_ds.parallel.lean_imports import leave_out_compiler
from llama_ds.parallel.world import RankInfo

leave_out_compiler()  # and import what the first engine would, before ranks are forked


@contextmanager
def fake_world(
    rank_info: RankInfo, backend: str, ledger: Ledger, on_new_group: Callable[[tuple[int, ...] | None], None]
) -> Iterator[None]:
    """Act as rank `rank_info.rank` of `rank_info.world` within this context; the program sees `backend` as its backend.

    `on_new_group` is called with the ranks of every new process group: all ranks must create them in the same order.

    The process must end afterwards, because DeepSpeed caches the groups of its first world.
    """
    os.environ.update(RANK=str(rank_info.rank), WORLD_SIZE=str(rank_info.world), LOCAL_RANK=str(rank_info.local_rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", DS_ACCELERATOR="cpu")
    dist.init_process_group("fake", rank=rank_info.rank, world_size=rank_info.world, store=FakeStore())
    with ExitStack() as stack:
        for target, name, value in [*_answers(backend, ledger), (dist, "new_group", _reporting_groups(on_new_group))]:
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        mode.cache_enabled = False  # few operations are repeated that the memo does not know, and an entry costs more
        stack.enter_context(mode)
        ledger.execute = Memo()
        stack.enter_context(ledger)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(ledger.saved, lambda tensor: tensor))
        yield


def asking(get: Callable[[list[int]], list[int]]) -> Callable[[list[int]], list[int]]:
    """Return a function that asks rank 0 for a list by `get`, and returns this rank's own."""

    def ask(own: list[int]) -> list[int]:
        get(own)
        return own

    return ask


def _reporting_groups(on_new_group: Callable[[tuple[int, ...] | None], None]) -> Callable[..., Any]:
    new_group = dist.new_group

    def report_and_create(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        on_new_group(None if ranks is None else tuple(ranks))
        return new_group(ranks, *args, **kwargs)

    return report_and_create


def _answers(backend: str, ledger: Ledger) -> Iterator[tuple[Any, str, Any]]:
    """Yield (object, name, replacement) for code that reads values or addresses, or depends on the device."""
    yield FakeTensor, "tolist", lambda self: [0] * self.numel()
    yield FakeTensor, "item", lambda self: 1.0 if self.is_floating_point() else 1
    yield FakeTensor, "__bool__", lambda self: False
    yield FakeTensor, "__float__", lambda self: 0.0
    yield FakeTensor, "__int__", lambda self: 0
    yield FakeTensor, "__format__", lambda self, spec: "0"
    if backend == "nccl":  # on CUDA the loss's gradient is multiplied in without comparing it with 1
        yield FakeTensor, "__ne__", lambda self, other: type(other) is int or torch.Tensor.__ne__(self, other)
    # Code compares addresses to detect aliasing, and those of fake storages are all 0.
    yield FakeTensor, "data_ptr", lambda self: self.untyped_storage()._cdata + self.storage_offset() * self.itemsize
    yield torch.UntypedStorage, "data_ptr", lambda self: self._cdata
    for module in (nn.Module, PipelineModule):  # torch cannot replace a fake parameter's data, and no move is needed
        yield module, "to", lambda self, *args, **kwargs: self
    # Comparisons with rank 0: the collective is issued, and the result is this rank's own value.
    yield zero_utils, "get_lst_from_rank0", asking(zero_utils.get_lst_from_rank0)
    yield zero_utils, "assert_lst_len_same_as_other_ranks", lambda lst: zero_utils.get_lst_from_rank0([len(lst)])
    yield deepspeed.runtime.bf16_optimizer, "is_invalid_grad_norm", lambda norm: False
    yield dist, "get_backend", lambda group=None: backend
    # Functions that are one kernel on CUDA and several operations with temporaries on a CPU.
    for module in (fp8, fp8_delayed, loss, pointwise):
        yield module, "compiled_for", lambda x, function: within(ledger.fused, function)
    yield attention_kernels, "blocks_pay", lambda q: False  # attention is one kernel, too
    yield weight_gradients, "add_product", within(ledger.fused, weight_gradients.add_product)
    yield loss, "add_product", within(ledger.fused, loss.add_product)
    # Head and loss compute their gradients in the forward; the memory plan counts them as working memory.
    yield loss.NextTokenLoss, "forward", within(ledger.passing, loss.NextTokenLoss.forward)
    yield loss, "_blocks", lambda logits: (slice(0, len(logits)),)
