"""DeepSpeed's BF16_Optimizer for the pipeline: gradients are reduce-scattered bucket by bucket while the backward still
runs, and weights come back while the next forward already does.

A bucket is one optimizer group, the matrices of one layer, or the norms of all layers, which are small. DeepSpeed lays
every group out flat and gives each data-parallel rank one part of it, so its checkpoints stay as they are. Runs in
fp32 use the same code: their parts of the weights are their own masters.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from llama_ds.layout.weights import Role, weight_of
from llama_ds.parallel.data_parallel import Wait, start_all_gather, start_reduce_scatter
from llama_ds.parallel.trace import Trace

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s and DeepSpeed's


class PipelineOptimizer(BF16_Optimizer):
    """ZeRO-1 whose communication is issued early and waited for late.

    `gradient_added` is told of every gradient; while `final` is set these are their buckets' last of the step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, engine: Any, accumulate: torch.dtype, reduce: torch.dtype, trace: Trace
    ) -> None:
        super().__init__(
            optimizer,
            engine.param_names,
            # BF16_Optimizer asks for no more than this of bf16; every gradient goes to its buffer at once.
            bfloat16_config=SimpleNamespace(enabled=True, immediate_grad_update=True),
            mpu=engine.mpu,
            clip_grad=engine.gradient_clipping(),
            dp_process_group=engine.seq_data_parallel_group,
            timers=engine.timers,
            grad_acc_dtype=accumulate,
        )
        self.final = False
        self.trace = trace
        self._ready: dict[int, _Bucket] = {}  # bucket of a parameter, by id
        self._counted = [self._is_counted(group) for group in self.bf16_groups]
        self._buckets = self._make_buckets(reduce)

    def _setup_for_real_optimizer(self) -> None:
        super()._setup_for_real_optimizer()
        own = dist.get_rank(self.dp_process_group)
        for master, parts in zip(self.fp32_groups_flat_partition, self.bf16_partitioned_groups, strict=True):
            if parts[own].dtype == master.dtype:
                master.data = parts[own]
        self._link_all_hp_params()

    @property
    def fp16_groups(self) -> list[list[nn.Parameter]]:
        """DeepSpeed's name for them where it saves a run in fp32."""
        return self.bf16_groups

    def _is_counted(self, group: list[nn.Parameter]) -> bool:
        """Tell whether this rank's gradients of a group enter the norm: those that several ranks hold count once."""
        tp_rank = self.mpu.get_slice_parallel_rank()
        counted = {
            not getattr(p, "ds_pipe_replicated", False) and (tp_rank == 0 or getattr(p, "tensor_model_parallel", False))
            for p in group
        }
        assert len(counted) == 1, "a group holds parameters that are shared in one way"
        return counted.pop()

    def _make_buckets(self, reduce: torch.dtype) -> list[_Bucket]:
        roles = [weight_of(self.param_names[group[0]]).role for group in self.bf16_groups]
        # In the order in which the backward fills them: the last layer first, and the norms with the first layer.
        alone = [[i] for i, role in enumerate(roles) if role is not Role.NORM]
        norms = [i for i, role in enumerate(roles) if role is Role.NORM]
        buckets = [_Bucket(self, groups, reduce) for groups in [*reversed(alone), norms] if groups]
        for bucket in buckets:
            for i in bucket.groups:
                self._ready.update({id(p): bucket for p in self.bf16_groups[i]})
        return buckets

    def gradient_added(self, parameter: nn.Parameter) -> None:
        """Note that a micro-batch's gradient is in its buffer; with the last of its bucket the reduction starts."""
        if self.final:
            self._ready[id(parameter)].count_down()

    def accumulate_hp_grads_and_remove_lp(self, lp_param: nn.Parameter, group_idx: int, param_idx: int) -> None:
        if lp_param.grad is None:  # a matrix whose layer has added it itself, or will
            return
        super().accumulate_hp_grads_and_remove_lp(lp_param, group_idx, param_idx)
        self.gradient_added(lp_param)

    def hold_back(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave the buckets of `parameters` to `reduce_rest`: something else happens to them before."""
        for p in parameters:
            self._ready[id(p)].held_back = True

    def reduce_rest(self) -> None:
        """Start the reductions that are not under way yet."""
        for bucket in self._buckets:
            bucket.start_reduction()

    @torch.no_grad()
    def step(self, loss: Tensor) -> Tensor:
        """Clip, update, send the weights out; return (sum of all ranks' `loss`, gradient norm before clipping).

        The one thing the device waits for is a sum of two numbers over all ranks; the host waits for nothing. A norm
        that is not finite leaves weights and moments as they are.
        """
        begin = self.trace.mark()
        for bucket in self._buckets:
            bucket.end_reduction()
        self.trace.add("wait reduction", begin)
        begin = self.trace.mark()
        parts = self.fp32_groups_gradient_flat_partition
        norms = torch._foreach_norm([part for part, counts in zip(parts, self._counted, strict=True) if counts])
        square = torch.stack(norms).float().square().sum() if norms else loss.new_zeros(())
        summary = torch.stack([loss, square])
        dist.all_reduce(summary)
        self.trace.add("wait norm", begin)
        begin = self.trace.mark()
        norm = summary[1].sqrt_()
        self._global_grad_norm = norm
        self._update(norm)
        for bucket in reversed(self._buckets):  # norms, which every layer wants, then layer by layer
            bucket.start_gather()
        for flat in self.fp32_groups_gradients_flat:
            flat.zero_()
        self.trace.add("optimizer", begin)
        return summary

    def _update(self, norm: Tensor) -> None:
        for master, part in zip(self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True):
            master.grad = part.to(master.dtype)
        # torch's fused AdamW divides by grad_scale and leaves out the update where found_inf is set: clipping costs no
        # pass over the gradients and no synchronisation.
        adam: Any = self.optimizer
        adam.grad_scale = ((norm + CLIP_EPS) / self.clip_grad).clamp(min=1.0)
        adam.found_inf = torch.where(norm.isfinite(), 0.0, 1.0)
        adam.step()
        self._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def wait_for(self, parameters: Iterable[nn.Parameter]) -> None:
        """Wait until the weights of `parameters` are whole again."""
        for p in parameters:
            self._ready[id(p)].end_gather()

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until all weights are whole again."""
        for bucket in self._buckets:
            bucket.end_gather()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: `step` has."""


class _Bucket:
    """Groups whose gradients and weights travel together."""

    def __init__(self, optimizer: PipelineOptimizer, groups: list[int], reduce: torch.dtype) -> None:
        self.groups = groups
        self.held_back = False
        self._optimizer = optimizer
        self._process_group = optimizer.dp_process_group
        self._ranks = dist.get_world_size(self._process_group)
        self._rank = dist.get_rank(self._process_group)
        self._dtype = reduce
        self._parameters = sum(len(optimizer.bf16_groups[i]) for i in groups)
        self._left = self._parameters
        self._reduction: Wait | None = None
        self._reduced = False
        self._gather: Wait | None = None

    def count_down(self) -> None:
        self._left -= 1
        if self._left == 0 and not self.held_back:
            self.start_reduction()

    def start_reduction(self) -> None:
        if self._reduced or self._ranks == 1:
            return
        self._reduced = True
        flats = [self._optimizer.fp32_groups_gradients_flat[i].view(self._ranks, -1) for i in self.groups]
        parts = [self._optimizer.fp32_groups_gradient_flat_partition[i] for i in self.groups]
        if len(flats) == 1:
            self._reduction = start_reduce_scatter(
                flats[0], parts[0], self._process_group, self._dtype, self._optimizer.trace
            )
            return
        whole = torch.cat(flats, 1)
        own = whole.new_empty(whole.shape[1])
        wait = start_reduce_scatter(whole, own, self._process_group, self._dtype, self._optimizer.trace)

        def spread() -> None:
            wait()
            for part, piece in zip(parts, own.split([len(p) for p in parts]), strict=True):
                part.copy_(piece)

        self._reduction = spread

    def end_reduction(self) -> None:
        if self._reduction:
            self._reduction()
        self._reduction, self._reduced, self._left = None, False, self._parameters

    def start_gather(self) -> None:
        parts = [self._optimizer.bf16_partitioned_groups[i][self._rank] for i in self.groups]
        masters = [self._optimizer.fp32_groups_flat_partition[i] for i in self.groups]
        for part, master in zip(parts, masters, strict=True):
            if part.dtype != master.dtype:
                part.copy_(master)
        if self._ranks == 1:
            return
        flats = [self._optimizer.bf16_groups_flat[i].view(self._ranks, -1) for i in self.groups]
        if len(flats) == 1:
            self._gather = start_all_gather(flats[0], parts[0], self._process_group, self._optimizer.trace)
            return
        own = torch.cat(parts)
        whole = own.new_empty(self._ranks, len(own))
        wait = start_all_gather(whole, own, self._process_group, self._optimizer.trace)

        def spread() -> None:
            wait()
            for flat, piece in zip(flats, whole.split([len(p) for p in parts], 1), strict=True):
                flat.copy_(piece)

        self._gather = spread

    def end_gather(self) -> None:
        if self._gather:
            begin = self._optimizer.trace.mark()
            self._gather()
            self._gather = None
            self._optimizer.trace.add("wait weights", begin)
