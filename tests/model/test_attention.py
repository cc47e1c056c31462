"""Attention backends agree, and an unavailable one reports the reason."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from llama_ds.config.document_marks import LLAMA_MARKS, DocumentMarks
from llama_ds.errors import UserError
from llama_ds.model import attention, cpu_products
from llama_ds.model.attention import CausalAttention, Documents, choose_backend
from llama_ds.model.attention_kernels import AttentionKernel, BlockedAttention, BlockedBackward, attention_kernel
from llama_ds.model.embedding import document_starts
from tests.cuda_backends import CUDA_BACKENDS


def inputs(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 40, heads, 16, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    ids = torch.where(torch.rand(2, 40, generator=generator) < 0.1, 1, 5)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), document_starts(ids, LLAMA_MARKS).to(device)


def output_and_gradients(backend: str, device: str, dtype: torch.dtype, masked: bool) -> list[torch.Tensor]:
    q, k, v, start = inputs(device, dtype)
    out = CausalAttention(backend)(q, k, v, start if masked else None)
    out.float().square().sum().backward()
    return [out.detach().cpu().float(), *(x.grad.cpu().float() for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_is_the_reference(masked: bool) -> None:
    """In float32 both round alike: outputs and gradients to 1e-5."""
    wanted = output_and_gradients("reference", "cpu", torch.float32, masked)
    for got, want in zip(output_and_gradients("sdpa", "cpu", torch.float32, masked), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def kernel_inputs(length: int, groups: int, masked: bool) -> tuple[list[torch.Tensor], torch.Tensor, Documents | None]:
    """Return q, k, v as views of one tensor, as the layer has them, the output's gradient and the documents."""
    generator = torch.Generator().manual_seed(length)
    qkv = torch.randn(2, length, 6 + 2 * groups, 8, generator=generator, dtype=torch.float64)
    grad = torch.randn(2, length, 6, 8, generator=generator, dtype=torch.float64)
    ids = torch.where(torch.rand(2, length, generator=generator) < 0.05, 1, 5)
    return (
        list(qkv.split([6, groups, groups], 2)),
        grad,
        Documents(document_starts(ids, LLAMA_MARKS)) if masked else None,
    )


def run_kernel(
    kernel: AttentionKernel, qkv: list[torch.Tensor], grad: torch.Tensor, documents: Documents | None
) -> tuple[torch.Tensor, ...]:
    q, k, v = qkv
    out, statistics = kernel.forward(q, k, v, documents)
    return (out, *kernel.backward(grad, q, k, v, out, statistics, documents))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 63, 64, 200, 512, 513])
def test_manual_backward_kernels_are_the_reference_on_rows_of_any_length(
    length: int, groups: int, masked: bool
) -> None:
    """Rows shorter than a block, of several full blocks, and with a partial last block; float64 to 1e-11."""
    qkv, grad, documents = kernel_inputs(length, groups, masked)
    wanted = run_kernel(attention_kernel("reference"), qkv, grad, documents)
    for kernel in (attention_kernel("sdpa"), BlockedAttention(), BlockedBackward()):
        for got, want in zip(run_kernel(kernel, qkv, grad, documents), wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", [BlockedAttention, BlockedBackward])
def test_blocks_of_bfloat16_sum_in_float32(
    kernel: Callable[[], AttentionKernel], masked: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each result has its own rounding error (at most 2^-9), and those of `out` and, with AMX, of the probabilities."""
    monkeypatch.setattr(cpu_products, "rounds_natively", lambda: amx)
    qkv, grad, documents = kernel_inputs(200, 2, masked)
    narrow, narrow_grad = [x.bfloat16() for x in qkv], grad.bfloat16()
    exactly = [x.double() for x in narrow]
    wanted = run_kernel(attention_kernel("reference"), exactly, narrow_grad.double(), documents)
    before = torch.get_float32_matmul_precision()
    for got, want in zip(run_kernel(kernel(), narrow, narrow_grad, documents), wanted, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() <= 2**-8 * want.norm()
    assert torch.get_float32_matmul_precision() == before


def test_large_scores_are_as_exact_as_small_ones() -> None:
    """Queries times the scale of the scores would be rounded to bfloat16 again: gradients would be off by 2^-5."""
    (q, k, v), grad, _ = kernel_inputs(200, 2, False)
    narrow, narrow_grad = [(12 * q).bfloat16(), k.bfloat16(), v.bfloat16()], grad.bfloat16()
    exactly = [x.double() for x in narrow]
    wanted = run_kernel(attention_kernel("reference"), exactly, narrow_grad.double(), None)
    for got, want in zip(run_kernel(attention_kernel("sdpa"), narrow, narrow_grad, None), wanted, strict=True):
        assert (got.double() - want).norm() <= 2**-6 * want.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_cuda_backends_are_the_reference(backend: str, masked: bool) -> None:
    """bf16 keeps 8 bits: outputs of size 1 to 2e-2."""
    wanted = output_and_gradients("reference", "cpu", torch.float32, masked)
    for got, want in zip(output_and_gradients(backend, "cuda", torch.bfloat16, masked), wanted, strict=True):
        assert (got - want).norm() <= 2e-2 * want.norm()


def test_documents_start_at_each_bos_of_the_tokenizer() -> None:
    ids = torch.tensor([[7, 7, 1, 7, 1, 1, 7]])
    assert document_starts(ids, DocumentMarks(1, 2)).tolist() == [[0, 0, 2, 2, 4, 5, 5]]
    assert document_starts(ids + 128000, DocumentMarks(128001, 128002)).tolist() == [[0, 0, 2, 2, 4, 5, 5]]


@pytest.mark.parametrize("bos", [None, 2])
def test_without_a_bos_of_its_own_a_document_starts_after_each_eos(bos: int | None) -> None:
    ids = torch.tensor([[7, 7, 2, 7, 2, 2, 7], [2, 7, 7, 7, 7, 7, 2]])
    assert document_starts(ids, DocumentMarks(bos, 2)).tolist() == [[0, 0, 0, 3, 3, 5, 6], [0, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cpu", torch.bfloat16, 64, "it runs on CUDA, this device is cpu"),
        ("cuda", torch.float32, 64, "it computes in bf16 or fp16, this run in float32"),
        ("cuda", torch.bfloat16, 512, "head_dim 512 is not a multiple of 8 up to 256"),
        ("cuda", torch.bfloat16, 100, "head_dim 100 is not a multiple of 8 up to 256"),
    ],
)
def test_flash_attn_says_why_it_cannot_run(device: str, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    with pytest.raises(UserError) as error:
        choose_backend("flash_attn", device, dtype, head_dim)
    assert str(error.value) == f"compute.attention_backend = flash_attn: {reason}; use auto or sdpa"
    assert choose_backend("auto", device, dtype, head_dim) == "sdpa"


@pytest.mark.parametrize(("capability", "chosen"), [((8, 0), "sdpa"), ((9, 0), "flash_attn"), ((10, 0), "flash_attn")])
def test_version_4_alone_is_not_given_a_gpu_that_it_has_no_backward_for(
    capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its forward runs on an A100, so the first step would fail in the backward."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(attention, "flash_module", lambda: SimpleNamespace(__name__="flash_attn.cute"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_backend("auto", "cuda", torch.bfloat16, 128) == chosen
    if chosen == "sdpa":
        with pytest.raises(UserError, match=r"version 4 has no backward for compute capability 8\.0"):
            choose_backend("flash_attn", "cuda", torch.bfloat16, 128)


def test_a_package_that_cannot_be_imported_leaves_torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One built for another torch would otherwise stop every run that does not name a backend."""

    def load(name: str) -> None:
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose_backend("auto", "cuda", torch.bfloat16, 128) == "sdpa"
    with pytest.raises(UserError, match=r"neither flash_attn nor flash_attn\.cute can be imported \(reinst"):
        choose_backend("flash_attn", "cuda", torch.bfloat16, 128)


@pytest.mark.parametrize(
    ("capability", "sizes"), [((9, 0), {64, 128, 192, 248, 256}), ((10, 0), {64, 128, 256}), ((12, 0), {64, 128, 192})]
)
def test_version_4_gets_the_heads_that_its_kernels_take(
    capability: tuple[int, int], sizes: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own check would stop a run on Blackwell in the first layer."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(attention, "flash_module", lambda: SimpleNamespace(__name__="flash_attn.cute"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    chosen = {size: choose_backend("auto", "cuda", torch.bfloat16, size) for size in (*sizes, 136)}
    assert {size for size in sizes if chosen[size] == "flash_attn"} == sizes
    assert chosen[136] == ("sdpa" if capability == (10, 0) else "flash_attn")
