"""The model is transformers' Llama, Qwen2 or Qwen3: same weights, same logits, same loss and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llama_ds.checkpoint.formats.hf_config import hf_config
from llama_ds.checkpoint.names import hf_name
from llama_ds.config.document_marks import LLAMA_MARKS
from llama_ds.config.schema import ModelConfig, RopeScaling
from llama_ds.model.attention import CausalAttention
from llama_ds.model.decoder import LayerContext
from llama_ds.model.llama import Llama
from llama_ds.model.loss import IGNORED, NextTokenLoss
from llama_ds.model.rope import RotaryTables
from llama_ds.model.tensor_parallel import SingleRank

T = 48
LLAMA1 = ModelConfig(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    rms_norm_eps=1e-6,
)
SHAPES = {
    "llama1": LLAMA1,
    "llama2_gqa": replace(LLAMA1, num_key_value_heads=2, rms_norm_eps=1e-5),
    "multi_query_wide_head": replace(LLAMA1, num_key_value_heads=1, head_dim=32),
    "tied": replace(LLAMA1, tie_word_embeddings=True),
    "llama3": replace(LLAMA1, num_key_value_heads=2, rope_theta=500000.0),
    "llama31_scaled": replace(LLAMA1, rope_theta=500000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16)),
    "linear": replace(LLAMA1, rope_scaling=RopeScaling(2.5, rope_type="linear")),
    "dynamic": replace(LLAMA1, rope_scaling=RopeScaling(2.0, None, None, 16, "dynamic")),
    "dynamic_short_rows": replace(LLAMA1, rope_scaling=RopeScaling(2.0, None, None, T, "dynamic")),
    "yarn": replace(LLAMA1, rope_scaling=RopeScaling(4.0, None, None, 16, "yarn")),
    "yarn_all_keys": replace(
        LLAMA1,
        rope_scaling=RopeScaling(
            4.0, None, None, 32, "yarn", beta_fast=3, beta_slow=0.5, mscale=1.5, mscale_all_dim=0.5, truncate=False
        ),
    ),
    "yarn_attention": replace(LLAMA1, rope_scaling=RopeScaling(4.0, None, None, 16, "yarn", attention_factor=1.3)),
    "qwen2": replace(LLAMA1, num_key_value_heads=2, attention_bias="qkv", tie_word_embeddings=True),
    "all_biases": replace(LLAMA1, attention_bias="qkvo", mlp_bias=True),
    "qwen3": replace(LLAMA1, num_key_value_heads=2, head_dim=32, qk_norm=True),
    "qwen3_biased": replace(LLAMA1, num_key_value_heads=2, qk_norm=True, attention_bias="qkvo"),
}


def ours(model: ModelConfig, backend: str, policy: str | None = None) -> Llama:
    tp = SingleRank()
    # Initial weights are large enough that attention is far from uniform.
    context = LayerContext(model, 7, tp, CausalAttention(backend), RotaryTables(model, T), initializer_range=0.1)
    built = Llama(context, NextTokenLoss(tp), policy and [policy] * model.num_hidden_layers)
    with torch.no_grad():  # norm weights of one and biases of zero would hide their place
        generator = torch.Generator().manual_seed(3)
        for weight in built.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return built


def theirs(model: ModelConfig, source: Llama) -> PreTrainedModel:
    config = AutoConfig.for_model(**hf_config(model, 4 * T, "float32"), attn_implementation="eager")
    judge = AutoModelForCausalLM.from_config(config).eval()
    weights = {
        hf_name(i, name, model.num_hidden_layers): w
        for i, layer in enumerate(source.layers)
        for name, w in layer.state_dict().items()
    }
    missing, unexpected = judge.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.tie_word_embeddings else set())
    judge.tie_weights()
    return judge


@pytest.mark.parametrize("policy", [None, "selective"], ids=["autograd", "manual_backward"])
@pytest.mark.parametrize(
    ("shape", "backend"),
    [
        *((shape, "sdpa") for shape in SHAPES),
        ("llama1", "reference"),
        ("llama2_gqa", "reference"),
        ("multi_query_wide_head", "reference"),
        ("tied", "reference"),
        ("llama3", "reference"),
    ],
)
def test_logits_loss_and_gradients_are_transformers(shape: str, backend: str, policy: str | None) -> None:
    """Logits to 1e-5 as the field judges ports, the loss to 1e-6, gradients to 1e-5 of each gradient's norm."""
    model = SHAPES[shape]
    mine = ours(model, backend, policy)
    judge = theirs(model, mine)
    rows = torch.randint(0, model.vocab_size, (3, T + 1), generator=torch.Generator().manual_seed(1))
    ids, labels = rows[:, :-1], rows[:, 1:]

    expected = judge(input_ids=ids).logits
    assert expected.std() > 0.1  # the comparison is not of zeros
    torch.testing.assert_close(mine(ids), expected, atol=1e-5, rtol=0)

    loss = mine(ids, labels)
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected_loss, atol=0, rtol=1e-6)  # the loss is 5: ten roundings

    loss.backward()
    expected_loss.backward()
    wanted = dict(judge.named_parameters())
    for i, layer in enumerate(mine.layers):
        for name, weight in layer.named_parameters():
            gradient = wanted[hf_name(i, name, model.num_hidden_layers)].grad
            assert weight.grad is not None and gradient is not None
            assert (weight.grad - gradient).norm() <= 1e-5 * gradient.norm(), (i, name)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_masked_documents_see_only_themselves(backend: str) -> None:
    """A packed row with document masks gives each document the logits it has on its own."""
    model = SHAPES["llama2_gqa"]
    mine = ours(model, backend)
    masked = Llama(replace(mine.layers[1].self_attn.context, document_mask=True), NextTokenLoss(SingleRank()))
    masked.load_state_dict(mine.state_dict())
    generator = torch.Generator().manual_seed(2)
    contents = [torch.randint(3, model.vocab_size, (n,), generator=generator) for n in (9, 20, 16)]
    documents = [torch.cat([torch.tensor([LLAMA_MARKS.bos]), content]) for content in contents]
    row = torch.cat(documents)[None]
    assert row.shape[1] == T

    packed = masked(row)
    alone = torch.cat([mine(document[None]) for document in documents], 1)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=0)
    assert (mine(row) - alone).abs().max() > 1e-2  # without the mask documents do see each other


def test_z_loss_penalises_the_log_normaliser_in_training_only() -> None:
    logits = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    head = torch.eye(11, dtype=torch.float64, requires_grad=True)  # the logits are their own hidden states
    labels = torch.randint(0, 11, (2, 5))
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    wanted = plain + 0.1 * logits.logsumexp(-1).square().mean()
    loss = NextTokenLoss(SingleRank(), 0.1)
    torch.testing.assert_close(loss((logits, head), labels), wanted, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda x, w: loss((x, w), labels), (logits, head))
    with torch.no_grad():
        torch.testing.assert_close(loss((logits, head), labels), plain, atol=1e-12, rtol=0)


def test_an_ignored_label_has_neither_loss_nor_gradient() -> None:
    hidden = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (2, 5))
    labels[1, 2:] = IGNORED
    logits = hidden @ head.t()
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    wanted = plain + 0.1 * logits.logsumexp(-1).square()[labels != IGNORED].mean()
    loss = NextTokenLoss(SingleRank(), 0.1)
    torch.testing.assert_close(loss((hidden, head), labels), wanted, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda x, w: loss((x, w), labels), (hidden, head))
    loss.labels = 2.5  # as in a step whose other micro-batches have fewer labels
    torch.testing.assert_close(loss((hidden, head), labels), wanted * 7 / 2.5, atol=1e-12, rtol=0)
    loss((hidden, head), labels).backward()
    assert not hidden.grad[1, 2:].any() and hidden.grad[0].all()  # type: ignore[index]


def test_rows_without_filler_have_the_same_bits_as_without_a_mask() -> None:
    """Runs of earlier versions resume bit for bit."""
    results = []
    for divisor in (None, 10):
        torch.manual_seed(1)
        hidden, head = torch.randn(2, 5, 11, requires_grad=True), torch.randn(7, 11, requires_grad=True)
        loss = NextTokenLoss(SingleRank(), 0.1)
        loss.labels = divisor
        found = loss((hidden, head), torch.arange(10).view(2, 5) % 7)
        found.backward()
        results.append((found, hidden.grad, head.grad))
    assert all(torch.equal(masked, plain) for masked, plain in zip(*results, strict=True))  # type: ignore[arg-type]
