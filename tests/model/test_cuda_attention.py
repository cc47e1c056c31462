"""Attention on CUDA, as far as a machine without a GPU shows it: operator schemas, shapes, and packages' signatures.

torch's operators run on fake tensors whose device is CUDA. flash_attn's functions are replaced by ones that bind their
arguments to the signatures of the real packages (`flash_attn_signatures.py`).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_ds.config.context_parallel import RING
from llama_ds.model import attention
from llama_ds.model.attention import CausalAttention, Documents, reference
from llama_ds.model.attention_kernels import attention_kernel, block_kernel
from llama_ds.model.attention_torch_flash import packed_attention
from llama_ds.model.ring_attention import RingAttention
from tests.model import flash_attn_signatures
from tests.model.test_context_parallel import Alone, Mailboxes

ROWS, LENGTH, HEADS, GROUPS, SIZE = 2, 96, 6, 2, 16
STARTS = torch.tensor([[0] * 40 + [40] * 56, [0] * 95 + [95]])
OFFSETS = [0, 40, 96, 191, 192]


class Operators(TorchDispatchMode):
    """Notes the operators called and the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.names.add(func._schema.name.removeprefix("aten::"))
        self.shapes |= {tuple(x.shape) for x in tree_leaves(results) if isinstance(x, Tensor)}
        return results


def layer_inputs(device: str, dtype: torch.dtype, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v as views of one tensor, as the layer has them, and the output's gradient."""
    qkv = torch.empty(ROWS, LENGTH, HEADS + 2 * GROUPS, size, device=device, dtype=dtype)
    q, k, v = qkv.split([HEADS, GROUPS, GROUPS], 2)
    return q, k, v, torch.empty(ROWS, LENGTH, HEADS, size, device=device, dtype=dtype)


def documents_on(device: str) -> Documents:
    """Return documents with what their data would give: a build without CUDA cannot compute it there."""
    found = Documents(torch.empty(STARTS.shape, device=device, dtype=torch.long))
    vars(found)["cumulative_lengths"] = torch.empty(len(OFFSETS), device=device, dtype=torch.int32)
    bias = torch.empty(ROWS, 1, LENGTH, LENGTH, device=device)
    found._biases.update({dtype: bias.to(dtype) for dtype in (torch.float32, torch.bfloat16)})
    return found


@pytest.fixture
def fake_cuda() -> Iterator[None]:
    with FakeTensorMode():
        yield


FLASH = {"_flash_attention_forward", "_flash_attention_backward"}
EFFICIENT = {f"_scaled_dot_product_efficient_attention{suffix}" for suffix in ("", "_backward")}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "size", "operators"),
    [
        (torch.bfloat16, SIZE, FLASH),
        (torch.float16, SIZE, FLASH),
        (torch.float32, SIZE, EFFICIENT),
        (torch.bfloat16, 320, EFFICIENT),  # flash kernels end at 256
    ],
)
@pytest.mark.usefixtures("fake_cuda")
def test_torchs_kernels_on_cuda(dtype: torch.dtype, size: int, operators: set[str], packed: bool) -> None:
    """The gradients have the shapes of q, k and v. Flash never has a T x T tensor, nor keys of all query heads."""
    kernel, documents = attention_kernel("sdpa"), documents_on("cuda") if packed else None
    q, k, v, grad = layer_inputs("cuda", dtype, size)
    with Operators() as seen:
        out, statistics = kernel.forward(q, k, v, documents)
        grads = kernel.backward(grad, q, k, v, out, statistics, documents)
    assert [(x.shape, x.dtype, x.device) for x in (out, *grads)] == [(x.shape, dtype, q.device) for x in (q, q, k, v)]
    assert seen.names & (FLASH | EFFICIENT) == operators
    if operators == FLASH:
        assert statistics[0].shape == ((HEADS, ROWS * LENGTH) if packed else (ROWS, HEADS, LENGTH))
        assert not any(shape[-2:] == (LENGTH, LENGTH) for shape in seen.shapes)
        assert "repeat_interleave" not in seen.names


@pytest.mark.usefixtures("fake_cuda")
def test_a_block_of_a_ring_on_cuda() -> None:
    """Only flash attention has a logsumexp that blocks can be merged by; queries and keys differ in number."""
    q, k, v, grad = layer_inputs("cuda", torch.bfloat16)
    kernel, queries = block_kernel("sdpa", q, causal=False), q.narrow(1, 0, 48)
    assert kernel is not None
    out, statistics = kernel.forward(queries, k, v, None)
    assert statistics[0].shape == (ROWS, HEADS, 48)
    grads = kernel.backward(grad.narrow(1, 0, 48), queries, k, v, out, statistics, None)
    assert [x.shape for x in grads] == [queries.shape, k.shape, v.shape]
    assert block_kernel("sdpa", q.float(), causal=False) is None


def by_documents(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Return the attention of sequences in one flat row, one after the other by its definition."""
    bounds = offsets.tolist()
    assert max(end - begin for begin, end in pairwise(bounds)) <= longest
    rows = (slice(begin, end) for begin, end in pairwise(bounds))
    return torch.cat([reference(q[None, row], k[None, row], v[None, row], None)[0] for row in rows])


def test_packed_rows_reach_torchs_operators_as_their_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """With operators that compute each sequence by its definition, the result is that of the mask; float64 to 1e-11."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, ...]:
        offsets, others, longest, longest_key, dropout, causal, debug = options
        assert offsets is others and offsets.dtype == torch.int32 and offsets.tolist() == OFFSETS
        assert (longest, longest_key, dropout, causal, debug) == (LENGTH, LENGTH, 0.0, True, False)
        return by_documents(q, k, v, offsets, longest), torch.tensor(1.0), torch.tensor(2), torch.tensor(3), q

    def backward(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
        q, k, v, out, lse, offsets, _, longest, _, dropout, causal, state, unused = given
        assert (lse, dropout, causal, state, unused) == (1.0, 0.0, True, 2, 3) and out.shape == q.shape
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            return torch.autograd.grad(by_documents(*leaves, offsets, longest), leaves, grad)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    torch.manual_seed(0)
    inputs = [torch.randn(x.shape, dtype=torch.float64) for x in layer_inputs("cpu", torch.float64)]
    *qkv, grad = (x.requires_grad_() for x in inputs)
    documents = Documents(STARTS)
    got = packed_attention(*qkv, documents)
    wanted = reference(*qkv, documents)
    torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-11)
    for x, y in zip(*(torch.autograd.grad(out, qkv, grad) for out in (got, wanted)), strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-11)


def test_a_mask_that_is_not_of_documents_stays_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in which texts branch have no offsets: flash attention over documents cannot compute them."""
    monkeypatch.setattr(attention, "torch_flash_takes", lambda like: True)
    torch.manual_seed(0)
    q, k, v = (torch.randn(x.shape) for x in layer_inputs("cpu", torch.float32)[:3])
    masked: Any = SimpleNamespace(mask=Documents(STARTS).mask)
    torch.testing.assert_close(attention.sdpa(q, k, v, masked), reference(q, k, v, masked), atol=1e-5, rtol=1e-5)


class Package:
    """The functions of one version of flash_attn, which accept what its signatures do and return empty tensors."""

    def __init__(self, version: str) -> None:
        self.__name__ = attention.FLASH_MODULES[version[0] == "4"]
        self.called: set[str] = set()
        for name, parameters in flash_attn_signatures.stored()[version].items():
            function = self._function(name, flash_attn_signatures.signature(parameters))
            setattr(self, name, function)
            setattr(self, f"_wrapped{name}", function)  # 2.x: the same function as an operator of torch

    def _function(self, name: str, signature: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            self.called.add(name)
            self.check(given, packed="cu_seqlens_q" in given)
            q, k, v = given["q"], given["k"], given["v"]
            if "dout" in given:
                assert given["dout"].shape == given["out"].shape == q.shape
                return [torch.empty_like(x) for x in (q, k, v)]
            out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
            lse = torch.empty(*q.shape[:-3], q.shape[-2], q.shape[-3], device=q.device)  # (B, H, T), packed (H, N)
            if name.startswith("flash_attn"):
                return (out, None) if self.__name__ == attention.FLASH_4 else out
            return out, lse, torch.empty(0), torch.empty(2)

        return call

    @staticmethod
    def check(given: dict[str, Any], packed: bool) -> None:
        assert given["causal"] is True and not given.get("return_softmax") and not given.get("dropout_p")
        lead = (ROWS * LENGTH,) if packed else (ROWS, LENGTH)
        assert given["q"].shape == (*lead, HEADS, SIZE) and given["k"].shape == given["v"].shape == (
            *lead,
            GROUPS,
            SIZE,
        )
        for name in {"dq", "dk", "dv"} & given.keys():
            assert given[name].shape == given[name[1:]].shape and given[name].is_contiguous()
        if packed:
            assert given["cu_seqlens_q"].shape == given["cu_seqlens_k"].shape == (len(OFFSETS),)
            assert given["max_seqlen_q"] == given["max_seqlen_k"] == LENGTH


@pytest.mark.parametrize("version", list(flash_attn_signatures.stored()))
def test_calls_fit_the_signatures_of_flash_attn(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every stored version, all functions that the model calls, on whole rows and on packed ones."""
    package, real = Package(version), importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name: package if name.startswith("flash_attn") else real(name)
    )
    monkeypatch.setattr(attention, "flash_module", lambda: package)
    monkeypatch.setattr("llama_ds.model.attention_kernels.flash_module", lambda: package)
    q, k, v, grad = layer_inputs("meta", torch.bfloat16)
    kernel, plain = attention_kernel("flash_attn"), CausalAttention("flash_attn")
    for documents in (None, documents_on("meta")):
        out, statistics = kernel.forward(q, k, v, documents)
        grads = kernel.backward(grad, q, k, v, out, statistics, documents)
        assert [x.shape for x in (out, *grads)] == [x.shape for x in (q, q, k, v)]
        assert plain._backend(q, k, v, documents).shape == q.shape
    assert package.called == flash_attn_signatures.stored()[version].keys()


class RingPackage(Package):
    """The same for the blocks of a ring: it notes how many tokens meet, and which blocks are causal."""

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self.blocks: list[tuple[int, int, bool]] = []

    def check(self, given: dict[str, Any], packed: bool) -> None:
        tokens = 0 if packed else 1
        queries, keys = (given[name].shape[tokens] for name in "qk")
        self.blocks.append((queries, keys, given["causal"]))
        assert given["k"].shape == given["v"].shape and given["q"].shape[-2:] == (HEADS, SIZE)
        if packed:
            offsets = given["cu_seqlens_q"].tolist()
            assert offsets == given["cu_seqlens_k"].tolist() and offsets[-1] == queries == keys
            longest = max(end - begin for begin, end in pairwise(offsets))
            assert given["max_seqlen_q"] == given["max_seqlen_k"] == longest
        if "dout" in given or "dq" in given:
            lse = next(given[name] for name in ("softmax_lse", "lse") if name in given)
            assert lse.is_contiguous() and lse.shape[-2:] == (HEADS, queries)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("version", list(flash_attn_signatures.stored()))
def test_blocks_of_a_ring_fit_the_signatures_of_flash_attn(
    version: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks: a causal block of its own, then halves without a mask. Stripes: one call for the documents of a step.

    The second of three ranks, forward and backward; of documents that begin at 0, 40 | 0, 95, two leave it a square
    in a step, and of keys of a later rank the square lacks the first query.
    """
    package, real = RingPackage(version), importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name: package if name.startswith("flash_attn") else real(name)
    )
    monkeypatch.setattr("llama_ds.model.attention_kernels.flash_module", lambda: package)
    ring = RingAttention(Alone(1, 3, RING, Mailboxes(1), striped=packed), "flash_attn")
    q, k, v, grad = (x[:, : LENGTH // 3] for x in layer_inputs("cpu", torch.bfloat16))
    documents = Documents(STARTS) if packed else None
    out, statistics = ring.forward(q, k, v, documents)
    grads = ring.backward(grad, q, k, v, out, statistics, documents)
    assert [(x.shape, x.dtype) for x in (out, *grads)] == [(x.shape, x.dtype) for x in (q, q, k, v)]
    if packed:
        wanted = [(64, 64, True), (63, 63, True), (61, 61, True)]
    else:
        wanted = [(32, 32, True), (32, 16, False), (16, 32, False)]
    assert package.blocks == wanted * 2


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        ((9, 0), attention.FLASH_MODULES, "flash_attn.cute"),
        ((10, 0), attention.FLASH_MODULES, "flash_attn.cute"),
        ((8, 0), attention.FLASH_MODULES, "flash_attn"),
        ((9, 0), ["flash_attn"], "flash_attn"),
    ],
)
def test_version_4_comes_first_from_hopper_on(
    capability: tuple[int, int], installed: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Any:
        if name not in installed:
            raise ImportError(name)
        return SimpleNamespace(__name__=name, flash_attn_func=None)

    monkeypatch.setattr(importlib, "import_module", load)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert attention.flash_module().__name__ == chosen
    said: list[str] = []
    monkeypatch.setattr(attention.logger, "info", lambda text, *values: said.append(text % values))
    assert attention.choose_backend("auto", "cuda", torch.bfloat16, 128) == "flash_attn"
    dotted = ".".join(map(str, capability))
    assert said == [f"attention backend: flash_attn ({chosen} on compute capability {dotted})"]
