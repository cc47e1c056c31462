"""The decoder layer with a hand-written backward: it saves only the activations that are expensive to recompute, issues
collectives early and waits for them late (LLaMA paper, section 2.4; Korthikanti et al., arXiv 2205.05198).

Shapes: B rows, T tokens of a row, D hidden size, H query and G key-value heads, K head size, F intermediate size, tp
ranks; S = T / tp under sequence parallelism, else T. N = B * T and M = B * S tokens as rows of a matrix. H, G and F are
this rank's, 1 / tp of the model's. In formulas dX stands for dL/dX; in code it is called grad_x.

The save policy decides what a layer keeps between forward and backward (`llama_ds.layout.activation_memory` counts the
bytes):

- none: everything that the backward reads; nothing is recomputed.
- selective: the layer's input, the outputs of its large matrix products (q, k and v rotated; gate and up), and the
  attention's output and logsumexp. The norms and the SwiGLU product are recomputed, and with tp = 1 the output
  projection (2.6 percent of the layer's FLOPs). With tp > 1 the reduced output projection is kept, and under sequence
  parallelism the gathered inputs of the products as well, so that no collective is repeated.
- full: the layer's input. The forward runs again, collectives included, up to the last product, which the backward
  does not read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from llama_ds.model.attention import Documents
from llama_ds.model.attention_kernels import Statistics
from llama_ds.model.cached_layer import cached_forward
from llama_ds.model.chunked_products import (
    Gathering,
    Multiply,
    NormBackward,
    Reduction,
    cut,
    gather,
    joined,
    multiply_gathered,
)
from llama_ds.model.decoder import DecoderLayer, Hidden, LayerContext
from llama_ds.model.linear import ShardedLinear, lay_together
from llama_ds.model.pointwise import (
    rms_norm,
    rms_norm_backward,
    rotate_heads,
    rotate_heads_back,
    swiglu,
    swiglu_backward,
)
from llama_ds.model.shared_rows import kernel_over
from llama_ds.model.weight_gradients import LayerWeightGradients, bias_gradients

if TYPE_CHECKING:
    from llama_ds.model.graphed_layers import GraphedLayer


@dataclass
class Saved:
    """Activations that the forward saves for the backward; the backward recomputes those that are None."""

    x: Tensor  # (B, S, D), the layer's input
    qkv: Tensor | None = None  # (B, T, H + 2 G, K), queries and keys rotated; before their norms if they have norms
    out: Tensor | None = None  # (B, T, H, K), output of the attention
    mid: Tensor | None = None  # (B, S, D), after the residual addition of the attention
    gate_up: Tensor | None = None  # (N, 2 F), outputs of gate and up
    normed_x: Tensor | None = None  # (N, D), input of q, k and v
    normed_mid: Tensor | None = None  # (N, D), input of gate and up
    product: Tensor | None = None  # (N, F), input of down
    statistics: Statistics = ()  # softmax statistics of the attention


class ManualBackwardLayer(DecoderLayer):
    """`DecoderLayer` without autograd inside: same parameters, same results."""

    def __init__(self, context: LayerContext, layer: int, policy: str = "none", first: bool = False) -> None:
        """Build decoder layer number `layer`, counted from 0.

        Args:
            policy: save policy: none, selective or full.
            first: whether it is the first layer of its stage; no layer then needs the gathered gradient of its input.
        """
        super().__init__(context, layer)
        self.policy = policy
        self.first = first
        self.kernel = kernel_over(context.cp, context.attention.name)
        self.weight_grads = LayerWeightGradients(context.weight_gradients, context.products)
        # Whether the backward cuts its tokens into chunks; None: where weight gradients are deferred.
        self.cuts_backward: bool | None = None
        self.recomputes_early = False  # True (policy full only): recompute_oldest() runs before every backward
        self.graphs: GraphedLayer | None = None  # computes the layer in training, if set
        self._outstanding: deque[Any] = deque()  # autograd contexts of forwards with a pending backward
        self._recording = False
        attention, mlp = self.self_attn, self.mlp
        self.wide_attention = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.wide_mlp = (mlp.gate_proj, mlp.up_proj)
        self.lay_weights_together()

    def forward(self, inputs: Hidden, document_start: Tensor | None = None) -> Hidden:
        """(B, S, D) -> (B, S, D); document_start, if given as an argument or in a pair, is passed along."""
        x, document_start = inputs if isinstance(inputs, tuple) else (inputs, document_start)
        if self.context.caches.cache is not None:
            return cached_forward(self, x, self.context.caches.cache)
        if self.graphs is not None and torch.is_grad_enabled():
            return self.graphs(x)
        self._recording = self.recomputes_early and torch.is_grad_enabled()
        self.context.products.training = torch.is_grad_enabled()
        y = _Layer.apply(x, self, self.context.attention.documents(document_start), *self.parameters_in_order())
        return y if document_start is None else (y, document_start)

    def extra_repr(self) -> str:
        return f"recompute {self.policy}"

    def lay_weights_together(self) -> None:
        """Make the matrices that share an input adjacent in memory; repeat after converting them one by one."""
        for modules in (self.wide_attention, self.wide_mlp):
            lay_together([m.weight for m in modules])

    def run_deferred_wgrad(self, micro_batches: int = 1) -> None:
        """Compute the matrices' gradients of the oldest deferred micro-batches (`WeightGradients.deferred`)."""
        (self.graphs or self.weight_grads).run_oldest(micro_batches)

    @torch.no_grad()
    def recompute_oldest(self) -> None:
        """Recompute the forward for the next backward while its incoming gradient is still in flight."""
        ctx = self._outstanding.popleft()
        _, ctx.recomputed = forward(self, ctx.saved_tensors[0], ctx.documents, "none", output=False)

    def discard_forwards(self) -> None:
        """Forget the forwards whose backward will not run."""
        self._outstanding.clear()
        if self.graphs is not None:
            self.graphs.discard_forwards()

    def parameters_in_order(self) -> list[nn.Parameter]:
        """Return the parameters in the order of the gradients that `backward` returns."""
        attention, mlp = self.self_attn, self.mlp
        modules = (*self.wide_attention, attention.o_proj, *self.wide_mlp, mlp.down_proj)
        biases = [m.bias for m in modules if m.bias is not None]
        head_norms = [norm.weight for norm in (attention.q_norm, attention.k_norm) if norm is not None]
        weights = [m.weight for m in (*modules, self.input_layernorm, self.post_attention_layernorm)]
        return [*weights, *biases, *head_norms]


class _Layer(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: ManualBackwardLayer, documents: Documents | None, *parameters: nn.Parameter
    ) -> Tensor:
        y, saved = forward(layer, x, documents, layer.policy)
        assert y is not None
        ctx.save_for_backward(
            saved.x,
            saved.qkv,
            saved.out,
            saved.mid,
            saved.gate_up,
            saved.normed_x,
            saved.normed_mid,
            saved.product,
            *saved.statistics,
        )
        ctx.layer, ctx.documents, ctx.recomputed = layer, documents, None
        if layer._recording:
            layer._outstanding.append(ctx)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, qkv, out, mid, gate_up, normed_x, normed_mid, product, *statistics = ctx.saved_tensors
        saved = Saved(x, qkv, out, mid, gate_up, normed_x, normed_mid, product, tuple(statistics))
        if ctx.recomputed:
            saved = ctx.recomputed
        elif ctx.layer.policy == "full":
            with ctx.layer.context.recomputing():
                _, saved = forward(ctx.layer, saved.x, ctx.documents, "none", output=False)
        grad_x, grads = backward(ctx.layer, grad, saved, ctx.documents)
        return grad_x, None, None, *grads


def forward(
    layer: ManualBackwardLayer, x: Tensor, documents: Documents | None, policy: str, output: bool = True
) -> tuple[Tensor | None, Saved]:
    """Return y (B, S, D), or None without `output`, and what `policy` keeps. `backward` numbers the steps alike."""
    tp, eps, attention, mlp = layer.tp, layer.input_layernorm.eps, layer.self_attn, layer.mlp
    norm, mid_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    keep, width = policy == "none", x.shape[-1]
    own = x.flatten(0, 1)  # (M, D)
    count = tp.chunks_of(len(own))

    # 1. n = norm(x), gathered over the sequence
    gathering = gather(tp, rms_norm(own, norm, eps), count)
    # 2. [q | k | v] = n [W_q | W_k | W_v]^T; q = R q, k = R k
    qkv = multiply_gathered(gathering, _outputs(layer, layer.wide_attention), _width(layer.wide_attention))
    n = gathering.whole()
    qkv = projected = qkv.view(len(x), -1, qkv.shape[1] // attention.head_dim, attention.head_dim)
    if attention.q_norm is None:
        qkv = projected = _rotate_queries_and_keys(layer, qkv)
    else:
        qkv = _rotate_queries_and_keys(layer, _normed_heads(layer, projected))
    q, k, v = _split_heads(layer, qkv)
    # 3. o = attention(q, k, v)
    out, statistics = layer.kernel.forward(q, k, v, documents)
    # 4. m = x + o W_o^T, summed over ranks
    # 5. l = norm(m), gathered over the sequence
    # 6. [g | u] = l [W_gate | W_up]^T, a = silu(g) u
    residuals = cut(own, count)
    mids = Reduction(tp, out.flatten(2).flatten(0, 1), _outputs(layer, (attention.o_proj,)), width, count)
    gathering = Gathering(tp, len(own), count)

    def pass_on(i: int) -> None:
        gathering.issue(rms_norm(_add_residual(mids.chunk(i), residuals[i], attention.o_proj), mid_norm, eps))

    mids.issue_all(pass_on, early=False)
    gate_up = multiply_gathered(
        gathering, _outputs(layer, layer.wide_mlp), _width(layer.wide_mlp), pass_on, early=False
    )
    mid, normed_mid = mids.whole().view_as(x), gathering.whole()
    product = swiglu(gate_up)
    # 7. y = m + a W_down^T, summed over ranks
    y = None
    if output:
        sums = Reduction(tp, product, _outputs(layer, (mlp.down_proj,)), width, count)
        sums.issue_all()
        y = _add_residual(sums.whole().view_as(x), mid, mlp.down_proj)

    if policy == "full":
        return y, Saved(x)
    saved = Saved(x, projected, out, gate_up=gate_up, statistics=statistics)
    if keep or tp.size > 1:
        saved.mid = mid
    if keep or tp.sequence_parallel:
        saved.normed_x, saved.normed_mid = n, normed_mid
    if keep:
        saved.product = product
    return y, saved


def backward(
    layer: ManualBackwardLayer, grad_y: Tensor, saved: Saved, documents: Documents | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Return dx (B, S, D) for dy = `grad_y`, and the gradients of the parameters in their order.

    A gradient is None where `WeightGradients` has taken it over. Every collective is issued before a product that does
    not need its result, so that the products of the weight gradients hide it.
    """
    tp, eps, attention, mlp = layer.tp, layer.input_layernorm.eps, layer.self_attn, layer.mlp
    norm, mid_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    x, qkv, out, gate_up = saved.x, saved.qkv, saved.out, saved.gate_up
    assert qkv is not None and out is not None and gate_up is not None
    weight_grads, width = layer.weight_grads, x.shape[-1]
    own = x.flatten(0, 1)  # (M, D)
    # Weight gradients hide the collectives of all tokens; where they are deferred, chunks hide each other's.
    cuts = weight_grads.deferred if layer.cuts_backward is None else layer.cuts_backward
    count = tp.chunks_of(len(own)) if cuts else 1

    # For a bias b of a product dy: db = sum over tokens of dy.
    # 7. dm = dy (the residual), da = dy W_down, dW_down = dy^T a
    grad_own = grad_y.flatten(0, 1)
    gathering = layer.context.gathers_ahead.take(grad_y) or gather(tp, grad_own, count)
    mid = saved.mid
    if mid is None:  # recompute step 4
        mid = _add_residual(_output_projection(layer, out), x, attention.o_proj)
    mid = mid.flatten(0, 1)  # norms have the shape of the forward's: CUDA compiles a kernel for each
    normed_mid = rms_norm(mid, mid_norm, eps) if saved.normed_mid is None else saved.normed_mid
    grad_product = multiply_gathered(
        gathering, _input_gradients(layer, (mlp.down_proj,)), mlp.down_proj.weight.shape[1]
    )
    gathered_grad_y = gathering.whole()
    # 6. du = da g s, dg = da u s (1 + g (1 - s)) with s = sigmoid(g);
    #    dl = [dg | du] [W_gate | W_up], d[W_gate | W_up] = [dg | du]^T l
    grad_gate_up, product = swiglu_backward(grad_product, gate_up, saved.product)
    del grad_product
    # 5. dm += r (dl w - z mean(dl w z)) with z = m r; dw = sum over tokens of dl z
    # 4. do = dm W_o, dW_o = dm^T o
    sums = Reduction(tp, grad_gate_up, _input_gradients(layer, layer.wide_mlp), width, count)
    gathering, residuals = Gathering(tp, len(own), count), cut(grad_own, count)
    mid_back = NormBackward(cut(mid, count), mid_norm, eps, residuals)
    pass_on = partial(_pass_on, sums, mid_back, gathering)
    sums.issue_all(pass_on)
    grad_down_weight = weight_grads.of((mlp.down_proj,), gathered_grad_y, product)  # 7. dW_down
    if count == 1:
        pass_on(0)
    grad_gate_up_weight = weight_grads.of(layer.wide_mlp, grad_gate_up, normed_mid)  # 6. d[W_gate | W_up]
    grad_gate_up_bias = bias_gradients(layer.wide_mlp, grad_gate_up)
    del grad_gate_up
    by_output = _input_gradients(layer, (attention.o_proj,))
    grad_out = multiply_gathered(gathering, by_output, attention.o_proj.weight.shape[1], pass_on).view_as(out)
    gathered_grad_mid = gathering.whole()
    summing_mid_norm = tp.start_sum(mid_back.grad_weight)
    del sums, pass_on
    # 3. dq, dk, dv of the attention: formulas in `llama_ds.model.attention_kernels`
    heads = qkv if attention.q_norm is None else _rotate_queries_and_keys(layer, _normed_heads(layer, qkv))
    q, k, v = _split_heads(layer, heads)
    grads_q_k_v = layer.kernel.backward(grad_out, q, k, v, out, saved.statistics, documents)
    # 2. dq = R^T dq, dk = R^T dk;
    #    dn = [dq | dk | dv] [W_q | W_k | W_v], d[W_q | W_k | W_v] = [dq | dk | dv]^T n
    grad_qkv = rotate_heads_back(grads_q_k_v, layer.context.rotary.on(x.device, qkv.shape[1]))
    del grads_q_k_v, grad_out, heads, q, k, v
    grad_qkv, grad_head_norms = _normed_heads_backward(layer, grad_qkv, qkv)
    grad_qkv = grad_qkv.flatten(2).flatten(0, 1)
    # 1. dx = dm + r (dn w - z mean(dn w z)) with z = x r; dw = sum over tokens of dn z
    sums = Reduction(tp, grad_qkv, _input_gradients(layer, layer.wide_attention), width, count)
    ahead = Gathering(tp, len(own), count) if tp.sequence_parallel and not layer.first else None
    back = NormBackward(cut(own, count), norm, eps, mid_back.grads)
    pass_on = partial(_pass_on, sums, back, ahead)
    sums.issue_all(pass_on)
    grad_o_weight = weight_grads.of((attention.o_proj,), gathered_grad_mid, out.flatten(2).flatten(0, 1))  # 4. dW_o
    normed_x = rms_norm(own, norm, eps) if saved.normed_x is None else saved.normed_x
    for i in range(len(back.grads), count):
        pass_on(i)
    grad_x = joined(back.grads).view_as(x)
    if ahead:
        layer.context.gathers_ahead.put(grad_x, ahead)
    summing_norm = tp.start_sum(back.grad_weight)
    grad_qkv_weight = weight_grads.of(layer.wide_attention, grad_qkv, normed_x)  # 2. d[W_q | W_k | W_v]
    weight_grads.end_micro_batch()
    grad_biases = [
        *bias_gradients(layer.wide_attention, grad_qkv),
        *bias_gradients((attention.o_proj,), gathered_grad_mid),
        *grad_gate_up_bias,
        *bias_gradients((mlp.down_proj,), gathered_grad_y),
    ]
    grad_norms = [total().to(norm.dtype) for total in (summing_norm, summing_mid_norm)]
    grad_matrices = [*grad_qkv_weight, *grad_o_weight, *grad_gate_up_weight, *grad_down_weight]
    return grad_x, [*grad_matrices, *grad_norms, *grad_biases, *grad_head_norms]


def _pass_on(sums: Reduction, back: NormBackward, gathering: Gathering | None, i: int) -> None:
    """Wait for chunk i of an input gradient, continue behind the norm, and issue the gather for the product there."""
    grad = back.chunk(sums.chunk(i))
    if gathering:
        gathering.issue(grad)


def _outputs(layer: ManualBackwardLayer, modules: Sequence[ShardedLinear]) -> Multiply:
    return lambda x, out: layer.context.products.outputs(x, modules, out)


def _input_gradients(layer: ManualBackwardLayer, modules: Sequence[ShardedLinear]) -> Multiply:
    return lambda grad, out: layer.context.products.input_gradients(grad, modules, out)


def _width(modules: Sequence[ShardedLinear]) -> int:
    return sum(len(module.weight) for module in modules)


def _output_projection(layer: ManualBackwardLayer, out: Tensor) -> Tensor:
    """Return this rank's partial sums of o W_o^T: (B, T, H, K) -> (B, T, D)."""
    rows = out.flatten(2)
    return layer.context.products.outputs(rows.flatten(0, 1), (layer.self_attn.o_proj,)).view(*rows.shape[:2], -1)


def _split_heads(layer: ManualBackwardLayer, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views (B, T, H, K), (B, T, G, K) and (B, T, G, K) of (B, T, H + 2 G, K)."""
    q, k, v = qkv.split([len(m.weight) // layer.self_attn.head_dim for m in layer.wide_attention], 2)
    return q, k, v


def _rotate_queries_and_keys(layer: ManualBackwardLayer, qkv: Tensor) -> Tensor:
    """Return qkv (B, T, H + 2 G, K) with rotated queries and keys; on a CPU it is changed in place."""
    num_rotated_heads = sum(len(m.weight) for m in layer.wide_attention[:2]) // layer.self_attn.head_dim
    return rotate_heads(qkv, num_rotated_heads, layer.context.rotary.on(qkv.device, qkv.shape[1]))


def _normed_heads(layer: ManualBackwardLayer, qkv: Tensor) -> Tensor:
    """Return [norm(q) | norm(k) | v] (B, T, H + 2 G, K), each head normed over K."""
    query_norm, key_norm = layer.self_attn.q_norm, layer.self_attn.k_norm
    assert query_norm is not None and key_norm is not None
    q, k, v = _split_heads(layer, qkv)
    normed = [rms_norm(x, norm.weight, norm.eps) for x, norm in ((q, query_norm), (k, key_norm))]
    return torch.cat([*normed, v], 2)


def _normed_heads_backward(layer: ManualBackwardLayer, grad: Tensor, qkv: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return dL/dqkv (B, T, H + 2 G, K) for `grad` behind the norms of queries and keys, and those of their weights.

    Without these norms it returns `grad` and []. A rank has only some heads, so the ranks always sum the latter.
    """
    query_norm, key_norm = layer.self_attn.q_norm, layer.self_attn.k_norm
    if query_norm is None or key_norm is None:
        return grad, []
    (grad_q, grad_k, grad_v), (q, k, _) = _split_heads(layer, grad), _split_heads(layer, qkv)
    grad_q, grad_query_norm = rms_norm_backward(grad_q, q, query_norm.weight, query_norm.eps)
    grad_k, grad_key_norm = rms_norm_backward(grad_k, k, key_norm.weight, key_norm.eps)
    total = layer.tp.all_reduce_sum(torch.cat([grad_query_norm, grad_key_norm])).to(query_norm.weight.dtype)
    return torch.cat([grad_q, grad_k, grad_v], 2), list(total.chunk(2))


def _add_residual(y: Tensor, residual: Tensor, linear: ShardedLinear) -> Tensor:
    """Add the residual and the bias of a row-parallel layer, if it has one, to its output y (B, S, D) in place."""
    y.add_(residual)
    return y if linear.bias is None else y.add_(linear.bias)
