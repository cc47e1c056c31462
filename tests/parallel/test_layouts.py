"""Every layout trains the same model: losses and global gradient norms equal plain torch's, step by step.

Some steps, and the evaluation, have rows with filler, which is no label on any rank.

Tolerances, relative: fp32 1e-5, where layouts differ only in the order of sums (measured: below 3e-7). bf16 is judged
against the fp32 reference: its 8-bit mantissa rounds by up to 2^-9 = 2e-3 per operation, which averages out in the loss
of 256 tokens (allowed 3e-3, measured 8e-4) and less in the norm (allowed 2e-2, measured 6e-3).

Products in float8 make the rounding of their inputs visible, and the optimizer spreads it, so they take two steps: the
second is the first with delayed scales. In fp32 all numbers agree to 6e-6 (updates) or better as long as no element is
so near to a tie that it is rounded apart; one that is, by 2^-4 of itself, changes the loss by 2e-5 and norms by 7e-3
(measured with weights changed by 6e-8). In bf16 elements differ by 2^-9 from the fp32 reference before they are rounded
to steps of 2^-4, so that one in thirty is rounded apart: errors are those of float8 itself (measured 6e-2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.parallel.drawn_layouts import drawn_layouts
from tests.parallel.layout_cases import STEPS, Case
from tests.parallel.layout_histories import History, check_equals_plain, histories_of, near, reference_of, sensitivity

# In float8 a tie may be decided by the order of a sum, which depends on the processor: `sensitivity` has what that
# changes, up to 4e-4 of the first loss and 1e-3 of the second. Norms of single weights depend on it by a tenth.
TOLERANCE = {"fp32": (1e-5, 1e-5), "bf16": (3e-3, 3e-2), "fp32 fp8": (1e-5, 1e-1), "bf16 fp8": (3e-3, 1e-1)}

BASIC_LAYOUTS = [
    Case(1, 1, 1, zero=0),
    Case(1, 1, 2, zero=1),
    Case(1, 1, 2, zero=2),
    Case(1, 1, 2, zero=3),
    Case(2, 1, 1),
    Case(1, 2, 1, micro_batch=4),  # on few cores a collective costs more than what it carries
    Case(2, 2, 1, micro_batch=2),
    Case(2, 1, 2),
    Case(2, 2, 2),
    Case(4, 1, 1),
    Case(1, 4, 1, micro_batch=4),
]
OPTIONS = [
    Case(zero=3, tied=True),
    Case(zero=3, tied=True, decoder_layer="autograd", micro_batch=4),
    Case(zero=3, document_mask=True, micro_batch=4, dtype="bf16"),
    Case(1, 2, 1, zero=3, document_mask=True, micro_batch=4, sequence_parallel=True, recompute="full"),
    Case(1, 1, 2, zero=3, document_mask=True, decoder_layer="autograd", micro_batch=4),
    Case(zero=1, document_mask=True, recompute="full", micro_batch=4),
    Case(zero=0, recompute="full", decoder_layer="autograd"),
    Case(zero=1, dtype="bf16"),
    Case(zero=1, recompute="budget: 0.0002 GiB"),
    Case(1, 2, 1, zero=0, micro_batch=4, recompute="selective", tp_chunks=2),
    Case(1, 2, 1, zero=2, micro_batch=4, z_loss=1e-3, recompute="full"),
    Case(1, 2, 1, zero=3, micro_batch=4, sequence_parallel=True, tied=True),
    Case(2, 1, 1, tied=True, z_loss=1e-3),
    Case(2, 1, 1, document_mask=True, recompute="full", micro_batch=2),
    Case(2, 1, 1, dtype="bf16"),
    Case(2, 1, 1, partition=(1, 3), recompute="selective,none"),
    Case(2, 2, 1, sequence_parallel=True, tied=True, document_mask=True, micro_batch=2, through_host=True),
    Case(2, 2, 1, sequence_parallel=True, dtype="bf16", recompute="full", decoder_layer="autograd", micro_batch=2),
    Case(1, 2, 2, zero=3, micro_batch=2, sequence_parallel=True, recompute="selective", tp_chunks=4),
    Case(1, 1, 2, zero=3, decoder_layer="autograd"),
    Case(1, 2, 2, zero=2, micro_batch=2, dtype="bf16"),
    Case(4, 1, 1, tied=True, micro_batch=2, recompute="selective"),
    Case(4, 2, 1, sequence_parallel=True, document_mask=True, recompute="full"),
    Case(2, 2, 2, sequence_parallel=True, tied=True, dtype="bf16", bf16_sums=1),
]
H1 = {"schedule": "zb_h1"}
INTERLEAVED = {"schedule": "interleaved", "virtual_stages": 2}
V = {"schedule": "dualpipe_v", "virtual_stages": 2}
ZB_V = {"schedule": "zb_v", "virtual_stages": 2}
PAIRS = ZB_V | {"joint_weight_gradients": 2}
STOCK = {"schedule": "deepspeed"}
SCHEDULES = [
    *(Case(2, 1, dp, **how) for dp in (1, 2) for how in (H1, INTERLEAVED, V)),
    *(Case(2, 2, dp, micro_batch=2 // dp, **how) for dp in (1, 2) for how in (H1, INTERLEAVED, V)),
    *(Case(4, 1, 1, layers=8, **how) for how in (H1, INTERLEAVED, V)),
    Case(4, 1, 2, layers=8, **INTERLEAVED),
    Case(2, 1, 1, **ZB_V),
    Case(2, 1, 2, layers=8, **ZB_V),
    Case(2, 2, 2, **ZB_V),
    *(Case(4, 1, 1, layers=8, schedule=name, virtual_stages=2) for name in ("zb_v", "v_half", "v_min")),
    *(Case(2, 1, dp, dtype=dtype, **STOCK) for dp, dtype in ((1, "fp32"), (2, "fp32"), (2, "bf16"))),
]
SCHEDULES_AND_OPTIONS = [
    Case(4, 1, 2, extra_warmup=1, **H1),
    Case(4, 2, 1, sequence_parallel=True, tp_chunks=4, **H1),
    Case(2, 2, 1, micro_batch=2, sequence_parallel=True, tp_chunks=4, muon="moonlight", **PAIRS),
    Case(2, 1, 1, layers=6, schedule="interleaved", virtual_stages=3, recompute="full"),
    Case(2, 1, 1, tied=True, document_mask=True, **H1),
    Case(2, 1, 2, tied=True, dtype="bf16", **H1),
    Case(2, 1, 1, tied=True, **INTERLEAVED),
    Case(2, 1, 2, tied=True, **V),
    Case(2, 1, 1, recompute="budget: 0.000281 GiB", **H1),
    Case(2, 1, 2, document_mask=True, recompute="selective", **V),
    Case(2, 1, 4, bf16_sums=2, **H1),
    Case(2, 1, 2, dtype="bf16", micro_batch=2, cp=2, cp_method="ring", bf16_sums=2, **H1),
    Case(2, 1, 2, decoder_layer="autograd", recompute="full", **INTERLEAVED),
    Case(2, 2, 1, sequence_parallel=True, recompute="full", dtype="bf16", micro_batch=2, **INTERLEAVED),
    Case(2, 2, 1, sequence_parallel=True, document_mask=True, recompute="none,full", micro_batch=2, tp_chunks=8, **H1),
    Case(2, 1, 1, partition=(1, 1, 1, 1), recompute="none,full,selective,none", **V),
    Case(2, 1, 2, tied=True, document_mask=True, dtype="bf16", recompute="none,full,selective,none", **ZB_V),
    # A head that takes long, more micro-batches in flight, fewer of them than twice the stages
    Case(4, 1, 1, layers=8, micro_batch=2, tied=True, extra_warmup=1, pass_times=(*(3, 4, 2) * 7, 9, 9, 2, 1), **ZB_V),
]
# Biases and norms of heads on every engine, with every ZeRO stage, schedule that defers gradients, and cut of theirs.
NEIGHBOURS = [
    Case(1, 1, 2, zero=3, recompute="full"),
    Case(1, 2, 1, zero=2, micro_batch=4, recompute="selective"),
    Case(2, 1, 1, **H1),
    Case(1, 2, 2, zero=3, micro_batch=2, sequence_parallel=True),
    Case(2, 2, 1, sequence_parallel=True, recompute="full", micro_batch=2, **H1),
    Case(2, 2, 1, sequence_parallel=True, decoder_layer="autograd", micro_batch=4),
    Case(2, 1, 2, dtype="bf16", **V),
]
# A vocabulary that tp does not divide. Padding in embedding and head must not show in any number.
ODD_VOCABULARY = [
    Case(1, 2, 1, zero=0, micro_batch=4),
    Case(1, 2, 1, zero=2, micro_batch=4, sequence_parallel=True, tied=True, z_loss=1e-3),
    Case(1, 2, 1, zero=3, micro_batch=4, sequence_parallel=True, tied=True, z_loss=1e-3),
    Case(1, 4, 1, micro_batch=4, decoder_layer="autograd", tied=True, z_loss=1e-3),
    Case(2, 2, 1, sequence_parallel=True, tied=True, z_loss=1e-3, **H1),
    Case(2, 2, 1, micro_batch=2, **STOCK),
    Case(1, 2, 2, zero=3, micro_batch=2, dtype="bf16"),
    Case(2, 2, 2, sequence_parallel=True, micro_batch=2, dtype="bf16"),
]
RING = {"cp": 2, "cp_method": "ring"}
ALL_TO_ALL = {"cp": 2, "cp_method": "all_to_all"}
CONTEXT_PARALLEL = [
    Case(1, 1, 1, zero=2, micro_batch=4, decoder_layer="autograd", tied=True, z_loss=1e-3, **RING),
    Case(1, 1, 1, zero=3, micro_batch=4, dtype="bf16", **ALL_TO_ALL),
    Case(2, 1, 1, micro_batch=4, cp=4, cp_method="hierarchical", document_mask=True),
    Case(1, 1, 2, zero=3, micro_batch=2, **RING),
    Case(2, 1, 1, micro_batch=4, schedule="zb_h1", tied=True, document_mask=True, recompute="selective", **RING,
         through_host=True),
    Case(2, 1, 1, micro_batch=4, schedule="interleaved", virtual_stages=2, **ALL_TO_ALL),
    Case(2, 1, 1, micro_batch=2, schedule="dualpipe_v", virtual_stages=2, recompute="none,full,selective,none",
         **RING, partition=(1, 1, 1, 1)),
    Case(2, 1, 1, micro_batch=4, schedule="deepspeed", **RING),
    Case(2, 2, 1, micro_batch=4, sequence_parallel=True, recompute="full", **RING),
    # two key-value heads on a rank, shared by four
    Case(1, 2, 1, micro_batch=4, sequence_parallel=True, tp_chunks=4, cp=4, cp_method="all_to_all"),
]  # fmt: skip
# Factors of muP: four times the base's width, heads four times as large.
MUP = [
    Case(1, 1, 2, zero=3),
    Case(1, 2, 1, zero=0, tied=True, micro_batch=4, sequence_parallel=True, recompute="full"),
    Case(2, 1, 1, neighbour=True, muon="moonlight", **STOCK),
    Case(2, 1, 1, tied=True, z_loss=1e-3, **H1),
    Case(2, 1, 2, dtype="bf16", joint_weight_gradients=2, **V),
]
# Updates before the norm. The norms of the first steps are 2.25, 2.31, 2.47, 1.66 and 1.81, with eight layers 3.35,
# 3.06, 3.13, 2.53 and 3.05. The second update (clip 2.3), or the third (clip 3.1), is undone; with 100 all from the
# second on stand. The reference clips likewise.
POST_VALIDATION = [
    Case(2, 1, 2, clip=2.3, post_validation=True, **ZB_V),
    Case(4, 1, 1, layers=8, clip=3.1, post_validation=True, **V),
    Case(2, 2, 1, clip=100.0, post_validation=True, **ZB_V),
    Case(2, 1, 1, clip=2.3, post_validation=True, document_mask=True, tied=True, recompute="full", **ZB_V),
    Case(4, 1, 1, layers=8, clip=3.1, post_validation=True, schedule="v_min", virtual_stages=2),
    Case(2, 1, 2, clip=100.0, post_validation=True, dtype="bf16", **ZB_V),
]
CURRENT = [
    Case(1, 2, 1, zero=2, micro_batch=4, sequence_parallel=True, recompute="selective"),
    Case(1, 2, 1, zero=0, micro_batch=4, neighbour=True, recompute="full"),
    Case(1, 1, 2, zero=3, micro_batch=2, **RING),
    Case(2, 1, 1, dtype="bf16", micro_batch=2, **ZB_V),
]
DELAYED = [
    Case(1, 2, 1, zero=2, micro_batch=4, sequence_parallel=True, tp_chunks=2, fp8_weight_gradients=True),
    Case(2, 2, 1, micro_batch=2, tp_chunks=2, fp8_weight_gradients=True, joint_weight_gradients=2, **H1),
    Case(2, 1, 1, dtype="bf16", micro_batch=2, **V),
    Case(2, 1, 1, micro_batch=4, **STOCK),
    Case(2, 2, 1, micro_batch=2, sequence_parallel=True, tp_chunks=2, fp8_weight_gradients=True, **PAIRS),
]
SEQUENCE_PARALLEL = [replace(case, sequence_parallel=True) for case in BASIC_LAYOUTS if case.tp > 1]
# Errors show in the first steps: every step is clipped, and Adam's moments enter from the second one on. On one rank
# basic layouts train all steps.
CASES = [replace(case, steps=STEPS if case.world == 1 else 5) for case in BASIC_LAYOUTS]
CASES += [replace(case, steps=3) for case in SCHEDULES + SEQUENCE_PARALLEL + OPTIONS + SCHEDULES_AND_OPTIONS]
CASES += [replace(case, steps=5) for case in POST_VALIDATION]
CASES += [replace(case, steps=3) for case in CONTEXT_PARALLEL]
CASES += [replace(case, steps=3, mup=8) for case in MUP]
CASES += [
    Case(micro_batch=8, zero=zero, document_mask=True, recompute=recompute, steps=3, **how)
    for zero, recompute, how in (
        (0, "full", RING),
        (1, "none", RING | {"cp": 4}),
        (1, "selective", {"cp": 4, "cp_method": "hierarchical"}),
    )
]
CASES += drawn_layouts(4, 1)
CASES += [
    Case(1, 2, 1, zero=2, micro_batch=4, sequence_parallel=True, tp_chunks=4, document_mask=True, steps=3, **RING)
]
CASES += [Case(1, 1, 2, micro_batch=4, zero=1, document_mask=True, steps=3, **RING)]
CASES += [replace(case, steps=3, neighbour=True) for case in NEIGHBOURS]
CASES += [replace(case, steps=3, vocab=97) for case in ODD_VOCABULARY]
CASES += [replace(case, steps=2, fp8="current") for case in CURRENT]
CASES += [replace(case, steps=2, fp8="delayed") for case in DELAYED]


@pytest.fixture(scope="module")
def history_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], History]:
    return histories_of(CASES, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_equals_plain_torch(case: Case, history_of: Callable[[Case], History]) -> None:
    dtype = "bf16" if case.bf16_sums else case.dtype
    found = history_of(case)
    check_equals_plain(case, found, TOLERANCE[dtype + " fp8" * (case.fp8 != "off")])
    if case.fp8 != "off" and dtype == "fp32":  # before the first update
        norm, spread = reference_of(case.reference)[0][1], sensitivity(case.reference)[0][1]
        assert found[0][0][1] == near(norm, 1e-5, spread)


@pytest.mark.slow
def test_reference_learns_and_clips() -> None:
    """The comparison means something: the loss falls, and every step is clipped, so a wrong norm would show."""
    history = reference_of(Case().reference)
    assert history[-1][0] < history[0][0] - 0.5
    assert all(norm > Case().run.optimizer.clip for _, norm, *_ in history)
