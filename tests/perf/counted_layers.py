"""LLaMA layers with the operations of Megatron-like programs of 2023, whose tensors are counted on the meta device.

Written after Megatron-LM, Megatron-LLaMA and GPT-NeoX as they were in 2023. Activations are [sequence, rows, hidden].
Kernels of their own (norm, SwiGLU, softmax, fused attention) are functions that allocate and keep what the kernels do.
A collective allocates its output; all-reduces are in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from llama_ds.config.schema import ModelConfig
from llama_ds.layout.axes import Axes
from llama_ds.parallel.dry_run.ledger import OTHER, Ledger
from llama_ds.perf.plan.job import StepJob
from llama_ds.perf.plan.program import Program
from llama_ds.perf.plan.rows import stages_of


class Counted(Ledger):
    """Counts the bytes of tensors that exist beside those known before, and the most at one time.

    `events` are (number of the tensor, size), and (number, 0) when it is freed.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self._numbers: dict[int, int] = {}
        self.mark(known, OTHER)
        self.events.clear()
        self._numbers.clear()
        self._known = self.total

    @property
    def held(self) -> int:
        return self.total - self._known

    @property
    def most(self) -> int:
        return self.high - self._known

    def _take(self, storage: Any) -> None:
        super()._take(storage)
        self._numbers[storage._cdata] = number = len(self.events)
        self.events.append((number, storage.nbytes()))

    def _release(self, key: int) -> None:
        super()._release(key)
        if key in self._numbers:
            self.events.append((self._numbers.pop(key), 0))


def layers_job(
    shape: tuple[int, int, int, int], layers: int, program: Program, recompute: str, pp: int = 1, **changes: Any
) -> StepJob:
    """Return the job of a model by (hidden size, inner size, heads, key-value heads), with `changes` of a StepJob."""
    hidden, inner, heads, kv_heads = shape
    model = ModelConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        tie_word_embeddings=False,
    )
    settings: dict[str, Any] = {
        "seq_len": 2048,
        "micro_batch": 1,
        "micro_batches": 1,
        "axes": Axes(pp=pp, dp=1, cp=1, tp=1),
        "sequence_parallel": False,
        "zero_stage": 1,
        "schedule": "1f1b",
        "chunks": 1,
        "extra_warmup": 0,
        "stages": stages_of(layers, pp, recompute),
    }
    return StepJob(model=model, program=program, **{**settings, **changes})


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Product(Function):
    """x W^T; with sequence parallelism, a column-parallel one gathers x into the shared buffer and scatters its sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, buffer: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.buffer = buffer
        return (x if buffer is None else buffer) @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        total = x if ctx.buffer is None else ctx.buffer
        grad_x = grad @ weight
        scattered = grad_x if ctx.buffer is None else torch.empty_like(x)
        return scattered, grad.reshape(-1, grad.shape[-1]).t() @ total.reshape(-1, total.shape[-1]), None


class ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: int) -> Tensor:
        ctx.tp = tp
        return empty(x.shape[0] // tp, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return empty(grad.shape[0] * ctx.tp, *grad.shape[1:]), None


class NormKernel(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, empty(x.shape[0] * x.shape[1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class FusedAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, sums = torch.empty_like(q), empty(*q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, _, sums = ctx.saved_tensors
        _accumulated = empty(*q.shape, dtype=torch.float32), torch.empty_like(sums)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class SoftmaxKernel(Function):
    """Megatron's scaled and masked softmax; its backward writes into the gradient that it receives."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        result = torch.empty_like(scores)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class SwigluKernel(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return empty(*x.shape[:-1], x.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


class Recomputed(Function):
    """A part of which only the inputs are kept, by reentrant checkpointing."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return run(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.run(*inputs)
        torch.autograd.backward((out,), (grad,))
        return None, *(tensor.grad for tensor in inputs)


class Loss(Function):
    """Megatron's vocabulary-parallel cross entropy of fp32 logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        shifted = logits - logits.max(dim=-1)[0].unsqueeze(-1)
        picked = shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        torch.exp(shifted, out=shifted)
        total = shifted.sum(dim=-1)
        shifted.div_(total.unsqueeze(-1))
        ctx.save_for_backward(shifted)
        return total.log() - picked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors[0].mul_(grad.unsqueeze(-1)), None


class Layer:
    """One layer on one rank of a job: `norms` and `swiglu` by operations or a kernel, `attention` fused or not."""

    def __init__(self, job: StepJob, plain_norms: bool, attention: str, swiglu_kernel: bool, policy: str) -> None:
        model, tp = job.model, job.tp
        self.job, self.plain_norms, self.attention, self.swiglu_kernel = job, plain_norms, attention, swiglu_kernel
        self.policy = policy
        hidden, inner = model.hidden_size, model.intermediate_size // tp
        attention = (hidden,), (3 * hidden // tp, hidden), (hidden, hidden // tp)
        mlp = (hidden,), (2 * inner, hidden), (hidden, inner)
        self.weights = [empty(*shape).requires_grad_() for shape in (*attention, *mlp)]
        for weight in self.weights:  # its gradient is added to one in fp32, and freed
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        self.gathered = empty(job.seq_len, job.micro_batch, hidden) if job.sequence_parallel else None
        self.scores = empty(job.micro_batch * model.num_attention_heads // tp, job.seq_len, job.seq_len)
        self.cos = empty(job.seq_len, 1, 1, model.head_dim)
        self.mask = torch.empty(job.seq_len, job.seq_len, dtype=torch.bool, device="meta")

    @property
    def known(self) -> list[Tensor]:
        """Tensors that exist all the time."""
        buffers = [] if self.gathered is None else [self.gathered]
        return [*self.weights, *buffers, self.scores, self.cos, self.mask]

    def __call__(self, x: Tensor) -> Tensor:
        return Recomputed.apply(self.forward, x) if self.policy == "full" else self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        norm, qkv, out, mlp_norm, up, down = self.weights
        x = x + self._row(self._attend(Product.apply(self._norm(x, norm), qkv, self.gathered)), out)
        return x + self._row(self._activate(Product.apply(self._norm(x, mlp_norm), up, self.gathered)), down)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.plain_norms:
            return NormKernel.apply(x, weight)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return wide.type_as(x) * weight

    def _row(self, x: Tensor, weight: Tensor) -> Tensor:
        found = Product.apply(x, weight, None)
        return ReduceScatter.apply(found, self.job.tp) if self.job.sequence_parallel else found

    def _rotate(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-right, left), dim=-1) * self.cos

    def _attend(self, qkv: Tensor) -> Tensor:
        sequence, rows = qkv.shape[:2]
        q, k, v = (part.view(sequence, rows, -1, self.job.model.head_dim) for part in qkv.chunk(3, dim=-1))
        q, k = self._rotate(q), self._rotate(k)
        if self.attention == "fused":
            q, k, v = (part.transpose(0, 1).contiguous() for part in (q, k, v))
            return FusedAttention.apply(q, k, v).transpose(0, 1).reshape(sequence, rows, -1).contiguous()
        return Recomputed.apply(self._core, q, k, v) if self.policy == "selective" else self._core(q, k, v)

    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequence, rows = q.shape[:2]
        q, k, v = (part.reshape(sequence, -1, self.job.model.head_dim).transpose(0, 1) for part in (q, k, v))
        scores = torch.baddbmm(self.scores, q, k.transpose(1, 2), beta=0.0)
        if self.attention == "megatron":
            shares = SoftmaxKernel.apply(scores)
        else:
            shares = scores.float().masked_fill_(self.mask, -10000.0).softmax(-1).to(q.dtype)
        out = torch.bmm(shares, v).view(rows, -1, sequence, self.job.model.head_dim)
        return out.permute(2, 0, 1, 3).contiguous().view(sequence, rows, -1)

    def _activate(self, x: Tensor) -> Tensor:
        if self.swiglu_kernel:
            return SwigluKernel.apply(x)
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
