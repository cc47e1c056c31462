"""The programs of published runs, by what the rows state of models and kernels (docs/calibration/README.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llama_ds.perf.plan.kernel_speeds import FLASH_1, FLASH_2
from llama_ds.perf.plan.program import (
    AUTOGRAD,
    FSDP,
    LLAMA,
    MEGATRON,
    MEGATRON_BF16,
    NEMO,
    NEMO_GPT,
    NEOX,
    ZERO3_2021,
    Program,
)
from llama_ds.perf.plan.program_options import (
    with_attention,
    with_bf16_reduction,
    with_bf16_states,
    with_biases,
    with_broadcasts,
    with_cast_norms,
    with_copies,
    with_deepspeed,
    with_fused_loss,
    with_fused_swiglu,
    with_megatron_vocabulary,
    with_own_sums,
    with_plain_norms,
    with_plain_optimizer,
    with_plain_rotation,
    with_recomputed_norms,
    with_separate_gate,
    with_separate_products,
    with_small_gradients,
    with_sums_beside_weights,
    with_transformers,
    with_waiting_reduction,
    without_flash,
)

_OVERLAPPING = ("nanotron", "fsdp", "hsdp", "titan", "compile", "reduction beside the backward")
_STATED: Mapping[str, Callable[[Program], Program]] = {  # words of a note in lower case, for LLaMA-like programs
    "gradients in bf16": with_small_gradients,
    "gradients in fp16": with_small_gradients,
    "weights and states in bf16": with_bf16_states,
    "rmsnorm, of fp32 copies": with_cast_norms,
    "by broadcasts of whole tensors": with_broadcasts,
    "rotary embedding by operations": with_plain_rotation,
    "rotary embedding too": with_plain_rotation,
    "transformer engine": with_fused_swiglu,
    "megatron-": with_megatron_vocabulary,
    "deepspeed": with_deepspeed,
    "gate and up in separate products": with_separate_gate,
    "q, k, v, gate and up in separate products": with_separate_products,
    "transformers'": with_transformers,
    "keys and values repeated to all heads": lambda program: with_copies(program, 4, 4),
    "keys and values repeated before rotation": lambda program: with_copies(program, 36, 46),
    "rows unpadded around attention": lambda program: with_copies(program, 18, 22),
    "each with its own sum of input gradients": with_own_sums,
    "each sum of input gradients beside a weight gradient": with_sums_beside_weights,
    "sharding stage 2": with_waiting_reduction,
    "norms computed again in the backward": with_recomputed_norms,
    "adamw by operations": with_plain_optimizer,
    "and biases": with_biases,
}


def program_of(row: dict[str, str]) -> Program:
    """Return the program of a row: for LLaMA-like models and others by the note, otherwise Megatron."""
    program = _program_of(row)
    kernel = next((name for name in (FLASH_1, FLASH_2) if name in row["note"]), program.attention)
    return program if kernel == program.attention else with_attention(program, kernel)


def _program_of(row: dict[str, str]) -> Program:
    note, model = row["note"].lower(), row["model"].lower()
    if "llama" in model or "mistral" in model or "smollm" in model:
        return _llama_program(note)
    if "neox" in note:
        return NEOX
    if "nemo" in note:
        return NEMO_GPT
    if "zero-3 of 2021" in note:
        return ZERO3_2021
    if "fsdp" in note or "flash" in note:
        return with_bf16_reduction(FSDP) if "gradients in bf16" in note else FSDP
    return MEGATRON_BF16 if "bf16" in note else MEGATRON


def _llama_program(note: str) -> Program:
    """Return a LLaMA-like program by what the note states of its norms, loss, reduction and attention."""
    if "nemo" in note:
        return NEMO
    overlapping = any(words in note for words in _OVERLAPPING)
    program = AUTOGRAD if overlapping else LLAMA
    if "rmsnorm by torch" in note or not (overlapping or "rms" in note):
        program = with_plain_norms(program)
    if "kernel" in note and "loss" in note:
        program = with_fused_loss(program)
    for words, changed in _STATED.items():
        program = changed(program) if words in note else program
    for words, fused_softmax in (("torch attention", False), ("megatron attention", True)):
        if words in note:
            return without_flash(program, fused_softmax)
    return program
