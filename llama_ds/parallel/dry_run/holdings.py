"""Sorts the memory that any engine holds into weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from llama_ds.layout.optimizer_states import OptimizerStates
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.parallel.dry_run.ledger import GRADIENTS, OPTIMIZER, OTHER, WEIGHTS, Ledger, tensors_in
from llama_ds.parallel.optimizer_state import begin_moments, fragments

# Attributes of BF16_Optimizer and of ZeRO 1 to 3 that hold buffers.
_GRADIENTS = ("fp32_groups_gradients_flat", "averaged_gradients", "grad_partitions_flat_buffer", "ipg_buffer")
_WEIGHTS = ("bf16_groups_flat", "bit16_groups_flat", "fp16_partitioned_groups_flat")


def sort_holdings(engine: Any, ledger: Ledger, states: OptimizerStates) -> None:
    """Mark everything that DeepSpeed's `engine` holds before its first step with its category, moments included.

    Hooks mark what a step allocates: gradients once autograd has accumulated them, and the inputs of deferred weight
    gradients as activations.
    """
    # Moments are allocated at the end of the first step and are present at the peak of every later step.
    begin_moments(engine, 0, states)
    for fragment in fragments(engine):
        ledger.mark(fragment.tensors.values(), OPTIMIZER)
    ledger.mark(_buffers(engine.optimizer, _GRADIENTS), GRADIENTS)
    # Mark weights last: in fp32 they are their own masters.
    ledger.mark(_buffers(engine.optimizer, _WEIGHTS), WEIGHTS)
    for parameter in engine.module.parameters():
        ledger.mark([parameter, *_partition(parameter)], WEIGHTS)
        parameter.register_post_accumulate_grad_hook(lambda p: ledger.mark(_grad(p), GRADIENTS))
    for layer in engine.module.modules():
        if isinstance(layer, ManualBackwardLayer):
            _watch_deferred_wgrad(layer, ledger)
    ledger.mark_rest(OTHER)


def parameter_counts(engine: Any) -> tuple[int, int]:
    """Return this rank's numbers of parameters that are sharded over tensor-parallel ranks, and replicated on them."""
    sharded = replicated = 0
    for parameter in engine.module.parameters():
        count = int(getattr(parameter, "ds_numel", parameter.numel()))  # under ZeRO-3 the parameter is empty
        if getattr(parameter, "ds_pipe_replicated", False):
            continue  # a tied table, counted by another stage
        if getattr(parameter, "tensor_model_parallel", False):
            sharded += count
        else:
            replicated += count
    return sharded, replicated


def _buffers(optimizer: Any, names: tuple[str, ...]) -> Iterator[Tensor]:
    for name in names:
        yield from tensors_in(getattr(optimizer, name, None))


def _partition(parameter: Any) -> list[Tensor]:
    return [parameter.ds_tensor] if hasattr(parameter, "ds_tensor") else []


def _grad(parameter: nn.Parameter) -> list[Tensor]:
    return [] if parameter.grad is None else [parameter.grad]


def _watch_deferred_wgrad(layer: ManualBackwardLayer, ledger: Ledger) -> None:
    end = layer.weight_grads.end_micro_batch

    def end_and_mark() -> None:
        before = len(layer.weight_grads)
        end()
        if len(layer.weight_grads) > before:
            for _, grad, x in layer.weight_grads._deferred[-1]:
                for tensor in (grad, x):
                    ledger.saved(tensor)

    layer.weight_grads.end_micro_batch = end_and_mark  # type: ignore[method-assign]
