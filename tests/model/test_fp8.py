"""Products in float8: the quantiser bit for bit, the layer against autograd through quantised products, agreement."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llama_ds.config.recompute import POLICIES
from llama_ds.errors import UserError
from llama_ds.job.memory_slots import HEADER_BYTES
from llama_ds.model import fp8
from llama_ds.model.decoder import DecoderLayer
from llama_ds.model.fp8 import FORWARD, GRADIENT, Fp8Products, QuantisedWeights, quantised, row_maxima
from llama_ds.model.fp8_delayed import HISTORY, DelayedProducts
from llama_ds.model.linear import ShardedLinear
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.model.products import Products
from llama_ds.model.rope import rotate
from llama_ds.model.tensor_parallel import SingleRank
from tests.model.test_manual_backward import ROWS, SHAPES, T, context_for, random, run

# Bits of the mantissa, and exponent of the smallest normal number (Micikevicius et al., arXiv 2209.05433, table 1).
FORMATS = {FORWARD: (3, -6), GRADIENT: (2, -14)}


@cache
def magnitudes(dtype: torch.dtype) -> np.ndarray:
    """Return the finite magnitudes of a format in ascending order, whose index is their bits."""
    mantissa, smallest = FORMATS[dtype]
    steps = 1 << mantissa
    subnormal = [i / steps * 2.0**smallest for i in range(steps)]
    normal = [(1 + i / steps) * 2.0**e for e in range(smallest, 16) for i in range(steps)]
    largest = 448.0 if dtype == FORWARD else 57344.0
    return np.array([m for m in subnormal + normal if m <= largest])


def nearest(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Round to the nearest number of a format, of two equally near ones to that with an even last bit."""
    known = magnitudes(dtype)
    above = np.minimum(np.searchsorted(known, np.abs(values)), len(known) - 1)
    below = np.maximum(above - 1, 0)
    to_above, to_below = known[above] - np.abs(values), np.abs(values) - known[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.copysign(known[np.where(up, above, below)], values)


def reference(x: Tensor, dtype: torch.dtype, maxima: Tensor | None = None) -> Tensor:
    """Return what the rows of x become in a format, as float64, by the definition of the scale."""
    wide = x.double().numpy()
    largest = np.abs(wide).max(1, keepdims=True) if maxima is None else maxima.double().numpy()
    scale = 2.0 ** np.floor(np.log2(magnitudes(dtype)[-1] / largest))
    return torch.from_numpy(nearest(wide * scale, dtype) / scale)


def wide_range(rows: int, columns: int, seed: int = 3) -> Tensor:
    """Return numbers of very different sizes: some are subnormal, or vanish, beside the largest of their row."""
    return random(rows, columns, seed=seed) * torch.exp2(random(rows, columns, seed=seed + 1) * 6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", FORMATS, ids=["e4m3", "e5m2"])
def test_the_quantiser_is_the_definition_bit_for_bit(dtype: torch.dtype, kind: torch.dtype) -> None:
    ties = torch.from_numpy((magnitudes(dtype)[1:] + magnitudes(dtype)[:-1]) / 2)[None]
    exact = torch.from_numpy(magnitudes(dtype)[None].copy())
    for x in (wide_range(64, 48), -ties, exact, exact * 2.0**-40, exact * 2.0**60):
        x = x.to(kind)
        values, scales = quantised(x, row_maxima(x), dtype)
        assert values.dtype == dtype and values.is_contiguous()
        assert torch.equal(values.double() * scales.double(), reference(x, dtype))


@pytest.mark.parametrize("dtype", FORMATS, ids=["e4m3", "e5m2"])
def test_rows_that_are_not_finite_become_nan_and_others_do_not(dtype: torch.dtype) -> None:
    """Otherwise e4m3 turns an infinity into 448, and a step that must be skipped is taken."""
    x = torch.ones(4, 8)
    x[0, 3], x[1, 5], x[2] = torch.inf, torch.nan, 0.0
    values, scales = quantised(x, row_maxima(x), dtype)
    found = values.float() * scales
    assert found[:2].isnan().all() and torch.equal(found[2:], x[2:])


def linear(weight: Tensor, cut: int) -> ShardedLinear:
    return ShardedLinear(nn.Parameter(weight), cut, SingleRank())


def by_rows() -> Fp8Products:
    return Fp8Products(SingleRank(), QuantisedWeights(False))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_products_are_those_of_the_quantised_factors(kind: torch.dtype) -> None:
    """To the rounding of sums in fp32: 64 terms of 2^-24 each; in bf16 the result's 2^-8 as well."""
    x, weight, grad = (t.to(kind) for t in (wide_range(20, 64), wide_range(48, 64, 5), wide_range(20, 48, 7)))
    products, layers = by_rows(), [linear(weight[:32], 0), linear(weight[32:], 0)]
    rounding = 64 * 2.0**-24 + (2.0**-8 if kind == torch.bfloat16 else 0)
    for found, left, right in (
        (products.outputs(x, layers), reference(x, FORWARD), reference(weight, FORWARD)),
        (products.input_gradients(grad, layers), reference(grad, GRADIENT), reference(weight.t(), FORWARD)),
    ):
        assert found.dtype == kind
        assert ((found.double() - left @ right.t()).abs() <= rounding * (left.abs() @ right.abs().t())).all()


class _Quantised(torch.autograd.Function):
    """x W^T of quantised factors; the backward quantises again along the contracted dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (reference(x, FORWARD) @ reference(weight, FORWARD).t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return (reference(grad, GRADIENT) @ reference(weight.t(), FORWARD).t()).to(x.dtype), grad.t() @ x


class Reference(DecoderLayer):
    """The layer by autograd through products of quantised factors; matrices with a common input are one product."""

    def forward(self, inputs: Any, document_start: Tensor | None = None) -> Any:
        x, attention, mlp = inputs, self.self_attn, self.mlp

        def product(x: Tensor, *layers: ShardedLinear) -> list[Tensor]:
            y = _Quantised.apply(x.flatten(0, -2), torch.cat([layer.weight for layer in layers])).unflatten(
                0, (ROWS, T)
            )
            parts = y.split([len(layer.weight) for layer in layers], -1)
            return [y if of.bias is None else y + of.bias for y, of in zip(parts, layers, strict=True)]

        tables = self.context.rotary.on(x.device, T)
        q, k, v = (
            y.unflatten(-1, (-1, attention.head_dim))
            for y in product(self.input_layernorm.plain(x), attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if attention.q_norm is not None and attention.k_norm is not None:
            q, k = attention.q_norm.plain(q), attention.k_norm.plain(k)
        out = self.context.attention(rotate(q, tables), rotate(k, tables), v, None).flatten(2)
        x = x + product(out, attention.o_proj)[0]
        gate, up = product(self.post_attention_layernorm.plain(x), mlp.gate_proj, mlp.up_proj)
        return x + product(nn.functional.silu(gate) * up, mlp.down_proj)[0]


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest relative difference, in the norm, of an output or gradient."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in wanted.items())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", ["grouped_query", "biases", "qkv_bias_and_norms"])
def test_the_layer_is_autograd_through_quantised_products(shape: str, policy: str) -> None:
    """Each product, and each gradient, has the factors that it should have, under every save policy.

    Both round to fp32 differently in between. An element within 1e-6 of a tie is then rounded apart, by 2^-4 of itself:
    one of some thousands, 1e-3 in the norm at most. A factor that is not quantised makes 2e-2 (e4m3) and more.
    """
    context = replace(context_for(SHAPES[shape]), products=by_rows())
    wanted, layer = Reference(context, 0), ManualBackwardLayer(context, 0, policy)
    plain = ManualBackwardLayer(context_for(SHAPES[shape]), 0, policy)
    for other in (layer, plain):
        other.load_state_dict(wanted.state_dict())
    x, grad = random(ROWS, T, 32).float(), random(ROWS, T, 32, seed=2).float()
    exact, found = run(wanted, x, grad, False), run(layer, x, grad, False)
    assert difference(found, exact) < 1e-3
    unquantised = run(plain, x, grad, False)
    assert all(difference({n: unquantised[n]}, {n: exact[n]}) > 2e-2 for n in ("y", "x", "mlp.down_proj.weight"))


class Half(SingleRank):
    """One of two ranks: the maximum over both is that of what the test gives it of the other."""

    size = 2

    def __init__(self, other: list[Tensor]) -> None:
        self.other = other

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.other.pop(0))


def test_ranks_that_share_the_contracted_dimension_quantise_what_one_rank_would() -> None:
    """Elements far below their row's largest vanish on the rank that does not have it, too."""
    x, weight, grad = wide_range(20, 64), wide_range(48, 64, 5), wide_range(20, 48, 7)
    asked: list[Tensor] = []
    with mock.patch.object(fp8, "quantised", lambda x, maxima, dtype: asked.append(x) or quantised(x, maxima, dtype)):
        for rows, columns, dtype, cut in ((x, weight, FORWARD, 1), (grad, weight.t(), GRADIENT, 0)):
            halves = list(zip(rows.float().chunk(2, 1), columns.float().chunk(2, 1), strict=True))
            own = [torch.cat([row_maxima(a.contiguous()), row_maxima(b.contiguous())]) for a, b in halves]
            parts = []
            for (a, b), other in zip(halves, reversed(own), strict=True):
                products = Fp8Products(Half([other]), QuantisedWeights(False))
                layer = linear(b if cut else b.t().contiguous(), cut)
                parts.append((products.outputs if cut else products.input_gradients)(a, [layer]))
            whole = reference(rows.float(), dtype) @ reference(columns.float(), FORWARD).t()
            size = reference(rows.float(), dtype).abs() @ reference(columns.float(), FORWARD).abs().t()
            assert ((sum(parts) - whole).abs() <= 64 * 2.0**-24 * size).all()
    assert len(asked) == 8


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_weights_are_quantised_once_in_a_step(scaling: str) -> None:
    """A validation between steps leaves nothing behind, and a step after the update has the new weights."""
    kept = QuantisedWeights(True)
    products = Fp8Products(SingleRank(), kept)
    if scaling == "delayed":
        products = DelayedProducts(SingleRank(), kept, 1, False, lambda x: x)  # type: ignore[assignment]
    layer = ShardedLinear(nn.Parameter(random(16, 32).float()), 0, SingleRank(), named=(0, "mlp.gate_proj"))
    x = random(8, 32, seed=2).float()
    for _ in range(2):  # the second step of delayed scaling is the first with its scales
        products.training = True
        first = products.outputs(x, [layer])
        with torch.no_grad():
            layer.weight.neg_()
        assert torch.equal(products.outputs(x, [layer]), first)
        products.end_step()
        products.training = False
        assert torch.equal(products.outputs(x, [layer]), -first)
        with torch.no_grad():
            layer.weight.neg_()
        assert torch.equal(products.outputs(x, [layer]), first)


def delayed(weight_gradients: bool = False, layers: int = 1) -> DelayedProducts:
    return DelayedProducts(SingleRank(), QuantisedWeights(False), layers, weight_gradients, lambda x: x)


def history_of(products: Products) -> list[np.ndarray]:
    """Return the tables (layers, 4, 3) of the state of delayed scaling."""
    return [np.frombuffer(base64.b64decode(table), np.int8).reshape(-1, 4, 3) for table in products.state()]


def scaled_to(x: Tensor, dtype: torch.dtype, largest: float) -> Tensor:
    """Return what x becomes in a format with the scale for `largest`, clamped."""
    wide, limit = x.double().numpy(), magnitudes(dtype)[-1]
    scale = 2.0 ** np.floor(np.log2(limit / largest))
    return torch.from_numpy(nearest(np.clip(wide * scale, -limit, limit), dtype) / scale)


def test_delayed_scaling_takes_the_largest_magnitudes_of_earlier_steps() -> None:
    """Larger elements are clamped, the largest of the last steps counts, and a validation notes nothing."""
    products, weight = delayed(weight_gradients=True), wide_range(48, 64, 5).float()
    layer = ShardedLinear(nn.Parameter(weight), 0, SingleRank(), named=(0, "self_attn.q_proj"))
    x, grad = wide_range(32, 64).float(), wide_range(32, 48, 7).float()
    products.training = True
    assert torch.equal(products.outputs(x, [layer]), by_rows().outputs(x, [layer])), "the first step has no history"
    assert products.weight_gradient(grad, x, [layer]) is None
    products.input_gradients(grad, [layer])
    products.end_step()
    products.training = False
    products.outputs(x * 1e6, [layer])
    products.training = True
    for factor in (4.0, 1.0):  # a step with larger ones, and one after it
        largest = x.abs().max().item() * (1 if factor == 4 else 4), grad.abs().max().item()
        left, right = scaled_to(x * factor, FORWARD, largest[0]), scaled_to(weight, FORWARD, weight.abs().max().item())
        of_grad = scaled_to(grad, GRADIENT, largest[1])
        for found, a, b in (
            (products.outputs(x * factor, [layer]), left, right.t()),
            (products.input_gradients(grad, [layer]), of_grad, right),
            (products.weight_gradient(grad, x * factor, [layer]), of_grad.t(), left),
        ):
            assert found is not None
            assert ((found.double() - a @ b).abs() <= 64 * 2.0**-24 * (a.abs() @ b.abs())).all()
        products.end_step()
    for _ in range(HISTORY):
        products.outputs(x, [layer])
        products.end_step()
    assert len(products.state()) == HISTORY
    largest = (x.abs().max().item(), weight.abs().max().item())
    assert history_of(products)[-1][0, 0, :2].tolist() == [int(np.ceil(np.log2(value / 1.75))) for value in largest]


def test_delayed_scaling_shows_what_is_not_finite_and_forgets_it() -> None:
    """The step of an infinite element is skipped, as without float8; the following steps have scales."""
    products, x = delayed(), random(16, 32).float()
    layer = ShardedLinear(nn.Parameter(random(16, 32, seed=2).float()), 0, SingleRank(), named=(0, "mlp.down_proj"))
    products.training = True
    products.outputs(x, [layer])
    products.end_step()
    broken = x.clone()
    broken[3, 5] = torch.inf
    y = products.outputs(broken, [layer])
    assert y[3].isnan().all() and y[:3].isfinite().all()
    products.end_step()
    assert history_of(products)[0][0, 3, 0] == fp8.SMALLEST and products.outputs(x, [layer]).isfinite().all()


def test_the_history_of_a_large_model_fits_into_the_header_of_a_memory_checkpoint() -> None:
    products = delayed(layers=126)
    products.load([base64.b64encode(bytes(126 * 4 * 3)).decode()] * HISTORY, torch.device("cpu"))
    assert len(json.dumps(products.state())) < HEADER_BYTES / 2


def test_a_resumed_layer_continues_with_the_scales() -> None:
    """The state passes through JSON, and a second layer of the model keeps its own."""
    context = replace(context_for(SHAPES["grouped_query"]), products=delayed(True, layers=2))
    layer, x, grad = ManualBackwardLayer(context, 1), random(ROWS, T, 32).float(), random(ROWS, T, 32, seed=2).float()
    for factor in (3.0, 0.5):
        run(layer, factor * x, grad, False)
        context.products.end_step()
        layer.zero_grad()
    state = json.loads(json.dumps(context.products.state()))
    noted = np.stack(history_of(context.products)) > fp8.SMALLEST
    assert not noted[:, 0].any() and noted[:, 1].all()
    wanted = run(layer, x, grad, False)
    other = replace(context, products=delayed(True, layers=2))
    other.products.load(state, torch.device("cpu"))
    resumed = ManualBackwardLayer(other, 1)
    resumed.load_state_dict(layer.state_dict())
    found = run(resumed, x, grad, False)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FORMATS, ids=["e4m3", "e5m2"])
def test_cuda_quantises_bit_for_bit_and_multiplies_as_the_cpu(dtype: torch.dtype) -> None:
    """Compiled kernels, too; sums of 64 terms in fp32 by another order, of the forward with 14 bits (fast)."""
    x, weight = wide_range(32, 64).bfloat16(), wide_range(48, 64, 5).bfloat16()
    device = torch.device("cuda")
    if torch.cuda.get_device_capability() < fp8.CAPABILITY:
        with pytest.raises(UserError, match=r"compute\.fp8"):
            fp8.check_capability(device, torch.bfloat16)
        return
    found, wanted = (quantised(t, row_maxima(t), dtype) for t in (x.cuda(), x))
    assert torch.equal(found[0].cpu().view(torch.uint8), wanted[0].view(torch.uint8))
    assert torch.equal(found[1].cpu(), wanted[1])
    left, right = reference(x, dtype), reference(weight, FORWARD)
    columns = quantised(weight.cuda(), row_maxima(weight.cuda()), FORWARD)
    y = fp8.multiply(found, columns, torch.bfloat16)
    rounding = 64 * (2.0**-13 if dtype == FORWARD else 2.0**-24) + 2.0**-8
    assert ((y.cpu().double() - left @ right.t()).abs() <= rounding * (left.abs() @ right.abs().t())).all()
