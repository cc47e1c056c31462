"""DeepSpeed's PipelineEngine driven by `llama_ds.schedules`: communication and recompute overlap with waits.

The engine, its grid, optimizer wrapper and checkpoints are DeepSpeed's; this rank's list of instructions determines
what a step does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from llama_ds.model.decoder import Ids, LayerContext
from llama_ds.model.key_value_cache import LayerCache
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.model.next_token import DecodePass, own_logits
from llama_ds.parallel.pipeline import LlamaPipeline
from llama_ds.parallel.pipeline_optimizer import PipelineOptimizer
from llama_ds.parallel.point_to_point import PipelineComm, Work, wait
from llama_ds.parallel.trace import Trace
from llama_ds.schedules import forward_only
from llama_ds.schedules.communication import Message, message_of, produced
from llama_ds.schedules.instructions import Instruction, Op
from llama_ds.schedules.joint_weights import shares_of, weight_groups
from llama_ds.schedules.leading import leading_forwards
from llama_ds.schedules.schedule import Schedule

CacheOf = Callable[[int], LayerCache]  # takes the number of a micro-batch
Batches = Iterator[tuple[Ids, Tensor]]  # ids and labels of this rank's tokens
Key = tuple[int, int]  # chunk, micro-batch


@contextmanager
def _unconnected() -> Iterator[None]:
    """Keep DeepSpeed's engine from sending its first messages: ours has groups of its own.

    NCCL would keep a communicator of each pair of ranks for them, and gloo cannot send them from a GPU.
    """
    before = p2p.send, p2p.recv
    p2p.send = p2p.recv = lambda tensor, stage: None
    try:
        yield
    finally:
        p2p.send, p2p.recv = before


class LlamaPipelineEngine(PipelineEngine):
    """The engine of one pipeline rank."""

    def __init__(
        self,
        module: LlamaPipeline,
        schedule: Schedule,
        context: LayerContext,
        rows: tuple[int, int],
        dtype: torch.dtype,
        optimizer: torch.optim.Optimizer | None,
        config: dict[str, Any],
        trace: Trace,
        first_apart: bool = False,
    ) -> None:
        """`rows` is (b rows of a micro-batch, T tokens of a row), `config` the merged DeepSpeed config. Collective.

        Without an optimizer the engine cannot train. `first_apart`: weight gradients of a step's first micro-batch are
        not computed together with others.
        """
        self._schedule, self._context, self._trace = schedule, context, trace
        self._rows, self._dtype = rows, dtype
        grid = module.mpu()
        with _unconnected():
            super().__init__(
                args=None,
                model=module,
                optimizer=optimizer,
                config=config,
                config_class=DeepSpeedConfig(config, grid),
                mpu=grid,
            )
        place = schedule.placement
        self._first, self._last = place.home(0), place.home(place.stages - 1)
        lists = [schedule.instructions(rank) for rank in range(schedule.ranks)]
        self._instructions = lists[self.stage_id]
        self._weight_groups = weight_groups(self._instructions, schedule.joint, first_apart)
        self._leading = leading_forwards(lists, place)[self.stage_id]
        self._comm = PipelineComm(self.grid.pipe_groups, place, self.device)
        self._posted: dict[tuple[str, int, int], Work] = {}  # kind, chunk, micro-batch
        self._local: dict[tuple[str, int, int], list[Tensor]] = {}  # messages between chunks of this rank, same keys
        self._live: dict[Key, tuple[Tensor | None, GradientEdge]] = {}  # input and output of a forward
        self._outgoing: dict[Instruction, list[Tensor]] = {}  # outputs by the send that follows
        self._batches: Batches = iter(())
        self._read: dict[int, tuple[Ids, Tensor]] = {}
        self._loss = torch.zeros((), device=self.device)
        self._passes: Sequence[DecodePass] = ()  # instead of micro-batches, while text is generated
        self._cache_of: CacheOf | None = None  # takes a micro-batch; None: rows are whole
        self._chosen: list[Tensor] = []  # next ids of each pass
        self.manual_layers = [[x for x in chunk if isinstance(x, ManualBackwardLayer)] for chunk in module.chunks]
        self._prepare_layers(module)

    def _prepare_layers(self, module: LlamaPipeline) -> None:
        optimizer = self.optimizer
        if optimizer is None:
            return
        for _, layer in module.numbered_layers():
            parameters = list(layer.parameters())
            layer.register_forward_pre_hook(lambda *_, own=parameters: optimizer.wait_for(own))
        tied = [weight for weight, _ in module.get_tied_weights_and_groups()]
        optimizer.hold_back(tied)
        for layers in self.manual_layers:
            for layer in layers[-1:]:
                layer.recomputes_early = layer.policy == "full"

    # DeepSpeed calls one of these two, depending on the dtype.
    def _configure_bf16_optimizer(self, optimizer: Any) -> PipelineOptimizer | None:
        if optimizer is None:
            return None
        _, accumulate = self.get_data_types()
        return PipelineOptimizer(optimizer, self, accumulate, self.communication_data_type, self._trace)

    _configure_zero_optimizer = _configure_bf16_optimizer

    def reads_data(self) -> bool:
        """Return whether this rank holds the first or the last stage."""
        return self.stage_id in (self._first[0], self._last[0])

    def train_step(self, batches: Batches, before_update: Callable[[], None] = lambda: None) -> Tensor:
        """Take one optimizer step; return (2,): the global batch's mean loss, the gradient norm before clipping.

        Collective; the host never waits for the device, except for the norm of an optimistic step, whose result is
        final after `optimizer.settle()`. `before_update` may set the step's learning rate: an earlier step's update may
        still have to be repeated while this one begins.
        """
        self.module.train()
        begin = self._trace.now()
        self._batches = batches
        self._loss.zero_()
        leading = self._leading.count if self.optimizer.unsettled else 0
        self._run(self._instructions[:leading])
        if not self.optimizer.settle():
            self._discard_leading()
            self._run([s for s in self._instructions[:leading] if s.op is not Op.POST_GRAD])  # still posted
        self._run(self._instructions[leading:])
        self._trace.doing, self._trace.waits = "the reduction of gradients and the optimizer's step", True
        self._reduce_tied()
        self.optimizer.reduce_rest()
        before_update()
        summary = self.optimizer.step(self._own_share_of_loss(self.micro_batches))
        begin_sends = self._trace.mark()
        self._comm.finish()
        self._trace.add("wait sends", begin_sends)
        self._trace.waits = False
        if self._trace.end_step(begin):
            self.optimizer.finish()  # otherwise the trace would miss the all-gather of the weights
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        self.micro_steps += self.micro_batches
        self._global_grad_norm = summary[1]
        return summary

    def _discard_leading(self) -> None:
        """Discard the forwards before the norm, and leave their channels without a message under way. Collective."""
        for step in self._leading.unsent:
            self._comm.send(self._message(step), self._empty_message("activation", step.micro_batch))
        for step in self._leading.unposted:
            self._post(step)
        for key in [key for key in self._posted if key[0] == "activation"]:
            wait(self._posted.pop(key))
        self._comm.finish()
        self._live.clear()
        self._local.clear()
        for layers in self.manual_layers:
            for layer in layers:
                layer.discard_forwards()

    @torch.no_grad()
    def mean_loss(
        self, batches: Batches, count: int, tokens: int | None = None, branches: CacheOf | None = None
    ) -> Tensor:
        """Return the mean loss over `count` micro-batches of every data-parallel rank. Collective.

        Args:
            tokens: of a row; None: those of training.
            branches: returns the branches of a micro-batch, on every stage; None: the rows are whole.
        """
        self._settle()
        self.module.eval()
        trained = self._rows
        self._rows, self._cache_of = (trained[0], tokens or trained[1]), branches
        try:
            with self._context.whole_rows() if branches else nullcontext():
                self._batches = batches
                self._loss.zero_()
                self._run(forward_only.instructions(self.stage_id, count, self._schedule.placement))
        finally:
            self._rows, self._cache_of = trained, None
        total = self._own_share_of_loss(count)
        dist.all_reduce(total)
        self._comm.finish()
        return total

    @torch.no_grad()
    def next_tokens(self, passes: Sequence[DecodePass]) -> list[Tensor]:
        """Return the next ids (B,) of every pass, on all ranks of the pipeline. Collective within the pipeline."""
        self._settle()
        self.module.eval()
        self._passes, self._cache_of = passes, lambda i: passes[i].cache
        self._chosen = [torch.zeros_like(one.last) for one in passes]
        instructions = forward_only.instructions(self.stage_id, len(passes), self._schedule.placement)
        try:
            with self._context.whole_rows():
                self._batches = ((one.ids, one.last) for one in passes)
                self._run(instructions)
        finally:
            self._passes, self._cache_of = (), None
        self._comm.finish()
        every = torch.cat(self._chosen)
        dist.broadcast(every, self.grid.stage_to_global(self._last[0]), group=self.grid.get_pipe_parallel_group())
        return list(every.split([len(one.last) for one in passes]))

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Save as DeepSpeed does, after the all-gather of all weights."""
        self.optimizer.finish()
        return super().save_checkpoint(*args, **kwargs)

    def destroy(self) -> None:
        """Finish all communication in flight before the process ends."""
        if self.optimizer is not None:
            self.optimizer.finish()
        super().destroy()

    def _settle(self) -> None:
        if self.optimizer is not None:
            self.optimizer.settle()

    def _run(self, instructions: Sequence[Instruction]) -> None:
        for step in instructions:
            self._trace.doing = step
            self._INSTRUCTION_MAP[step.op](self, step)

    def _own_share_of_loss(self, micro_batches: int) -> Tensor:
        """Return this rank's contribution to the global mean loss."""
        contributes = self.stage_id == self._last[0] and self.grid.get_slice_parallel_rank() == 0
        return self._loss / (micro_batches * self.dp_world_size) if contributes else torch.zeros_like(self._loss)

    def _batch(self, micro_batch: int, last_use: bool) -> tuple[Ids, Tensor]:
        while micro_batch not in self._read:
            # The first and the last stage read all micro-batches in order.
            begin = self._trace.mark()
            self._read[micro_batch] = next(self._batches)
            self._trace.add("wait data", begin)
        return self._read.pop(micro_batch) if last_use else self._read[micro_batch]

    def _forward(self, step: Instruction) -> None:
        chunk, i = step.chunk, step.micro_batch
        both_ends = self._first[0] == self._last[0]
        inputs: Any
        if (self.stage_id, chunk) == self._first:
            x, inputs = None, self._batch(i, last_use=not both_ends)[0]
        else:
            x, *rest = self._receive(step, "activation")
            x.requires_grad_(torch.is_grad_enabled())
            inputs = (x, *rest) if rest else x
        begin = self._trace.now()
        self.module.activate(chunk)
        with self._context.caches.using(self._cache_of(i) if self._cache_of else None):
            outputs = self.module(inputs)
        if (self.stage_id, chunk) == self._last:
            outputs = self._end(outputs, i)
        self._record("F", begin, step)
        leading, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
        if torch.is_grad_enabled():
            self._live[chunk, i] = x, get_gradient_edge(leading)
        if (self.stage_id, chunk) != self._last:
            self._deliver(step, [leading.detach(), *rest])

    def _end(self, head: tuple[Tensor, Tensor], micro_batch: int) -> Tensor:
        """Return the loss, or the next ids, of a micro-batch from its hidden states and the head's weight."""
        _, labels_or_last = self._batch(micro_batch, last_use=True)
        if self._passes:
            logits = own_logits(*head, labels_or_last, self._context)
            self._chosen[micro_batch] = self._passes[micro_batch].choose(logits)
            return self._chosen[micro_batch]
        loss = self.module.loss_fn(head, labels_or_last)
        self._loss += loss.detach()
        return loss

    def _backward(self, step: Instruction) -> None:
        chunk, i = step.chunk, step.micro_batch
        for layer in self.manual_layers[chunk][-1:]:
            if layer.recomputes_early:  # while the gradient is in flight
                begin = self._trace.now()
                layer.recompute_oldest()
                self._record("recompute", begin, step)
        if (self.stage_id, chunk) == self._last:
            # With this factor, the sum over micro-batches and ranks is the mean; nothing else divides.
            grad = torch.full_like(self._loss, 1 / (self.micro_batches * self.dp_world_size))
        else:
            (grad,) = self._receive(step, "grad")
        begin = self._trace.now()
        x, edge = self._live.pop((chunk, i))
        self.module.activate(chunk)  # DeepSpeed's checkpointing recomputes the active chunk
        self._context.weight_gradients.deferred = step.op is Op.INPUT_BACKWARD
        self.optimizer.final = i == self.micro_batches - 1
        torch.autograd.backward([edge], [grad])
        self.optimizer.final = False
        self._record(step.op.value, begin, step)
        if x is not None:
            assert x.grad is not None
            self._deliver(step, [x.grad])

    def _weight_backward(self, step: Instruction) -> None:
        layers = self.manual_layers[step.chunk][::-1]
        ends = step.micro_batch == self.micro_batches - 1
        shares = shares_of(len(layers), self._weight_groups[step])
        for i, share in enumerate(shares, step.micro_batch + 1 - len(shares)):  # a trace shows each micro-batch
            begin = self._trace.now()
            for layer, count, last in share:
                self.optimizer.final = ends and last
                layers[layer].run_deferred_wgrad(count)
            self._record("W", begin, step._replace(micro_batch=i))
        self.optimizer.final = False

    def _receive(self, step: Instruction, kind: str) -> list[Tensor]:
        key = kind, step.chunk, step.micro_batch
        if key in self._local:
            return self._local.pop(key)
        begin = self._trace.mark()
        self._trace.waits = True
        tensors = list(wait(self._posted.pop(key)))
        self._trace.waits = False
        self._record(f"wait {kind}", begin, step)
        return tensors

    def _deliver(self, step: Instruction, tensors: list[Tensor]) -> None:
        """Store a computation's output for the send that follows, or for the next stage if this rank holds it."""
        forward = step.op is Op.FORWARD
        if produced(step, self.stage_id, self._schedule.placement):
            op = Op.SEND_ACTIVATION if forward else Op.SEND_GRAD
            self._outgoing[step._replace(op=op)] = tensors
        else:
            stage = self._stage(step) + (1 if forward else -1)
            chunk = self._schedule.placement.home(stage)[1]
            self._local["activation" if forward else "grad", chunk, step.micro_batch] = tensors

    def _send(self, step: Instruction) -> None:
        tensors = [tensor.contiguous() for tensor in self._outgoing.pop(step)]
        message = self._message(step)
        begin = self._trace.mark()
        self._comm.send(message, tensors)
        size = sum(tensor.nbytes for tensor in tensors)
        self._trace.add(f"send {message.kind}", begin, message.into, step.micro_batch, size)

    def _post(self, step: Instruction) -> None:
        message = self._message(step)
        buffers = self._empty_message(message.kind, step.micro_batch)
        self._posted[message.kind, step.chunk, step.micro_batch] = self._comm.post(message, buffers)

    def _empty_message(self, kind: str, micro_batch: int) -> list[Tensor]:
        """Return uninitialised tensors for a message."""
        rows, tokens = self._passes[micro_batch].ids.shape if self._passes else self._rows
        tp, own = self._context.tp, tokens // self._context.cp.size
        own = own // tp.size if tp.sequence_parallel else own
        hidden = torch.empty(rows, own, self._context.model.hidden_size, dtype=self._dtype, device=self.device)
        buffers = [hidden]
        if kind == "activation" and self._context.document_mask and not self._cache_of:
            buffers.append(torch.empty(rows, tokens, dtype=torch.int32, device=self.device))
        return buffers

    def _reduce_tied(self) -> None:
        begin = self._trace.mark()
        for weight, group in self.module.get_tied_weights_and_groups():
            dist.all_reduce(weight._hp_grad, group=group)
        self._trace.add("wait tied", begin)

    def _message(self, step: Instruction) -> Message:
        return message_of(step, self.stage_id, self._schedule.placement)

    def _stage(self, step: Instruction) -> int:
        return self._schedule.placement.stage(self.stage_id, step.chunk)

    def _record(self, what: str, begin: Any, step: Instruction) -> None:
        self._trace.add(what, begin, self._stage(step), step.micro_batch)

    _INSTRUCTION_MAP: ClassVar[dict[Op, Callable[[Any, Instruction], None]]] = {
        Op.FORWARD: _forward,
        Op.BACKWARD: _backward,
        Op.INPUT_BACKWARD: _backward,
        Op.WEIGHT_BACKWARD: _weight_backward,
        Op.POST_ACTIVATION: _post,
        Op.POST_GRAD: _post,
        Op.SEND_ACTIVATION: _send,
        Op.SEND_GRAD: _send,
    }
