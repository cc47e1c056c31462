"""The method of context parallelism of a run, and the row lengths that it can share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llama_ds.config.numbers import near_divisors, near_multiples
from llama_ds.errors import UserError, listed

if TYPE_CHECKING:
    from llama_ds.config.schema import RunConfig

RING, ALL_TO_ALL = "ring", "all_to_all"
CP_METHODS = ("auto", RING, ALL_TO_ALL)
# FLOPs of attention for each byte of keys and values that a ring passes on, above which a block's computation hides the
# message of the next: 60 percent of an A100's 312 TFLOP/s over 25 GB/s per GPU between nodes.
HIDING_INTENSITY = 7500
ELEMENT_BYTES = 2  # bf16


def cp_method(run: RunConfig) -> tuple[str, str]:
    """Return the run's method, and why; `auto` takes the ring unless its messages are too large to hide.

    The ring computes document masks by plain matrix products, so with these `auto` prefers all-to-alls.
    A rank with S tokens, H query heads and G key-value heads of size K computes 2 S^2 H K FLOPs on each block of a
    ring, and passes on 2 S G K elements meanwhile: S H / G FLOPs for each element.
    """
    cp, wanted = run.parallel.cp, run.parallel.cp_method
    if wanted != "auto":
        return wanted, "as parallel.cp_method says"
    heads = run.model.num_attention_heads // run.parallel.tp
    if heads % cp:
        return RING, f"parallel.cp = {cp} does not divide the {heads} query heads of a rank"
    if run.data.seq_len % cp:
        return RING, f"parallel.cp = {cp} does not divide rows of {run.data.seq_len} tokens"
    if run.data.document_mask:
        return ALL_TO_ALL, "with data.document_mask, kernels for documents of any length compute whole rows"
    tokens = run.data.seq_len // cp
    intensity = tokens * run.model.num_attention_heads / run.model.num_key_value_heads / ELEMENT_BYTES
    if run.data.seq_len % (2 * cp) or intensity < HIDING_INTENSITY:
        return ALL_TO_ALL, (
            f"a ring would compute {intensity:.0f} FLOPs for each byte that it passes on, too few to hide its messages "
            f"({HIDING_INTENSITY})"
        )
    return RING, f"it computes {intensity:.0f} FLOPs for each byte that it passes on, which hides its messages"


def row_multiple(run: RunConfig) -> int:
    """Return the divisor of the lengths of rows that the context- and sequence-parallel ranks of a run can share."""
    parallel = run.parallel
    tp = parallel.tp if parallel.sequence_parallel else 1
    if parallel.cp == 1:
        return tp
    return parallel.cp * math.lcm(2 if cp_method(run)[0] == RING else 1, tp)


def check_context_parallel(run: RunConfig) -> None:
    """Refuse rows and heads that the context-parallel ranks cannot share.

    Raises:
        UserError: the message names values that they can.
    """
    cp, tp = run.parallel.cp, run.parallel.tp
    if cp == 1:
        return
    (method, _), seq_len, multiple = cp_method(run), run.data.seq_len, row_multiple(run)
    heads = run.model.num_attention_heads // tp
    if method == ALL_TO_ALL and heads % cp:
        raise UserError(
            f"{run.path}: parallel.cp = {cp} with cp_method all_to_all does not divide the {heads} query heads of a "
            f"rank (model.num_attention_heads / tp); use {listed(near_divisors(heads, cp))}, or cp_method ring"
        )
    if seq_len % multiple:
        halves = "2 * " if method == RING else ""
        shards = " and sequence_parallel with parallel.tp = " + str(tp) if run.parallel.sequence_parallel else ""
        raise UserError(
            f"{run.path}: data.seq_len = {seq_len} is not a multiple of {multiple}, as {halves}parallel.cp = {cp} with "
            f"cp_method {method}{shards} needs; use {listed(near_multiples(multiple, seq_len, 2))}"
        )
