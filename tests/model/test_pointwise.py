"""The pointwise parts of the layer are one graph for torch.compile each; rotation has its inverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_ds.model import pointwise

NAMES = ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotated_heads", "rotated_back")
TABLES = tuple(torch.rand(6, 1, 8) for _ in range(2))  # as wide as a head


def call(name: str, dtype: torch.dtype, rows: int = 300) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a function that is compiled on CUDA, and its inputs."""
    torch.manual_seed(0)
    x, grad, residual = (torch.randn(rows, 24).to(dtype) for _ in range(3))
    gate_up, weight = torch.randn(rows, 48).to(dtype), torch.randn(24).to(dtype)
    heads = torch.randn(2, 6, 3, 8).to(dtype)
    return {
        "rms_norm": (pointwise._rms_norm, (x, weight, 1e-5)),
        "rms_norm_backward": (pointwise._rms_norm_backward, (grad, x, weight, 1e-5, residual)),
        "swiglu": (pointwise.plain_swiglu, (gate_up,)),
        "swiglu_backward": (swiglu_backward, (grad, gate_up, torch.empty_like(grad), torch.empty_like(grad))),
        "rotated_heads": (pointwise._rotated_heads, (heads, 2, *TABLES)),
        "rotated_back": (pointwise._rotated_back, (heads, heads[:, :, :1], heads[:, :, :1], *TABLES)),
    }[name]


def swiglu_backward(*inputs: Tensor) -> tuple[Tensor, ...]:
    product = pointwise._swiglu_backward(*inputs, recompute=True)
    assert product is not None
    return product, *inputs[2:]


def tensors(result: object) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_the_compiler(name: str, dtype: torch.dtype) -> None:
    """What torch.compile gets on CUDA has no graph break; traced, it computes the same but for the last rounding."""
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    function, inputs = call(name, dtype)
    copies = [t.clone() if isinstance(t, Tensor) else t for t in inputs]  # some write into their inputs
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, want in zip(tensors(compiled(*copies)), tensors(function(*inputs)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rotation_back_undoes_rotation(dtype: torch.dtype) -> None:
    angles = torch.rand(6, 1, 4)
    tables = (angles.cos().repeat(1, 1, 2), torch.cat([-angles.sin(), angles.sin()], -1))
    x = torch.randn(2, 6, 4, 8).to(dtype)  # 2 query heads, 1 key, 1 value
    turned = pointwise.rotate_heads(x.clone(), 3, tables)
    assert (turned - x)[:, :, :3].abs().amax((0, 3)).min() > 0.1 and torch.equal(turned[:, :, 3], x[:, :, 3])
    torch.testing.assert_close(pointwise._rotated_heads(x, 3, *tables), turned, atol=1e-6, rtol=0)
    back = pointwise.rotate_heads_back(turned.split([2, 1, 1], 2), tables)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # bf16 rounds twice to 8 bits
    torch.testing.assert_close(back, x, atol=tolerance, rtol=tolerance)
