"""The layer with the hand-written backward matches autograd in float64 to 1e-10 under every save policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_ds.benchmarks.layer import saved_bytes
from llama_ds.config.recompute import POLICIES
from llama_ds.config.schema import ModelConfig, RopeScaling
from llama_ds.layout import loss_chunks
from llama_ds.layout.activation_memory import LayerWork
from llama_ds.layout.joint_products import multiplied_jointly
from llama_ds.layout.loss_chunks import chunk_tokens
from llama_ds.model import weight_gradients
from llama_ds.model.attention import CausalAttention
from llama_ds.model.decoder import DecoderLayer, LayerContext
from llama_ds.model.linear import ShardedLinear, adjacent
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.model.products import PlainProducts
from llama_ds.model.rope import RotaryTables
from llama_ds.model.tensor_parallel import SingleRank
from llama_ds.model.weight_gradients import WeightGradients
from tests.cuda_backends import CUDA_BACKENDS

ROWS, T = 2, 24
PLAIN = ModelConfig(64, 32, 84, 2, 4, 4, 8)
SHAPES = {
    "multi_head": PLAIN,
    "grouped_query": replace(PLAIN, num_key_value_heads=2),
    "multi_query_wide_head": replace(PLAIN, num_key_value_heads=1, head_dim=16),
    "biases": replace(PLAIN, num_key_value_heads=2, attention_bias="qkvo", mlp_bias=True),
    "qkv_bias_and_norms": replace(
        PLAIN,
        num_key_value_heads=2,
        attention_bias="qkv",
        qk_norm=True,
        rope_scaling=RopeScaling(4.0, None, None, 8, "yarn"),
    ),
}
STARTS = torch.tensor([0] * 7 + [7] * 10 + [17] * 7, dtype=torch.int32).expand(ROWS, T)


def context_for(model: ModelConfig, backend: str = "sdpa", seq_len: int = T, spread: float = 0.2) -> LayerContext:
    tables = RotaryTables(model, seq_len)
    return LayerContext(model, 7, SingleRank(), CausalAttention(backend), tables, initializer_range=spread)


def layers(shape: str, policy: str, backend: str = "sdpa") -> tuple[DecoderLayer, ManualBackwardLayer]:
    context = context_for(SHAPES[shape], backend)
    reference, layer = DecoderLayer(context, 0).double(), ManualBackwardLayer(context, 0, policy).double()
    with torch.no_grad():
        for weight in reference.parameters():  # norm weights of one would hide a factor
            weight.add_(torch.randn_like(weight) * 0.1)
    layer.load_state_dict(reference.state_dict())
    return reference, layer


def run(layer: nn.Module, x: Tensor, grad: Tensor, masked: bool) -> dict[str, Tensor]:
    """Return the output and all gradients of one forward and backward."""
    x = x.clone().requires_grad_()
    y = layer((x, STARTS.to(x.device)))[0] if masked else layer(x)
    y.backward(grad)
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters() if p.grad is not None}}


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(found) >= 11
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_autograds(shape: str, policy: str, backend: str, masked: bool) -> None:
    reference, layer = layers(shape, policy, backend)
    x, grad = random(ROWS, T, 32), random(ROWS, T, 32, seed=2)
    assert_same(run(layer, x, grad, masked), run(reference, x, grad, masked))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradcheck(policy: str, masked: bool) -> None:
    """Compare the gradients of the input and of every parameter with finite differences."""
    model = ModelConfig(16, 8, 12, 1, 4, 2, 4, attention_bias="qkvo", mlp_bias=True, qk_norm=True)
    layer = ManualBackwardLayer(context_for(model, spread=0.3), 0, policy).double()
    starts = torch.tensor([[0, 0, 2, 2, 2]], dtype=torch.int32)
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        inputs = (x, starts) if masked else x
        y = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (inputs,))
        return y[0] if masked else y

    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(function, (random(1, 5, 8).requires_grad_(), *parameters))


@pytest.mark.parametrize("policy", POLICIES)
def test_bf16_is_as_near_to_float64_as_autograd_in_bf16(policy: str) -> None:
    reference, layer = layers("grouped_query", policy)
    x, grad = random(ROWS, T, 32), random(ROWS, T, 32, seed=2)
    exact = run(reference, x, grad, False)
    for module in (reference, layer):
        module.zero_grad()
        module.bfloat16()
    x, grad = x.bfloat16(), grad.bfloat16()
    found, plain = run(layer, x, grad, False), run(reference, x, grad, False)
    for name, value in exact.items():
        error, plain_error = ((r[name].double() - value).norm() / value.norm() for r in (found, plain))
        assert error < max(1.5 * plain_error, 4e-3), name  # 2^-8: one rounding of the result


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_cuda_in_bf16_is_as_near_to_float64_as_autograd_there(policy: str, backend: str, masked: bool) -> None:
    reference, layer = layers("grouped_query", policy, backend)
    x, grad = random(ROWS, T, 32), random(ROWS, T, 32, seed=2)
    exact_layer = layers("grouped_query", policy, "reference")[0]
    exact_layer.load_state_dict(reference.state_dict())
    exact = run(exact_layer, x, grad, masked)
    found, plain = (
        run(module.to("cuda", torch.bfloat16), x.to("cuda", torch.bfloat16), grad.to("cuda", torch.bfloat16), masked)
        for module in (layer, reference)
    )
    for name, value in exact.items():
        error, plain_error = ((r[name].cpu().double() - value).norm() / value.norm() for r in (found, plain))
        assert error < max(1.5 * plain_error, 4e-3), name


def saved_by_hooks(layer: DecoderLayer, x: Tensor) -> int:
    """Return the bytes that a layer keeps for its backward, without parameters and constant tables."""
    return saved_bytes(lambda: layer(x), [*layer.parameters(), *layer.context.rotary.on(x.device)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_saved_bytes_are_the_cost_tables(shape: str, policy: str, dtype: torch.dtype) -> None:
    layer = ManualBackwardLayer(context_for(SHAPES[shape]), 0, policy).to(dtype)
    x = torch.randn(ROWS, T, 32, dtype=dtype, requires_grad=True)
    assert saved_by_hooks(layer, x) == LayerWork(SHAPES[shape], T, ROWS, element_bytes=dtype.itemsize).saved_bytes(
        policy
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_deferred_wgrad_bytes_are_the_cost_tables(shape: str) -> None:
    layer = ManualBackwardLayer(context_for(SHAPES[shape]), 0, "none")
    layer.context.weight_gradients.deferred = True
    layer(torch.randn(ROWS, T, 32, requires_grad=True)).backward(torch.randn(ROWS, T, 32))
    ((*work,),) = layer.weight_grads._deferred
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, *factors in work for t in factors}
    assert sum(kept.values()) == LayerWork(SHAPES[shape], T, ROWS, element_bytes=4).deferred_wgrad_bytes()


@pytest.mark.parametrize(
    ("groups", "dtype", "share"),
    [
        (8, torch.bfloat16, 0.46),
        (2, torch.bfloat16, 0.42),
        (2, torch.float32, 0.46),
        # The only share above one half: 10.383 D of 20.760 D numbers per token, because of the logsumexp.
        (8, torch.float32, 0.5002),
    ],
)
def test_selective_keeps_half_of_what_autograd_keeps(groups: int, dtype: torch.dtype, share: float) -> None:
    """LLaMA's proportions: F / D = 2.69, heads of 128."""
    model = ModelConfig(64, 1024, 2752, 1, 8, groups, 128)
    x = torch.randn(1, 8, 1024, dtype=dtype, requires_grad=True)
    plain = saved_by_hooks(DecoderLayer(context_for(model), 0).to(dtype), x)
    selective = saved_by_hooks(ManualBackwardLayer(context_for(model), 0, "selective").to(dtype), x)
    assert selective <= share * plain, selective / plain
    work = LayerWork(model, 2048, 1)
    step = 3 * (2 * (4 if groups == 8 else 2.5) * 1024**2 + 6 * 1024 * 2752)  # its matrix products, per token
    assert 0 < work.recomputed_flops("selective") < 0.04 * step


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", ["grouped_query", "biases", "qkv_bias_and_norms"])
def test_deferred_weight_gradients_are_the_same(shape: str, policy: str) -> None:
    """Two micro-batches: the backward leaves the matrices alone, run_deferred_wgrad() adds them, oldest first."""
    reference, layer = layers(shape, policy)
    vectors = {name for name, p in layer.named_parameters() if p.dim() == 1}
    first, second = ((random(ROWS, T, 32, seed=s), random(ROWS, T, 32, seed=s + 1)) for s in (1, 3))
    layer.context.weight_gradients.deferred = True
    run(layer, *first, masked=False)
    found = run(layer, *second, masked=False)
    assert set(found) == {"y", "x"} | vectors
    layer.run_deferred_wgrad()
    once = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    wanted = run(reference, *first, masked=False)
    for name in once.keys() - vectors:
        torch.testing.assert_close(once[name], wanted[name], atol=1e-10, rtol=1e-10)
    layer.run_deferred_wgrad()
    assert len(layer.weight_grads) == 0
    wanted = run(reference, *second, masked=False)
    found = {**found, **{n: p.grad for n, p in layer.named_parameters() if p.grad is not None}}
    assert_same(found, wanted)


@pytest.mark.parametrize("joins", [True, False])
def test_two_micro_batches_weight_gradients_are_one_product(joins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many additions to the buffers, to the same sums; by shape, whether copying the factors pays."""
    reference, layer = layers("grouped_query", "none")
    micro_batches = [(random(ROWS, T, 32, seed=s), random(ROWS, T, 32, seed=s + 1)) for s in (1, 3)]
    gradients = layer.context.weight_gradients
    buffers = {id(p): torch.zeros_like(p) for p in layer.parameters()}
    added: list[int] = []
    gradients.deferred, gradients.buffer_of = True, lambda p: buffers[id(p)]
    gradients.observers.append(lambda weight, buffer, together: added.append(together))
    whole: list[nn.Parameter] = []
    gradients.added = whole.append
    monkeypatch.setattr(weight_gradients, "multiplied_jointly", lambda *sizes: joins)
    for x, grad in micro_batches:
        run(layer, x, grad, masked=False)
    layer.run_deferred_wgrad(2)
    assert len(layer.weight_grads) == 0
    assert added == ([2] * 7 if joins else [1] * 14)
    assert len(whole) == 7, "each matrix is reduced once it has both gradients"
    for x, grad in micro_batches:
        total = run(reference, x, grad, masked=False)  # gradients accumulate
    for name, weight in layer.named_parameters():
        if "proj" in name:
            torch.testing.assert_close(buffers[id(weight)], total[name], atol=1e-10, rtol=1e-10)


def test_factors_are_copied_where_that_moves_fewer_bytes() -> None:
    """65B, rows of 2,048 tokens: 8 bytes saved for each element of a matrix, 8 copied for each of its factors."""
    assert multiplied_jointly(2048, 22016, 8192, 2, 2)
    assert multiplied_jointly(2048, 8192, 4096, 2, 2)  # output projection at tp 2: 268 MB saved, 201 MB copied
    assert not multiplied_jointly(2048, 8192, 1024, 2, 2)  # output projection at tp 8: 67 MB saved, 151 MB copied
    model = ModelConfig(32000, 8192, 22016, 1, 64, 64, 128)
    work = LayerWork(model, 2048, 1, tp=2)
    assert work.joint_factor_bytes(2) == 2 * 2048 * (22016 + 8192) * 2
    assert work.joint_factor_bytes(1) == 0


def test_gradients_go_straight_into_the_engines_buffers() -> None:
    reference, layer = layers("grouped_query", "none")
    x, grad = random(ROWS, T, 32), random(ROWS, T, 32, seed=2)
    buffers = {id(p): torch.full_like(p, 0.5) for p in layer.parameters()}
    layer.context.weight_gradients.buffer_of = lambda p: buffers[id(p)]
    found = run(layer, x, grad, False)
    wanted = run(reference, x, grad, False)
    assert not any("proj" in name for name in found)
    for name, weight in layer.named_parameters():
        if "proj" in name:
            torch.testing.assert_close(buffers[id(weight)], wanted[name] + 0.5, atol=1e-10, rtol=1e-10)


def test_matrices_of_one_input_lie_together() -> None:
    """One product for q, k and v, one for gate and up, without copying weights; else the same numbers with a copy."""
    layer = ManualBackwardLayer(context_for(PLAIN), 0)
    for modules in (layer.wide_attention, layer.wide_mlp):
        assert adjacent([m.weight for m in modules]) is not None
    layer.double()  # each converted on its own
    assert adjacent([m.weight for m in layer.wide_attention]) is None


def test_wide_buffer_takes_bf16_products() -> None:
    gradients = WeightGradients()
    module = ShardedLinear(nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16)), 0, SingleRank())
    buffer = torch.zeros(3, 5)
    gradients.buffer_of = lambda _: buffer
    grad, x = torch.randn(7, 3).bfloat16(), torch.randn(7, 5).bfloat16()
    for _ in range(2):
        assert gradients.compute([module], grad, x, PlainProducts()) == [None]
    torch.testing.assert_close(buffer, 2 * grad.float().t() @ x.float(), atol=2e-2, rtol=1e-2)


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of 4096 tokens and 512 words on 32 features never holds 4096 x 512 numbers, forward or backward."""
    monkeypatch.setattr(loss_chunks, "MIN_LOGITS", 1 << 18)  # in proportion to this vocabulary
    tokens, words, features = 4096, 512, 32
    x = torch.randn(1, tokens, features, requires_grad=True)
    weight = nn.Parameter(torch.randn(words, features) * 0.1)
    labels = torch.randint(0, words, (1, tokens))
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
            return result

    with Sizes():
        loss = NextTokenLoss(SingleRank())((x, weight), labels)
        (3 * loss).backward()
    assert largest <= chunk_tokens(tokens, features, words) * words < tokens * words / 2

    grads = x.grad, weight.grad
    x.grad = weight.grad = None
    (3 * nn.functional.cross_entropy((x @ weight.t()).flatten(0, 1), labels.flatten())).backward()
    for got, want in zip(grads, (x.grad, weight.grad), strict=True):
        torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-5)
