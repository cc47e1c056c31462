"""The programs of published runs, by what the rows state of models and kernels (docs/calibration/README.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from llama_ds.perf.plan.kernel_speeds import FLASH_1, FLASH_2
from llama_ds.perf.plan.program import (
    AUTOGRAD,
    FSDP,
    LLAMA,
    MEGATRON,
    MEGATRON_BF16,
    MEGATRON_LM,
    MEGATRON_LM_BF16,
    NEMO,
    NEMO_GPT,
    NEOX,
    ZERO3_2021,
    Program,
)
from llama_ds.perf.plan.program_options import (
    with_attention,
    with_bf16_optimizer,
    with_bf16_reduction,
    with_bf16_states,
    with_biases,
    with_broadcasts,
    with_cast_norms,
    with_copies,
    with_deepspeed,
    with_fused_head,
    with_fused_loss,
    with_fused_optimizer,
    with_fused_swiglu,
    with_gradient_buffers,
    with_host_mask,
    with_megatron,
    with_megatron_deepspeed,
    with_own_sums,
    with_plain_norms,
    with_plain_optimizer,
    with_plain_rotation,
    with_recomputed_norms,
    with_recomputed_swiglu,
    with_separate_gate,
    with_separate_products,
    with_small_gradients,
    with_small_logits,
    with_sums_beside_weights,
    with_transformers,
    with_waiting_reduction,
    with_zeroed_gradients,
    without_flash,
)

_FLASH = re.compile(r"flash[-_ ]?(?:att(?:entio)?n)?[-_ ]?(?:v|version )?([12])\b", re.IGNORECASE)
_PLAIN = re.compile(  # beside RMSNorm
    r"\b(?:without|no)(?: an?| the)?(?: fused)?(?: kernel for)? rms|by torch|by operations|unfused|not fused"
)
_SWIGLU = re.compile(r"\bswiglu\b(?! by operations)")  # beside a kernel
_SCORES = re.compile(r"\b(?:torch|megatron)\b(?!-)")  # beside attention or a kernel
_NOT_COMPILED = re.compile(r"\b(?:no|without)(?: an?)? (?:torch\.)?compile")
_OVERLAPPING = ("nanotron", "fsdp", "hsdp", "titan", "compile", "reduction beside the backward")
_STATED: Mapping[str, Callable[[Program], Program]] = {  # words of a note in lower case, for LLaMA-like programs
    "gradients in bf16": with_small_gradients,
    "gradients in fp16": with_small_gradients,
    "weights and states in bf16": with_bf16_states,
    "fused adamw": with_fused_optimizer,
    "rmsnorm, of fp32 copies": with_cast_norms,
    "by broadcasts of whole tensors": with_broadcasts,
    "rotary embedding by operations": with_plain_rotation,
    "rotary embedding too": with_plain_rotation,
    "transformer engine": with_fused_swiglu,
    "swiglu's result computed again": with_recomputed_swiglu,
    "nanotron": with_gradient_buffers,
    "megatron-": with_megatron,
    "deepspeed": with_deepspeed,
    "megatron-deepspeed": with_megatron_deepspeed,
    "bf16_optimizer": with_bf16_optimizer,
    "gradients zeroed before each backward": with_zeroed_gradients,
    "causal mask built by the host": with_host_mask,
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
    "loss of 16-bit logits": with_small_logits,
    "and biases": with_biases,
}


def program_of(row: dict[str, str]) -> Program:
    """Return the program of a row: for LLaMA-like models and others by the note, otherwise Megatron."""
    program = _program_of(row)
    stated = _FLASH.search(row["note"])
    kernel = {"1": FLASH_1, "2": FLASH_2}[stated[1]] if stated else program.attention
    return program if kernel == program.attention else with_attention(program, kernel)


def unstated(row: dict[str, str]) -> list[str]:
    """Return what is assumed of the kernels of a LLaMA-like program because the row's note does not state it."""
    note = row["note"].lower()
    if not _like_llama(row) or "nemo" in note:
        return []
    found, overlapping = [], _overlaps(note)
    if not (_FLASH.search(note) or _unfused_attention(note)):
        found.append("attention by FlashAttention-2")
    if "norm" not in note and "rms" not in note:
        found.append(f"norms {'in one kernel' if overlapping else 'by operations'}")
    if not overlapping and "overlap" not in note and "sharding stage" not in note:
        found.append("gradients reduced behind the last backward")
    return found


def _like_llama(row: dict[str, str]) -> bool:
    return any(name in row["model"].lower() for name in ("llama", "mistral", "smollm"))


def _overlaps(note: str) -> bool:
    stated = _NOT_COMPILED.sub("", note)
    return any(words in stated for words in _OVERLAPPING)


def _program_of(row: dict[str, str]) -> Program:
    note = row["note"].lower()
    if _like_llama(row):
        return _llama_program(note)
    if "neox" in note:
        return NEOX
    if "nemo" in note:
        return NEMO_GPT
    if "zero-3 of 2021" in note:
        return ZERO3_2021
    if "fsdp" in note or "flash" in note:
        return with_bf16_reduction(FSDP) if "gradients in bf16" in note or "bf16 pure" in note else FSDP
    if "deepspeed" in note or "BigScience" in row["source"]:
        return MEGATRON_BF16 if "bf16" in note else MEGATRON
    return MEGATRON_LM_BF16 if "bf16" in note else MEGATRON_LM


def _llama_program(note: str) -> Program:
    """Return a LLaMA-like program by what the note states of its norms, loss, reduction and attention."""
    if "nemo" in note:
        return NEMO
    overlapping = _overlaps(note)
    program = AUTOGRAD if overlapping else LLAMA
    of_norms = [clause for clause in re.split("[;,]", note) if "rms" in clause]
    if any(map(_PLAIN.search, of_norms)) or not (overlapping or of_norms):
        program = with_plain_norms(program)
    of_kernels = [clause for clause in note.split(";") if "kernel" in clause]
    if any(map(_SWIGLU.search, of_kernels)):
        program = with_fused_swiglu(program)
    for words, changed in _STATED.items():
        program = changed(program) if words in note else program
    of_loss = [clause for clause in of_kernels if "loss" in clause]
    if of_loss:  # last, because it replaces what those above say of the loss
        program = (with_fused_head if any("head" in clause for clause in of_loss) else with_fused_loss)(program)
    kernel = _unfused_attention(note)
    return without_flash(program, kernel == "megatron") if kernel else program


def _unfused_attention(note: str) -> str:
    """Return "torch" or "megatron", whose softmax is one kernel, if the attention is said to be theirs."""
    for clause in re.split("[;,]", note):
        named = _SCORES.search(clause)
        if named and ("attention" in clause or "kernel" in clause) and not re.search("flash|norm|rms", clause):
            return named[0]
    return ""
