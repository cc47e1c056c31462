"""Attention over rows that context-parallel ranks share: threads as ranks, in float64 against one rank.

What each rank computes goes through the same code as on real ranks; only the messages pass through queues here.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from queue import Queue
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_ds.benchmarks.layer import saved_bytes
from llama_ds.config.context_parallel import ALL_TO_ALL, HIERARCHICAL, RING, CpSizes
from llama_ds.config.schema import ModelConfig
from llama_ds.layout import document_blocks
from llama_ds.layout.activation_memory import LayerWork
from llama_ds.layout.document_blocks import RingStep, pieces_of
from llama_ds.layout.row_cuts import own_ranges, ring_block
from llama_ds.model import ring_blocks
from llama_ds.model.attention import Documents
from llama_ds.model.attention_kernels import AttentionKernel, Statistics, _Reference, attention_kernel
from llama_ds.model.attention_torch_flash import TorchFlash
from llama_ds.model.context_parallel import ContextParallel, rows_of_its_own, whole_rows
from llama_ds.model.decoder import LayerContext
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.model.ring_attention import RingAttention
from llama_ds.model.rope import RotaryTables
from llama_ds.model.shared_rows import attention_over, kernel_over
from llama_ds.model.tensor_parallel import Pending, SingleRank
from tests.cuda_backends import CUDA_BACKENDS

WAIT_S = 60


class Mailboxes:
    """What the threads of a group exchange."""

    def __init__(self, size: int) -> None:
        self.queues: list[Queue[Tensor]] = [Queue() for _ in range(size)]
        self.shared: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=WAIT_S)


class ThreadRank:
    """A context-parallel rank in a thread; it notes its events."""

    def __init__(self, rank: int, size: int, method: str, mail: Mailboxes, striped: bool = False) -> None:
        group = {RING: 1, ALL_TO_ALL: size, HIERARCHICAL: 2}[method]
        self.rank, self.size, self.sizes, self.mail = rank, size, CpSizes(size // group, group, striped), mail
        self.events: list[str] = []

    def start_pass(self, x: Tensor) -> Pending:
        self.events.append("pass")
        self.mail.queues[self.rank].put(x)

        def wait() -> Tensor:
            self.events.append("wait")
            return self.mail.queues[self.rank - self.sizes.all_to_all].get(timeout=WAIT_S)

        return wait

    def all_gather(self, x: Tensor) -> Tensor:
        self.mail.shared[self.rank] = x
        self.mail.barrier.wait()
        every = torch.stack(self.mail.shared)
        self.mail.barrier.wait()
        return every

    def all_to_all(self, x: Tensor) -> Tensor:
        group, member = divmod(self.rank, self.sizes.all_to_all)
        return self.all_gather(x)[group * len(x) : (group + 1) * len(x), member]


def own_tokens(x: Tensor, cp: ContextParallel) -> Tensor:
    """Return this rank's tokens of whole rows: (B, T, ...) -> (B, S, ...)."""
    if cp.size == 1:
        return x
    parts = own_ranges(x.shape[1], cp.rank, cp.sizes)
    return torch.cat([x[:, part.start : part.stop : part.step] for part in parts], 1)


def on_ranks(
    size: int, method: str, run: Callable[[ThreadRank], tuple[Tensor, ...]], striped: bool = False
) -> list[tuple[Tensor, ...]]:
    """Return what `run` returns on every rank of a group, each in its thread."""
    mail = Mailboxes(size)
    ranks = [ThreadRank(rank, size, method, mail, striped and method != ALL_TO_ALL) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, ranks, timeout=WAIT_S))


def inputs(heads: int, groups: int, tokens: int, documents: float, seed: int = 0) -> tuple[list[Tensor], Tensor | None]:
    """Return q, k, v, the output's gradient, and document starts where a token begins one with this probability."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, groups, groups, heads)
    tensors = [torch.randn(2, tokens, n, 8, generator=generator, dtype=torch.float64) for n in sizes]
    begins = torch.rand(2, tokens, generator=generator) < documents
    starts = torch.where(begins, torch.arange(tokens), 0).cummax(1).values.int()
    return tensors, starts if documents else None


def run_kernel(kernel: AttentionKernel, tensors: list[Tensor], starts: Tensor | None) -> tuple[Tensor, ...]:
    documents = _documents(starts)
    q, k, v, grad = tensors
    out, statistics = kernel.forward(q, k, v, documents)
    return (out, *kernel.backward(grad, q, k, v, out, statistics, documents))


def _documents(starts: Tensor | None) -> Documents | None:
    return None if starts is None else Documents(starts)


class PackedReference(_Reference):
    """The reference as a kernel for packed documents, whose logsumexp is (H, N)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Statistics]:
        out, (lse,) = super().forward(q, k, v, documents)
        return out, (lse[0],)


_PACKED = {"sdpa": None, "reference": PackedReference()}


@pytest.mark.parametrize("documents", [0.0, 0.1, 0.7], ids=["one document", "long documents", "short documents"])
@pytest.mark.parametrize(
    ("size", "method", "backend", "heads", "groups"),
    [(2, RING, "sdpa", 8, 2), (4, RING, "reference", 4, 1), (3, RING, "sdpa", 6, 3), (2, ALL_TO_ALL, "sdpa", 8, 2),
     (4, ALL_TO_ALL, "sdpa", 8, 2), (3, ALL_TO_ALL, "sdpa", 6, 2), (4, HIERARCHICAL, "sdpa", 4, 1),
     (6, HIERARCHICAL, "reference", 8, 4)],
)  # fmt: skip
def test_outputs_and_gradients_are_those_of_one_rank(
    size: int,
    method: str,
    backend: str,
    heads: int,
    groups: int,
    documents: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With key-value heads fewer than ranks, and documents that cross cuts, longer and shorter than tiles.

    The reference computes packed documents as CUDA's kernels do, in one call for a step. float64: 1e-12.
    """
    monkeypatch.setattr(document_blocks, "TILE", 3)
    monkeypatch.setattr(ring_blocks, "packed_kernel", lambda name, like: _PACKED[name])
    tensors, starts = inputs(heads, groups, 8 * 2 * size, documents)
    wanted = run_kernel(attention_kernel("reference"), tensors, starts)

    def run(cp: ThreadRank) -> tuple[Tensor, ...]:
        own = [own_tokens(x, cp) for x in tensors]
        return tuple(whole_rows_of(x, cp) for x in run_kernel(kernel_over(cp, backend), own, starts))

    for rank, found in enumerate(on_ranks(size, method, run, striped=starts is not None)):
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12, msg=f"rank {rank}")


def whole_rows_of(x: Tensor, cp: ThreadRank) -> Tensor:
    """Gather whole rows of (B, S, H, K)."""
    flat = x.permute(0, 2, 3, 1)
    return whole_rows(flat.flatten(0, 2), cp).view(*flat.shape[:3], -1).permute(0, 3, 1, 2)


class _OnRanks(torch.autograd.Function):
    """Attention over whole rows, whose forward and backward are those of a ring's ranks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, size: int) -> Tensor:
        @torch.no_grad()  # grad mode belongs to a thread
        def run(cp: ThreadRank) -> tuple[Tensor, ...]:
            own = [own_tokens(x, cp) for x in (q, k, v)]
            out, statistics = kernel_over(cp, "reference").forward(*own, _documents(starts))
            ctx.saved[cp.rank] = own, out, statistics
            return (whole_rows_of(out, cp),)

        ctx.saved, ctx.starts, ctx.size = {}, starts, size
        return on_ranks(size, RING, run, starts is not None)[0][0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        @torch.no_grad()
        def run(cp: ThreadRank) -> tuple[Tensor, ...]:
            own, out, statistics = ctx.saved[cp.rank]
            grads = kernel_over(cp, "reference").backward(
                own_tokens(grad, cp), *own, out, statistics, _documents(ctx.starts)
            )
            return tuple(whole_rows_of(x, cp) for x in grads)

        return *on_ranks(ctx.size, RING, run, ctx.starts is not None)[0], None, None


@pytest.mark.parametrize("documents", [0.0, 0.3])
def test_gradients_of_a_ring_are_those_of_finite_differences(documents: float) -> None:
    """float64, torch's gradcheck in a random direction of all elements of queries, keys and values."""
    (*tensors, _), starts = inputs(2, 1, 12, documents)
    leaves = [x[:, :, :, :4].clone().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda q, k, v: _OnRanks.apply(q, k, v, starts, 3), leaves, fast_mode=True)


@pytest.mark.parametrize("method", [RING, ALL_TO_ALL, HIERARCHICAL])
def test_autograd_gives_the_same_gradients(method: str) -> None:
    tensors, _ = inputs(4, 2, 16, 0.0)
    _, *wanted = run_kernel(attention_kernel("reference"), tensors, None)

    def run(cp: ThreadRank) -> tuple[Tensor, ...]:
        q, k, v, grad = (own_tokens(x, cp) for x in tensors)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        attention_over(cp, "sdpa")(*leaves).backward(grad)
        return tuple(x.grad for x in leaves if x.grad is not None)

    for rank, found in enumerate(on_ranks(4, method, run)):
        for got, want in zip(found, wanted, strict=True):
            own = own_tokens(want, ThreadRank(rank, 4, method, Mailboxes(1)))
            torch.testing.assert_close(got, own, atol=1e-12, rtol=1e-12)


def test_every_message_of_a_ring_travels_while_a_block_is_computed() -> None:
    """Forward: keys and values of the next block are under way during each block but the last.

    Backward: so are the gradients of the block before, from the second block on; their last hop has nothing to hide.
    """
    tensors, _ = inputs(4, 2, 32, 0.0)

    def run(cp: ThreadRank) -> tuple[Tensor, ...]:
        kernel = RingAttention(cp, "sdpa")
        blocks = kernel.blocks.at
        kernel.blocks.at = lambda *args: (cp.events.append("compute"), blocks(*args))[1]  # type: ignore
        q, k, v, grad = (own_tokens(x, cp) for x in tensors)
        out, statistics = kernel.forward(q, k, v, None)
        forward = cp.events.copy()
        cp.events.clear()
        kernel.backward(grad, q, k, v, out, statistics, None)
        assert forward == ["pass", "compute", "wait"] * 3 + ["compute"]
        step = ["pass", "compute", "wait", "pass", "wait"]  # keys leave, gradients arrive, gradients leave, keys arrive
        assert cp.events == ["pass", "compute", "pass", "wait", *step * 2, "compute", "wait", "pass", "wait"]
        return ()

    on_ranks(4, RING, run)


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[int, int, list[list[int]]]:
    """Draw ranks of a ring, tokens of a rank, and where the documents of two rows begin: none, some or all tokens."""
    size, length = draw(st.integers(2, 4)), draw(st.integers(1, 24))
    tokens = size * length
    begins = st.sets(st.integers(1, tokens - 1), max_size=tokens).map(lambda found: [0, *sorted(found)])
    return size, length, draw(st.one_of(st.lists(begins, min_size=2, max_size=2), begins.map(lambda one: [one] * 2)))


@settings(deadline=None, max_examples=60)
@given(packed_rows(), st.sampled_from([1, 3, 1000]))
def test_documents_leave_every_visible_pair_in_one_block_and_no_empty_block(
    drawn: tuple[int, int, list[list[int]]], tile: int
) -> None:
    """Blocks without a mask have only visible pairs, so nothing hidden is computed but in tiles of short documents."""
    size, length, begins = drawn
    tokens = size * length
    held = [list(range(rank, tokens, size)) for rank in range(size)]
    assert held == [[*own_ranges(tokens, rank, CpSizes(size, 1, True))[0]] for rank in range(size)]
    pairs: Counter[tuple[int, int, int]] = Counter()
    with patch.object(document_blocks, "TILE", tile):
        for rank, source in product(range(size), range(size)):
            for piece in pieces_of(RingStep(rank, source, size, length), begins):
                queries, keys = held[rank][piece.queries], held[source][piece.keys]
                assert piece.causal and len(queries) == len(keys) and (len(keys) <= tile or not piece.masked)
                for row in range(2)[piece.rows]:
                    seen = {(row, q, k) for i, q in enumerate(queries) for k in keys[: i + 1]}
                    if piece.masked:
                        seen = {(r, q, k) for r, q, k in seen if not any(k < at <= q for at in begins[row])}
                    assert seen
                    pairs.update(seen)
    visible = {
        (row, q, k) for row in range(2) for q in range(tokens)
        for k in range(max(at for at in begins[row] if at <= q), q + 1)
    }  # fmt: skip
    assert pairs == Counter(visible)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(1, 4))
def test_blocks_of_a_ring_cover_every_pair_once_with_equal_work(size: int, length: int) -> None:
    tokens = 2 * size * length
    held = [[at for part in own_ranges(tokens, rank, CpSizes(size)) for at in part] for rank in range(size)]
    assert sorted(at for own in held for at in own) == list(range(tokens))
    pairs: Counter[tuple[int, int]] = Counter()
    work = []
    for rank, own in enumerate(held):
        counted = pairs.total()
        for step in range(size):
            block = ring_block(len(own), rank, size, step)
            queries, keys = own[block.queries], held[block.source][block.keys]
            pairs.update((q, k) for q in queries for k in keys if not block.causal or k <= q)
        work.append(pairs.total() - counted)
    assert pairs == Counter((q, k) for q in range(tokens) for k in range(q + 1))
    assert len(set(work)) == 1, "ranks would wait for the slowest"


@pytest.mark.parametrize("tokens", [7, 10])
def test_rows_that_cannot_be_cut_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match="not a multiple of 4"):
        own_ranges(tokens, 0, CpSizes(2))


class Operators(TorchDispatchMode):
    """Counts the calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


class Alone(ThreadRank):
    """A rank of a group without the others: what it receives is what it sent."""

    def start_pass(self, x: Tensor) -> Pending:
        return lambda: x

    def all_to_all(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "begins", [None, [[0, 1, 7, 40], [0]], [list(range(64))] * 2], ids=["one document", "documents", "single tokens"]
)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_blocks_fit_the_signatures_of_torchs_cuda_kernels(
    rank: int, begins: list[list[int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: shapes, dtypes and order of arguments, on tensors without data.

    Documents are one call for a step, forward and backward, or none where no query sees a key.
    """
    monkeypatch.setattr(ring_blocks, "block_kernel", lambda backend, like, causal: TorchFlash(causal))
    monkeypatch.setattr(ring_blocks, "packed_kernel", lambda backend, like: TorchFlash())
    ring = RingAttention(Alone(rank, 4, RING, Mailboxes(1), striped=begins is not None), "sdpa")
    q, k = (torch.empty(2, 16, heads, 64, device="meta", dtype=torch.bfloat16) for heads in (8, 2))
    documents = None if begins is None else Documents(torch.empty(2, 64, device="meta", dtype=torch.int32))
    if documents:
        vars(documents)["begins"] = begins
    with Operators() as seen:
        out, statistics = ring.forward(q, k, k, documents)
        grads = ring.backward(torch.empty_like(q), q, k, k, out, statistics, documents)
    assert [(x.shape, x.dtype) for x in (out, *grads)] == [(x.shape, x.dtype) for x in (q, q, k, k)]
    assert (statistics[0].shape, statistics[0].dtype) == ((2, 16, 8), torch.float32)
    calls = 1 if begins and len(begins[0]) == 64 else 4
    assert seen.counts["_flash_attention_forward"] == seen.counts["_flash_attention_backward"] == calls


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [0.0, 0.02])
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_cuda_blocks_merge_to_the_attention_of_whole_rows(backend: str, documents: float) -> None:
    """In bf16, against float64: errors of a few roundings, 2^-8 each."""
    tensors, starts = inputs(8, 2, 512, documents)
    wanted = run_kernel(attention_kernel("reference"), tensors, starts)
    halves = [x.to("cuda", torch.bfloat16) for x in tensors]
    on_device = None if starts is None else starts.to("cuda")

    def run(cp: ThreadRank) -> tuple[Tensor, ...]:
        own = [own_tokens(x, cp) for x in halves]
        return tuple(whole_rows_of(x, cp) for x in run_kernel(kernel_over(cp, backend), own, on_device))

    for got, want in zip(on_ranks(4, RING, run, starts is not None)[0], wanted, strict=True):
        assert (got.cpu().double() - want).norm() < 2e-2 * want.norm()


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("method", [RING, ALL_TO_ALL, HIERARCHICAL])
def test_kept_bytes_are_the_cost_tables_and_fall_with_the_number_of_ranks(method: str, policy: str) -> None:
    model = ModelConfig(128, 64, 96, 1, 8, 4, 8)
    kept = []
    for size in (1, 2, 4):
        cp = Alone(0, size, method if size > 2 or method == RING else ALL_TO_ALL, Mailboxes(1))
        attention, tables = attention_over(cp, "sdpa"), RotaryTables(model, 64, cp)
        layer = ManualBackwardLayer(LayerContext(model, 7, SingleRank(), attention, tables, cp), 0, policy)
        x = torch.randn(2, 64 // size, 64, requires_grad=True)
        constant = [*layer.parameters(), *tables.on(x.device, x.shape[1])]
        kept.append(saved_bytes(lambda layer=layer, x=x: layer(x), constant))
        assert kept[-1] == LayerWork(model, 64, 2, element_bytes=4, cp=size).saved_bytes(policy)
    assert all(more == 2 * less for more, less in pairwise(kept))


def test_a_rank_with_rows_of_its_own_has_their_tables_and_tokens() -> None:
    """Text generated along training has positions from 0 on; the next step has those of its part of a row again."""
    model, cpu = ModelConfig(16, 32, 64, 1, 4, 4, 8), torch.device("cpu")
    cp = ThreadRank(1, 2, RING, Mailboxes(2))
    tables, ids = RotaryTables(model, 32, cp), torch.arange(32)[None]
    shared = [*tables.on(cpu, 16), own_tokens(ids, cp)]
    with rows_of_its_own(cp):
        whole = [*tables.on(cpu, 16), own_tokens(ids, cp)]
    expected = [*RotaryTables(model, 32).on(cpu, 16), ids]
    assert all(torch.equal(one, other) for one, other in zip(whole, expected, strict=True))
    assert not torch.equal(shared[0], whole[0])
    again = [*tables.on(cpu, 16), own_tokens(ids, cp)]
    assert all(torch.equal(one, other) for one, other in zip(again, shared, strict=True))
