"""DeepSpeed's BF16_Optimizer for the pipeline, with communication overlapped: gradients are reduce-scattered bucket by
bucket during the backward, and weights are all-gathered during the next forward.

A bucket is the optimizer group of one layer's matrices, or the groups of all norms, which are small. DeepSpeed flattens
every group and assigns one part to each data-parallel rank, so its checkpoints keep their format. Runs in fp32 use the
same code, with the weights themselves as masters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from llama_ds.layout.weights import weight_of
from llama_ds.parallel.clipping import CLIP_EPS, grad_scale
from llama_ds.parallel.data_parallel import NearFirst, Wait, start_all_gather, start_reduce_scatter
from llama_ds.parallel.muon import Muon
from llama_ds.parallel.optimistic_steps import OptimisticSteps
from llama_ds.parallel.trace import Trace


class PipelineOptimizer(BF16_Optimizer):
    """ZeRO-1 that issues its communication early and waits for it late.

    `gradient_added` is called for every accumulated gradient; `final` marks those of the last micro-batch.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, engine: Any, accumulate: torch.dtype, reduce: torch.dtype, trace: Trace
    ) -> None:
        super().__init__(
            optimizer,
            engine.param_names,
            # The only settings that BF16_Optimizer reads; gradients are accumulated in their buffers at once.
            bfloat16_config=SimpleNamespace(enabled=True, immediate_grad_update=True),
            mpu=engine.mpu,
            clip_grad=engine.gradient_clipping(),
            dp_process_group=engine.seq_data_parallel_group,
            timers=engine.timers,
            grad_acc_dtype=accumulate,
        )
        self.final = False
        self.trace = trace
        self.last_norm = math.inf  # the gradient norm that the host has read last, the same on all ranks
        self._near_first = engine.module.near_first
        self._advance: Wait = lambda: None  # the reduction that started last
        self._optimistic: OptimisticSteps | None = None
        self._bucket_of: dict[int, _Bucket] = {}  # buckets by id of the parameter
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
        """The groups under the name that DeepSpeed uses when it saves a run in fp32."""
        return self.bf16_groups

    def _is_counted(self, group: list[nn.Parameter]) -> bool:
        """Return whether this rank's gradients of a group enter the norm: replicated ones count once."""
        tp_rank = self.mpu.get_slice_parallel_rank()
        counted = {
            not getattr(p, "ds_pipe_replicated", False) and (tp_rank == 0 or getattr(p, "tensor_model_parallel", False))
            for p in group
        }
        assert len(counted) == 1, "all parameters of a group are replicated alike"
        return counted.pop()

    def _make_buckets(self, reduce: torch.dtype) -> list[_Bucket]:
        decays = [weight_of(self.param_names[group[0]]).decays for group in self.bf16_groups]
        # In the order in which the backward fills them: from the last layer on, norms and biases at the end.
        matrices = [[i] for i, is_matrix in enumerate(decays) if is_matrix]
        vectors = [i for i, is_matrix in enumerate(decays) if not is_matrix]
        buckets = [_Bucket(self, groups, reduce) for groups in [*reversed(matrices), vectors] if groups]
        for bucket in buckets:
            for i in bucket.groups:
                self._bucket_of.update({id(p): bucket for p in self.bf16_groups[i]})
        return buckets

    def gradient_added(self, parameter: nn.Parameter) -> None:
        """Count a micro-batch's accumulated gradient; the last one of a bucket starts its reduction."""
        if self.final:
            self._bucket_of[id(parameter)].count_down()

    def accumulate_hp_grads_and_remove_lp(self, lp_param: nn.Parameter, group_idx: int, param_idx: int) -> None:
        if lp_param.grad is None:  # the layer accumulates this matrix's gradient itself
            return
        super().accumulate_hp_grads_and_remove_lp(lp_param, group_idx, param_idx)
        self.gradient_added(lp_param)

    @torch.no_grad()
    def _update_hp_grad(self, lp: nn.Parameter, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """Add a gradient to its buffer. DeepSpeed would copy it to fp32 first, and the embedding's is large."""
        assert lp.grad is not None and not clear_lp_grads
        buffer = self.fp32_groups_gradients[group_idx][param_idx]
        buffer.add_(lp.grad.view(buffer.shape))
        lp._hp_grad = buffer  # type: ignore[attr-defined]
        self.fp32_groups_has_gradients[group_idx][param_idx] = True

    def start_reduction(self, whole: Tensor, own: Tensor, dtype: torch.dtype) -> Wait:
        """Start to sum `whole` (R, n) over data-parallel ranks into this rank's `own` (n); the call returned waits.

        Where neighbours add first, the next reduction sends their sums on: the layer before has taken as long.
        """
        if self._near_first is None:
            return start_reduce_scatter(whole, own, self.dp_process_group, dtype, self.trace)
        self._advance()
        found = NearFirst(whole, own, self._near_first, dtype, self.trace)
        self._advance = found.advance
        return found

    def hold_back(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave the buckets of `parameters` to `reduce_rest`, because they are reduced over stages first."""
        for p in parameters:
            self._bucket_of[id(p)].held_back = True

    def reduce_rest(self) -> None:
        """Start the reductions that have not started yet."""
        for bucket in self._buckets:
            bucket.start_reduction()

    @torch.no_grad()
    def step(self, loss: Tensor) -> Tensor:
        """Clip, update, start the all-gathers; return (sum of all ranks' `loss`, gradient norm before clipping).

        The device waits only for an all-reduce of two numbers; the host waits for nothing. If the norm is not finite,
        weights and moments stay unchanged. An optimistic step (`validate_later`) does not wait for the norm either: its
        result and update are final after `settle`.

        Muon's matrices are orthogonalised before the norm is known if the last one that was read needed no clipping,
        while other gradients and the norm travel. The host then waits for the norm, and they are done again if this
        one needs it.
        """
        self._advance()
        muon = self.optimizer if isinstance(self.optimizer, Muon) else None
        early = muon if self.last_norm + CLIP_EPS <= self.clip_grad else None
        for bucket in self._buckets:
            begin = self.trace.mark()
            bucket.end_reduction()
            self.trace.add("wait reduction", begin)
            if early:
                self._start_matrices(early, bucket.groups, None)
        begin = self.trace.mark()
        parts = self.fp32_groups_gradient_flat_partition
        norms = torch._foreach_norm([part for part, counts in zip(parts, self._counted, strict=True) if counts])
        square = torch.stack(norms).float().square().sum() if norms else loss.new_zeros(())
        summary = torch.stack([loss, square])
        self._global_grad_norm = summary[1]
        work = dist.all_reduce(summary, async_op=True)
        if self._optimistic and self._optimistic.expects_success():
            self.trace.add("wait norm", begin)
            begin = self.trace.mark()
            self._optimistic.begin(summary, work, self._states())
            self._update(torch.zeros_like(loss))
        else:
            if early:
                self.trace.add("optimizer", begin)
                early.finish()
                begin = self.trace.mark()
            work.wait()
            self.trace.add("wait norm", begin)
            norm = summary[1].sqrt_()
            if muon:
                self._finish_matrices(muon, norm, early is not None)
            begin = self.trace.mark()
            self._update(norm)
            self._zero_gradients()
            if self._optimistic:
                self._optimistic.certain(summary)
        self.trace.add("optimizer", begin)
        return summary

    def _start_matrices(self, muon: Muon, groups: list[int], scale: Tensor | None) -> None:
        begin = self.trace.mark()
        for i in groups:
            muon.start(self.fp32_groups_flat_partition[i], self.fp32_groups_gradient_flat_partition[i], scale)
        self.trace.add("optimizer", begin)

    def _finish_matrices(self, muon: Muon, norm: Tensor, early: bool) -> None:
        scale = grad_scale(norm, self.clip_grad)
        if early:
            self.last_norm = float(norm)
            unclipped = bool(scale == 1)
            muon.keep_started(unclipped)
            if unclipped:
                return
        for bucket in self._buckets:
            self._start_matrices(muon, bucket.groups, scale)
        muon.keep_started(True)

    def validate_later(self) -> None:
        """Let steps update before the norm is known, as long as those before them were not clipped."""
        self._optimistic = OptimisticSteps(self.clip_grad)

    @property
    def unsettled(self) -> bool:
        """Whether the last step's update awaits its norm."""
        return self._optimistic is not None and self._optimistic.pending

    @torch.no_grad()
    def settle(self) -> bool:
        """Await the norm of an optimistic step; return whether its update stands, else repeat it with the norm.

        The host waits. All ranks get the same answer. A repeated update is that of a step that waited, to the bit:
        masters and states are restored, and the gradients are still there.
        """
        if self._optimistic is None or not self._optimistic.pending:
            return True
        begin = self.trace.mark()
        summary, stands = self._optimistic.end()
        self.trace.add("wait norm", begin)
        begin = self.trace.mark()
        if not stands:
            self._end_gathers()
            self._optimistic.restore()
            self._update(summary[1])
        self._zero_gradients()
        self.trace.add("optimizer", begin)
        return stands

    def settle_next(self) -> None:
        """Let the next step wait for its norm."""
        self.settle()
        if self._optimistic:
            self._optimistic.doubt()

    def _states(self) -> list[Tensor]:
        """Return all tensors that an update changes, without the copies of the masters in the weights' dtype."""
        states = (
            state for master in self.fp32_groups_flat_partition for state in self.optimizer.state[master].values()
        )
        return [*self.fp32_groups_flat_partition, *(state for state in states if isinstance(state, Tensor))]

    def _zero_gradients(self) -> None:
        for flat in self.fp32_groups_gradients_flat:
            flat.zero_()

    def _update(self, norm: Tensor) -> None:
        """Update masters and weights with the gradients, clipped by their global `norm`, and start the all-gathers."""
        for master, part in zip(self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True):
            master.grad = part.to(torch.float32)
        # torch's fused AdamW divides by grad_scale and skips the update if found_inf is set: clipping needs neither a
        # pass over the gradients nor a synchronisation.
        adam: Any = self.optimizer
        adam.grad_scale = grad_scale(norm, self.clip_grad)
        adam.found_inf = torch.where(norm.isfinite(), 0.0, 1.0)
        adam.step()
        self._lazy_init_hp_params_optimizer_state()
        for bucket in reversed(self._buckets):  # norms first, which every layer needs, then layer by layer
            bucket.start_gather()

    @torch.no_grad()
    def wait_for(self, parameters: Iterable[nn.Parameter]) -> None:
        """Wait for the all-gather of `parameters`."""
        for p in parameters:
            self._bucket_of[id(p)].end_gather()

    @torch.no_grad()
    def finish(self) -> None:
        """Settle an optimistic step, and wait for the all-gather of all weights."""
        self.settle()
        self._end_gathers()

    def abandon(self) -> None:
        """Forget all communication in flight. Its connections are broken: to wait for it would raise once more."""
        self._advance, self._optimistic = lambda: None, None
        for bucket in self._buckets:
            bucket.abandon()

    def _end_gathers(self) -> None:
        for bucket in self._buckets:
            bucket.end_gather()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: `step` zeroes the gradients."""


class _Bucket:
    """Optimizer groups that share one reduce-scatter and one all-gather."""

    def __init__(self, optimizer: PipelineOptimizer, groups: list[int], reduce: torch.dtype) -> None:
        self.groups = groups
        self.held_back = False
        self._optimizer = optimizer
        self._process_group = optimizer.dp_process_group
        self._ranks = dist.get_world_size(self._process_group)
        self._rank = dist.get_rank(self._process_group)
        self._dtype = reduce
        self._count = sum(len(optimizer.bf16_groups[i]) for i in groups)
        self._remaining = self._count
        self._reduction: Wait | None = None
        self._reduced = False
        self._gather: Wait | None = None

    def count_down(self) -> None:
        self._remaining -= 1
        if self._remaining == 0 and not self.held_back:
            self.start_reduction()

    def start_reduction(self) -> None:
        if self._reduced or self._ranks == 1:
            return
        self._reduced = True
        flats = [self._optimizer.fp32_groups_gradients_flat[i].view(self._ranks, -1) for i in self.groups]
        parts = [self._optimizer.fp32_groups_gradient_flat_partition[i] for i in self.groups]
        if len(flats) == 1:
            self._reduction = self._optimizer.start_reduction(flats[0], parts[0], self._dtype)
            return
        whole = torch.cat(flats, 1)
        own = whole.new_empty(whole.shape[1])
        wait = self._optimizer.start_reduction(whole, own, self._dtype)

        def spread() -> None:
            wait()
            for part, piece in zip(parts, own.split([len(p) for p in parts]), strict=True):
                part.copy_(piece)

        self._reduction = spread

    def end_reduction(self) -> None:
        if self._reduction:
            self._reduction()
        self._reduction, self._reduced, self._remaining = None, False, self._count

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

    def abandon(self) -> None:
        self._reduction = self._gather = None
