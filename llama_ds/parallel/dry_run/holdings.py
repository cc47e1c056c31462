"""Sorts the memory that any engine holds into weights, gradients and optimizer state."""

from __future__ import annotations

from typing import Any

from llama_ds.layout.optimizer_states import OptimizerStates
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.parallel.dry_run.ledger import GRADIENTS, OPTIMIZER, OTHER, WEIGHTS, Ledger, within
from llama_ds.parallel.held_memory import gradient_tensors, gradients_of, optimizer_tensors, weight_tensors
from llama_ds.parallel.muon import Muon
from llama_ds.parallel.optimizer_state import begin_moments

MUON_CALLS = ("start", "finish", "keep_started", "step_matrices")  # all that Muon does for hidden matrices


def sort_holdings(engine: Any, ledger: Ledger, states: OptimizerStates) -> None:
    """Mark everything that DeepSpeed's `engine` holds before its first step with its category, moments included.

    Hooks mark what a step allocates: gradients once autograd has accumulated them, the inputs of deferred weight
    gradients as activations, and what Muon holds.
    """
    # Moments are allocated at the end of the first step and are present at the peak of every later step.
    begin_moments(engine, 0, states)
    ledger.mark(optimizer_tensors(engine), OPTIMIZER)
    ledger.mark(gradient_tensors(engine), GRADIENTS)
    # Mark weights last: in fp32 they are their own masters.
    ledger.mark(weight_tensors(engine), WEIGHTS)
    for parameter in engine.module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: ledger.mark(gradients_of(p), GRADIENTS))
    for layer in engine.module.modules():
        if isinstance(layer, ManualBackwardLayer):
            _watch_deferred_wgrad(layer, ledger)
    watch_matrices(engine, ledger)
    ledger.mark_rest(OTHER)


def watch_matrices(engine: Any, ledger: Ledger) -> None:
    """Let `ledger` count what the engine's optimizer allocates, if it is Muon, as matrices."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if isinstance(optimizer, Muon):
        for name in MUON_CALLS:
            setattr(optimizer, name, within(ledger.matrices, getattr(optimizer, name)))


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
