"""The method of context parallelism of a run, and the row lengths that it can share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from llama_ds.config.numbers import near_divisors, near_multiples
from llama_ds.errors import UserError, listed

if TYPE_CHECKING:
    from llama_ds.config.schema import RunConfig

RING, ALL_TO_ALL, HIERARCHICAL = "ring", "all_to_all", "hierarchical"
CP_METHODS = ("auto", RING, ALL_TO_ALL, HIERARCHICAL)
# FLOPs of attention for each byte of keys and values that a ring passes on, above which a block's computation hides the
# message of the next: 60 percent of an A100's 312 TFLOP/s over 25 GB/s per GPU between nodes.
HIDING_INTENSITY = 7500
ELEMENT_BYTES = 2  # bf16
NODE_RANKS = 8  # ranks of a node where the hosts are not known, as in plans and dry runs


class CpSizes(NamedTuple):
    """How context-parallel ranks share rows: a ring of groups, whose ranks exchange tokens for heads.

    Ranks of a group are neighbours. The methods ring and all_to_all are those with groups of one rank, or one group.
    """

    ring: int = 1  # number of groups
    all_to_all: int = 1  # ranks of a group
    striped: bool = False  # groups hold every ring-th token of a row, not two chunks of it (`layout/row_cuts.py`)

    @property
    def ranks(self) -> int:
        """The number of ranks that share rows."""
        return self.ring * self.all_to_all

    @property
    def chunks(self) -> int:
        """The number of equal parts of a row that a ring's cut needs."""
        return 1 if self.ring == 1 else self.ring if self.striped else 2 * self.ring

    @property
    def method(self) -> str:
        """The value of parallel.cp_method that has these sizes."""
        if self.all_to_all == 1:
            return RING
        return ALL_TO_ALL if self.ring == 1 else HIERARCHICAL

    def words(self) -> str:
        """Return the method in words: "hierarchical (a ring of 2 groups of 4 ranks)"."""
        groups = f" (a ring of {self.ring} groups of {self.all_to_all} ranks)"
        return self.method + (groups if self.method == HIERARCHICAL else "")


WHOLE_ROWS = CpSizes()


def cp_sizes(run: RunConfig, node_ranks: int = NODE_RANKS) -> tuple[CpSizes, str]:
    """Return how the run's ranks share rows, and why; `node_ranks` of them have fast links between each other."""
    sizes, why = _sizes_of_method(run, node_ranks)
    return _cut(run, sizes), why


def _cut(run: RunConfig, sizes: CpSizes) -> CpSizes:
    """Return the sizes with the cut of rows: wherever documents begin, stripes give all ranks of a ring equal work."""
    return sizes._replace(striped=run.data.document_mask and sizes.ring > 1)


def _sizes_of_method(run: RunConfig, node_ranks: int) -> tuple[CpSizes, str]:
    parallel, cp = run.parallel, run.parallel.cp
    if parallel.cp_method == "auto":
        return _chosen_sizes(run, node_ranks)
    if parallel.cp_method == HIERARCHICAL and not parallel.cp_all_to_all:
        found = group_ranks(run, node_ranks) or group_ranks(run, cp * parallel.tp)
        why = "as parallel.cp_method says; groups are as large as heads and nodes allow"
        return CpSizes(cp // found, found) if found else CpSizes(cp), why
    inner = {RING: 1, ALL_TO_ALL: cp, HIERARCHICAL: parallel.cp_all_to_all}[parallel.cp_method]
    return CpSizes(cp // inner, inner), "as parallel.cp_method says"


def _chosen_sizes(run: RunConfig, node_ranks: int) -> tuple[CpSizes, str]:
    """Choose by rule: a ring if its messages can hide, else all-to-alls, between nodes only if a ring needs them too.

    With document masks a ring's blocks are smaller, and hide less than it says of rows of one document.
    """
    cp, seq_len = run.parallel.cp, run.data.seq_len
    heads = run.model.num_attention_heads // run.parallel.tp
    ring, group = CpSizes(cp, 1), group_ranks(run, node_ranks) if cp * run.parallel.tp > node_ranks else 0
    grouped = CpSizes(cp // group, group) if group else ring
    intensity = _intensity(run, ring)
    hidden = seq_len % _cut(run, ring).chunks == 0 and intensity >= HIDING_INTENSITY
    nodes = f"{group} ranks of a node exchange heads, and the ring of these groups"
    grouped_words = f"{nodes} computes {_intensity(run, grouped):.0f} FLOPs for each byte that it passes on"
    if heads % cp or seq_len % cp:
        what = f"rows of {seq_len} tokens" if heads % cp == 0 else f"the {heads} query heads of a rank"
        why = f"parallel.cp = {cp} does not divide {what}"
        return (grouped, f"{why}; {grouped_words}") if group and not hidden else (ring, why)
    if run.data.document_mask:
        return CpSizes(1, cp), "with data.document_mask, kernels for documents of any length compute whole rows"
    if hidden:
        return ring, f"it computes {intensity:.0f} FLOPs for each byte that it passes on, which hides its messages"
    why = f"a ring would compute {intensity:.0f} FLOPs for each byte that it passes on, too few to hide its messages"
    if group and _intensity(run, grouped) >= HIDING_INTENSITY:
        return grouped, f"{why}; {grouped_words}"
    return CpSizes(1, cp), f"{why} ({HIDING_INTENSITY})"


def _intensity(run: RunConfig, sizes: CpSizes) -> float:
    """Return the FLOPs of attention for each byte that a ring passes on.

    A group with L tokens, and H query and G key-value heads of size K on a rank, computes 2 L^2 H K FLOPs on each block
    of a ring, and passes on 2 L G K elements meanwhile: L H / G FLOPs for each element.
    """
    tp = run.parallel.tp
    tokens, heads = run.data.seq_len // sizes.ring, run.model.num_attention_heads / tp
    return tokens * heads / math.lcm(max(1, run.model.num_key_value_heads // tp), sizes.all_to_all) / ELEMENT_BYTES


def group_ranks(run: RunConfig, node_ranks: int) -> int:
    """Return the size of groups of a ring: the most ranks of a node, below cp, that can exchange heads; 0 for none."""
    cp, tp = run.parallel.cp, run.parallel.tp
    heads = run.model.num_attention_heads // tp

    def fits(group: int) -> bool:
        divides = cp % group == heads % group == node_ranks % (group * tp) == 0
        return divides and run.data.seq_len % _multiple(run, CpSizes(cp // group, group)) == 0

    return next((group for group in range(cp - 1, 1, -1) if fits(group)), 0)


def row_multiple(run: RunConfig) -> int:
    """Return the divisor of the lengths of rows that the context- and sequence-parallel ranks of a run can share."""
    return _multiple(run, cp_sizes(run)[0] if run.parallel.cp > 1 else WHOLE_ROWS)


def _multiple(run: RunConfig, sizes: CpSizes) -> int:
    tp = run.parallel.tp if run.parallel.sequence_parallel else 1
    return math.lcm(_cut(run, sizes).chunks, sizes.ranks * tp)


def check_context_parallel(run: RunConfig) -> None:
    """Refuse rows and heads that the context-parallel ranks cannot share.

    Raises:
        UserError: the message names values that they can.
    """
    cp, tp = run.parallel.cp, run.parallel.tp
    if cp == 1:
        return
    sizes, seq_len, wanted = cp_sizes(run)[0], run.data.seq_len, run.parallel.cp_method
    heads = run.model.num_attention_heads // tp
    if wanted == ALL_TO_ALL and heads % cp:
        raise UserError(
            f"{run.path}: parallel.cp = {cp} with cp_method all_to_all does not divide the {heads} query heads of a "
            f"rank (model.num_attention_heads / tp); use {listed(near_divisors(heads, cp))}, or cp_method ring"
        )
    if wanted == HIERARCHICAL:
        _check_groups(run, sizes, heads)
    if seq_len % _multiple(run, sizes):
        multiple = _multiple(run, sizes)
        halves = "2 * " if sizes.method == RING and not sizes.striped else ""
        shards = " and sequence_parallel with parallel.tp = " + str(tp) if run.parallel.sequence_parallel else ""
        raise UserError(
            f"{run.path}: data.seq_len = {seq_len} is not a multiple of {multiple}, as {halves}parallel.cp = {cp} with "
            f"cp_method {sizes.words()}{shards} needs; use {listed(near_multiples(multiple, seq_len, 2))}"
        )


def _check_groups(run: RunConfig, sizes: CpSizes, heads: int) -> None:
    cp, wanted = run.parallel.cp, run.parallel.cp_all_to_all
    fitting = [group for group in range(2, cp) if cp % group == heads % group == 0]
    if not fitting:
        raise UserError(
            f"{run.path}: parallel.cp_method = hierarchical: no number of ranks from 2 to below parallel.cp = {cp} "
            f"divides cp and the {heads} query heads of a rank (model.num_attention_heads / tp); use cp_method ring"
        )
    if wanted and wanted not in fitting:
        raise UserError(
            f"{run.path}: parallel.cp_all_to_all = {wanted} does not divide parallel.cp = {cp} and the {heads} query "
            f"heads of a rank (model.num_attention_heads / tp) into groups; use {listed(fitting)}"
        )
    if sizes.all_to_all == 1:  # no group fits the length of rows
        multiples = {_multiple(run, CpSizes(cp // group, group)) for group in fitting}
        near = {at for multiple in multiples for at in near_multiples(multiple, run.data.seq_len, 2)}
        raise UserError(
            f"{run.path}: data.seq_len = {run.data.seq_len} is not a multiple of {listed(sorted(multiples))}, as "
            f"parallel.cp = {cp} with cp_method hierarchical needs; use {listed(sorted(near))}"
        )
