"""The memory model of plain torch programs against transformers' LLaMA, whose tensors are counted without memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from caching_allocator import Allocator
from counted_layers import Counted, empty, layers_job
from torch import Tensor
from torch.autograd import Function
from transformers import AttentionInterface, LlamaConfig
from transformers.models.llama import modeling_llama

from llama_ds.perf.plan.job import StepJob
from llama_ds.perf.plan.memory import _published
from llama_ds.perf.plan.row_programs import program_of

NOTE = (
    "transformers' LLaMA by FSDP; gradients in bf16; FlashAttention-2; RMSNorm by torch's operations, rotary embedding "
    "too; q, k, v, gate and up in separate products"
)
CASES = [  # (hidden size, inner size, heads, key-value heads), rows of a micro-batch, their length, checkpointing
    ((4096, 14336, 32, 8), 8, 2048, True),
    ((4096, 14336, 32, 8), 8, 2048, False),
    ((5120, 13824, 40, 40), 4, 4096, True),
    ((4096, 11008, 32, 32), 1, 8192, False),
]


class Flash(Function):
    """Fused attention (rows, heads, tokens, head size) -> (rows, tokens, heads, head size): what its kernels keep."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.transpose(1, 2).contiguous()
        ctx.save_for_backward(q, k, v, out, empty(*q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, sums = ctx.saved_tensors
        kept = empty(*q.shape, dtype=torch.float32), torch.empty_like(sums)  # the queries' gradient is summed in fp32
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del kept
        return grads


def job_of(shape: tuple[int, int, int, int], rows: int, tokens: int, recompute: bool) -> StepJob:
    """Some layers on one GPU, without accumulation."""
    program, policy = program_of({"note": NOTE, "model": "LLaMA"}), "full" if recompute else "none"
    job = layers_job(shape, 6, program, policy, seq_len=tokens, micro_batch=rows, zero_stage=0)
    return replace(job, model=replace(job.model, vocab_size=1000))  # embedding and head hardly count


def counted_step(job: StepJob, recompute: bool) -> Counted:
    """Return what a forward and backward of the layers allocate."""
    AttentionInterface.register("counted", lambda module, q, k, v, mask, **options: (Flash.apply(q, k, v), None))
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=job.model.hidden_size,
        intermediate_size=job.model.intermediate_size,
        num_hidden_layers=job.model.num_hidden_layers,
        num_attention_heads=job.model.num_attention_heads,
        num_key_value_heads=job.model.num_key_value_heads,
        attn_implementation="counted",
        use_cache=False,
    )
    with torch.device("meta"):
        layers = modeling_llama.LlamaModel(config).to(torch.bfloat16)
        positions = torch.arange(job.seq_len)[None]
    if recompute:
        layers.gradient_checkpointing_enable()
    embedded = empty(job.micro_batch, job.seq_len, job.model.hidden_size).requires_grad_()
    with Counted([*layers.parameters(), *layers.buffers(), embedded, positions]) as counter:
        layers(inputs_embeds=embedded, position_ids=positions).last_hidden_state.sum().backward()
    return counter


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_transformers_layers_hold_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the caching allocator loses as much to gaps, over all cases: single ones scatter."""
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *_, **__: None)
    lost = planned = 0.0
    for shape, rows, tokens, recompute in CASES:
        job = job_of(shape, rows, tokens, recompute)
        held, counter = _published(job)[0], counted_step(job, recompute)
        # The plan has all gradients where the first layer's backward still has to make its own.
        assert counter.most == pytest.approx(max(held.kept, held.late) + held.of_layer, rel=0.1)
        allocator = Allocator()
        allocator.replay(counter.events)
        lost += allocator.reserved - counter.most
        planned += held.gaps
    assert lost == pytest.approx(planned, rel=0.3)
