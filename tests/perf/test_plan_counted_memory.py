"""The memory model of published LLaMA-like programs against layers whose tensors are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from caching_allocator import Allocator
from counted_layers import Counted, Layer, Loss, Product, empty, layers_job
from torch import Tensor

from llama_ds.layout.axes import Axes
from llama_ds.layout.flops import parameter_count
from llama_ds.perf.plan.job import StepJob
from llama_ds.perf.plan.memory import _published, layer_activations, published_memory
from llama_ds.perf.plan.program import AUTOGRAD, LLAMA, Program
from llama_ds.perf.plan.program_options import (
    with_bf16_states,
    with_fused_optimizer,
    with_fused_swiglu,
    with_gradient_buffers,
    with_megatron,
    with_plain_norms,
    without_flash,
)

Case = tuple[int, bool, int, bool, str, bool]
CASES: list[
    Case
] = [  # tp, sequence parallelism, rows of a micro-batch, norms by operations, attention, kernel for SwiGLU
    (1, False, 1, True, "fused", False),
    (1, False, 2, False, "torch", False),
    (2, False, 2, True, "megatron", True),
    (2, True, 1, False, "megatron", False),
    (8, False, 4, True, "fused", True),
    (8, False, 1, True, "torch", False),
    (8, True, 4, True, "fused", False),
    (8, True, 1, False, "fused", True),
    (8, True, 2, False, "torch", False),
]


def program_of(plain_norms: bool, attention: str, swiglu_kernel: bool) -> Program:
    program = with_megatron(with_plain_norms(LLAMA) if plain_norms else LLAMA)
    program = with_fused_swiglu(program) if swiglu_kernel else program
    return program if attention == "fused" else without_flash(program, fused_softmax=attention == "megatron")


def job_of(tp: int, sharded: bool, rows: int, program: Program, pp: int, recompute: str, layers: int = 2) -> StepJob:
    """LLaMA 13B's layers, `layers` on each of `pp` stages."""
    axes = Axes(pp=pp, dp=1, cp=1, tp=tp)
    settings = {"micro_batch": rows, "micro_batches": 4 * pp, "axes": axes, "sequence_parallel": sharded}
    return layers_job((5120, 13824, 40, 40), layers * pp, program, recompute, pp, **settings)


def boundary(job: StepJob) -> Tensor:
    sequence = job.seq_len // (job.tp if job.sequence_parallel else 1)
    return empty(sequence, job.micro_batch, job.model.hidden_size)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_keeps_what_its_operations_keep(case: Case, policy: str) -> None:
    """All but the few bytes that a norm keeps for each token."""
    tp, sharded, rows, *kernels = case
    job = job_of(tp, sharded, rows, program_of(*kernels), pp=1, recompute=policy)
    if policy == "selective" and job.program.flash:
        return  # nothing to recompute
    layer = Layer(job, *kernels, policy=policy)
    with Counted(layer.known) as counter:
        leaf = boundary(job).requires_grad_()
        before = counter.held
        x = leaf * 1  # as another layer's output, which is freed unless this one keeps it
        out = layer(x)
        del x
        kept = counter.held - before - out.nbytes
    assert kept == pytest.approx(layer_activations(job, policy), rel=2e-4)


@pytest.mark.parametrize(("policy", "tolerance"), [("none", 5e-4), ("selective", 0.03), ("full", 5e-4)])
@pytest.mark.parametrize("case", CASES)
def test_a_stage_holds_what_its_passes_hold(case: Case, policy: str, tolerance: float) -> None:
    """The second of three stages, which holds two micro-batches when a backward begins."""
    tp, sharded, rows, *kernels = case
    job = job_of(tp, sharded, rows, program_of(*kernels), pp=3, recompute=policy)
    if policy == "selective" and job.program.flash:
        return
    counter = counted_stage([Layer(job, *kernels, policy=policy) for _ in range(2)])
    held = _published(job)[1]
    assert counter.most == pytest.approx(held.kept + held.working, rel=tolerance)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_allocator_leaves_the_gaps_that_are_planned(recompute: str) -> None:
    """The sum over layouts, by the allocator's rules: single ones scatter."""
    counted = planned = 0.0
    for tp, sharded, rows, *kernels in CASES[:7:2]:
        job = job_of(tp, sharded, rows, program_of(*kernels), pp=3, recompute=recompute, layers=8)
        counter = counted_stage([Layer(job, *kernels, policy=recompute) for _ in range(8)])
        allocator = Allocator()
        allocator.replay(counter.events)
        counted += allocator.reserved - counter.most
        planned += _published(job)[1].gaps
    assert counted == pytest.approx(planned, rel=0.3)


def counted_stage(layers: list[Layer]) -> Counted:
    """Return what the second of three stages allocates in two forwards, a backward and one of each."""
    job = layers[0].job
    with Counted(tensor for layer in layers for tensor in layer.known) as counter:
        inputs, outputs = [], list[Tensor]()
        for i in range(3):
            x = boundary(job).requires_grad_()
            inputs.append(x)
            for layer in layers:
                x = layer(x)
            outputs.append(x)
            x.data = empty(1)  # it has been sent: only its graph is needed
            if i:
                backward(outputs.pop(0), boundary(job))
                del inputs[0]
    return counter


def test_torch_makes_gradients_while_activations_go() -> None:
    """The peak of a step's first backward has no gradients, and that of a second, which accumulates, has them all."""
    weights = [empty(64, 64).requires_grad_() for _ in range(8)]
    peaks = []
    with Counted(weights) as counter:
        for _ in range(2):
            counter.high = counter.total
            x = empty(1024, 64)
            for weight in weights:
                x = torch.tanh(x @ weight)
            x.sum().backward()
            del x
            peaks.append(counter.most)
    gradients = sum(weight.nbytes for weight in weights)
    assert peaks[1] - peaks[0] == pytest.approx(gradients, rel=0.15)  # the first weight's is made before the peak

    once = job_of(1, False, 4, AUTOGRAD, pp=1, recompute="none")
    once = replace(once, micro_batches=1)
    kept = published_memory(replace(once, micro_batches=2), False) - published_memory(once, False)
    assert kept == AUTOGRAD.gradient_bytes * parameter_count(once.model)
    buffers = replace(once, program=with_gradient_buffers(AUTOGRAD))
    assert published_memory(buffers, False) - published_memory(once, False) == kept
    (few,) = _published(replace(once, micro_batch=1, seq_len=16))  # activations are less than the gradients
    assert few.tensors == few.states + few.late + few.of_layer


def test_fsdp_keeps_embedding_and_head_gathered() -> None:
    """They are in the root's unit, whose weights stay until the backward has ended, beside those of two layers."""
    job = job_of(1, False, 1, AUTOGRAD, pp=1, recompute="none", layers=8)
    job = replace(job, zero_stage=3, axes=Axes(pp=1, dp=8, cp=1, tp=1))
    (fsdp,), (other,) = _published(job), _published(replace(job, program=with_gradient_buffers(AUTOGRAD)))
    ends = 2 * job.vocab * job.model.hidden_size
    assert fsdp.states - other.states == pytest.approx(2 * ends - 4 * ends / 8)


def test_adamw_by_lists_makes_a_list_of_roots() -> None:
    """torch's AdamW by lists of tensors, on a device that has them: the roots of all second moments at one time."""
    job = replace(job_of(1, False, 1, with_bf16_states(AUTOGRAD), pp=1, recompute="full"), seq_len=16)
    weights = [empty(64, 64).requires_grad_() for _ in range(8)]
    for weight in weights:
        weight.grad = empty(64, 64)
    optimizer = torch.optim.AdamW(weights, foreach=True)
    optimizer.step()
    with Counted([*weights, *(weight.grad for weight in weights), *states_of(optimizer)]) as counter:
        optimizer.step()
    assert counter.most == pytest.approx(job.program.step_bytes * 8 * 64 * 64, rel=0.01)
    (lists,), (fused,) = _published(job), _published(replace(job, program=with_fused_optimizer(job.program)))
    assert lists.tensors == fused.states + 2 * parameter_count(job.model) > fused.tensors


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def backward(out: Tensor, grad: Tensor) -> None:
    """Run the backward without comparing the shape of the output, which is gone, with its gradient's."""
    run: Callable[..., None] = torch.autograd.Variable._execution_engine.run_backward
    run((out,), (grad,), False, False, (), allow_unreachable=True, accumulate_grad=True)


@pytest.mark.parametrize("tp", [1, 8])
def test_the_loss_holds_its_logits_four_times(tp: int) -> None:
    """In 16 bits, in fp32, and their shares or differences from the maximum in fp32."""
    job = job_of(tp, False, 1, program_of(False, "fused", False), pp=1, recompute="none")
    head, x = empty(job.vocab, job.model.hidden_size).requires_grad_(), boundary(job).requires_grad_()
    targets = torch.empty(x.shape[:2], dtype=torch.int64, device="meta")
    with Counted([head, x, targets]) as counter:
        logits = Product.apply(x, head, None)
        loss = Loss.apply(logits.float(), targets).mean()
        del logits
        loss.backward()
    assert counter.most == pytest.approx(job.program.kept_logits * job.tokens * job.vocab, rel=0.01)
