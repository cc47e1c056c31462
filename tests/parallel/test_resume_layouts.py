"""A checkpoint resumes under any layout, ZeRO stage, schedule and engine, and DeepSpeed's converter accepts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

import pytest
import torch

from llama_ds.checkpoint.manifest import WEIGHT, describe, name_of, read_tensors
from llama_ds.layout.optimizer_states import (
    ADAMW,
    COMPENSATION,
    EXP_AVG,
    EXP_AVG_SQ,
    LION,
    MASTER,
    MUON,
    OptimizerStates,
)
from llama_ds.layout.weights import weights
from tests import warm
from tests.parallel.layout_cases import STEPS, Case, train_reference
from tests.parallel.layout_histories import histories_of
from tests.parallel.reshard_memory_worker import LAYER_BYTES

Turns = Callable[[list[Case]], tuple[list[tuple[float, float]], Path]]

# pp, tp and dp differ between neighbours; both ZeRO stages.
LAYOUTS = [Case(2, 2, 2), Case(1, 1, 1, zero=3), Case(4, 1, 2), Case(1, 4, 1, zero=3)]
LAYOUTS = [replace(case, vocab=97) for case in LAYOUTS]  # each tp pads it differently
ENGINES = [
    Case(1, 1, 2, zero=0, tied=True),
    Case(2, 1, 1, schedule="interleaved", virtual_stages=2, tied=True),
    Case(1, 2, 1, zero=2, sequence_parallel=True, tied=True),
    Case(2, 1, 1, schedule="zb_h1", partition=(3, 1), tied=True),
    Case(1, 1, 2, zero=3, tied=True, hpz=2),
    Case(2, 1, 1, schedule="dualpipe_v", virtual_stages=2, tied=True),
    Case(2, 1, 1, schedule="deepspeed", tied=True),
    Case(1, 1, 1, zero=1, tied=True, cp=2, cp_method="ring"),
    Case(1, 2, 1, zero=0, tied=True),
    Case(2, 1, 1, schedule="zb_v", virtual_stages=2, tied=True),
]
ENGINES = [replace(case, vocab=97) for case in ENGINES]
NEIGHBOURS = [  # biases, norms of queries and keys: cut, replicated and deferred
    Case(1, 2, 1, zero=2, micro_batch=4, sequence_parallel=True, neighbour=True),
    Case(2, 1, 1, schedule="zb_h1", neighbour=True),
]
BF16 = [
    Case(2, 1, 2, dtype="bf16"),
    Case(1, 4, 1, dtype="bf16"),
    Case(1, 2, 2, zero=3, dtype="bf16"),
    Case(2, 2, 1, dtype="bf16", schedule="deepspeed"),
    Case(2, 1, 2),  # and into fp32
]
MUON_LAYOUTS = [Case(1, 1, 2), Case(1, 2, 1, zero=3), Case(2, 1, 1, schedule="zb_h1"), Case(1, 1, 2, zero=0)]
MUON_LAYOUTS = [replace(case, muon="jordan") for case in MUON_LAYOUTS]
LION_LAYOUTS = [Case(1, 2, 1, zero=3, lion=True), Case(2, 1, 1, schedule="zb_h1", lion=True)]
LOW_PRECISION = [
    Case(2, 1, 1, schedule="zb_h1", dtype="bf16", state_dtype="bf16", masters="bf16_kahan"),
    Case(1, 1, 2, dtype="bf16", state_dtype="bf16", masters="bf16_kahan"),
]

FP8 = [Case(2, 1, 1, schedule="zb_h1"), Case(1, 2, 1, zero=2, micro_batch=4, sequence_parallel=True)]
FP8 = [replace(case, fp8="delayed", fp8_weight_gradients=True) for case in FP8]


@pytest.fixture
def take(tmp_path: Path) -> Turns:
    """Return a function that trains through cases; it gives losses and norms of all steps, and the checkpoints."""

    def take(cases: list[Case]) -> tuple[list[tuple[float, float]], Path]:
        history, turn, share = [], 0, STEPS // len(cases)
        for world, group in groupby(cases, key=lambda case: case.world):
            these = list(group)
            (tmp_path / "cases.json").write_text(json.dumps([asdict(case) for case in these]))
            arguments = (tmp_path / "cases.json", tmp_path, turn, share, tmp_path / "out")
            succeed("-m", "tests.parallel.resume_worker", *arguments, ranks=world)
            history += json.loads((tmp_path / "out").read_text())
            turn += len(these)
        return history, tmp_path / "layouts" / "checkpoints"

    return take


@pytest.mark.slow
@pytest.mark.parametrize("cases", [LAYOUTS, ENGINES, NEIGHBOURS], ids=["layouts", "engines", "neighbours"])
def test_history_is_that_of_one_run(cases: list[Case], take: Turns, tmp_path: Path) -> None:
    """1e-5 relative: as in test_layouts.py, only the order of sums differs. The worker compares loaded bits exactly."""
    history, checkpoints = take(cases)
    reference = train_reference(cases[0].reference)
    assert len(history) == STEPS
    for step, (found, wanted) in enumerate(zip(history, reference, strict=True)):
        assert found == pytest.approx(wanted[:2], rel=1e-5), f"step {step}"
    for turn, case in enumerate(cases, 1):
        if case.zero and (case.world < 8 or turn == 1):
            check_universal(checkpoints / f"step_{turn * STEPS // len(cases):08d}", tmp_path / "universal" / str(turn))


@pytest.mark.slow
def test_a_run_in_float8_continues_with_its_scales(take: Turns) -> None:
    """The worker compares the scales exactly. Elements near ties are rounded apart, which grows in twenty steps."""
    history, _ = take(FP8)
    reference = train_reference(FP8[0].reference)
    assert [loss for loss, _ in history] == pytest.approx([loss for loss, *_ in reference], rel=1e-2)
    assert history[-1][0] < history[0][0] - 0.5


@pytest.mark.slow
def test_bf16_keeps_masters_and_moments_to_the_bit(take: Turns, tmp_path: Path) -> None:
    """The worker compares bits; the falling loss shows that training continued from the loaded state."""
    history, checkpoints = take(BF16)
    assert history[-1][0] < history[0][0] - 0.5
    check_universal(checkpoints / f"step_{STEPS:08d}", tmp_path / "universal")


@pytest.mark.slow
@pytest.mark.parametrize(("layouts", "states"), [(MUON_LAYOUTS, MUON), (LION_LAYOUTS, LION)], ids=["muon", "lion"])
def test_weights_have_the_states_of_their_role(
    layouts: list[Case], states: OptimizerStates, take: Turns, tmp_path: Path
) -> None:
    """Muon keeps no second moments for hidden matrices, Lion none. 20 steps over layouts are those of one run."""
    history, checkpoints = take(layouts)
    reference = train_reference(layouts[0].reference)
    for step, (found, wanted) in enumerate(zip(history, reference, strict=True)):
        assert found == pytest.approx(wanted[:2], rel=1e-5), f"step {step}"
    for turn, case in enumerate(layouts, 1):
        tag = str(checkpoints / f"step_{turn * STEPS // len(layouts):08d}")
        kinds = read_tensors(tag, describe(tag), (WEIGHT, *states.all_kinds()))
        assert list(kinds) == [*([] if case.zero == 3 else [WEIGHT]), *states.all_kinds()]
        for key, weight in weights(case.run.model):
            has = [kind for kind, tensors in kinds.items() if key in tensors]
            assert has == [kind for kind in kinds if kind in (WEIGHT, *states.kinds(weight.role))], key
        if turn == 1:
            check_universal(Path(tag), tmp_path / "universal", states)


@pytest.mark.slow
def test_bf16_states_are_kept_to_the_bit(take: Turns) -> None:
    """The worker compares bits; stored are the dtypes that the run keeps, so that nothing is rounded."""
    history, checkpoints = take(LOW_PRECISION)
    assert history[-1][0] < history[0][0] - 0.5
    tag = str(checkpoints / f"step_{STEPS:08d}")
    kinds = read_tensors(tag, describe(tag), describe(tag).states.all_kinds())
    dtypes = {kind: {tensor.dtype for tensor in tensors.values()} for kind, tensors in kinds.items()}
    assert dtypes == {MASTER: {torch.bfloat16}, EXP_AVG: {torch.bfloat16}, EXP_AVG_SQ: {torch.float32},
                      COMPENSATION: {torch.bfloat16}}  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_rounds_as_the_uninterrupted_one(take: Turns, tmp_path_factory: pytest.TempPathFactory) -> None:
    """To the bit: the random bits are a function of the step, and no state is rounded by saving it."""
    case = Case(1, 1, 1, dtype="bf16", state_dtype="bf16", masters="bf16_stochastic")
    history, _ = take([case, case])
    assert history == histories_of([case], tmp_path_factory)(case)[0]


@pytest.mark.slow
def test_resharding_takes_the_memory_of_a_layer_at_most(tmp_path: Path) -> None:
    """Memory beyond the engine's own, with a model of eight layers. From tp 2 to tp 1, columns are concatenated."""
    for tp, action in ((2, "save"), (1, "load")):
        succeed("-m", "tests.parallel.reshard_memory_worker", tmp_path, tp, action, ranks=tp)
    assert int((tmp_path / "growth").read_text()) < LAYER_BYTES


def succeed(*words: object, ranks: int = 0) -> None:
    done = warm.run(*words, ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def check_universal(tag: Path, universal: Path, states: OptimizerStates = ADAMW) -> None:
    """DeepSpeed's converter accepts the checkpoint and yields the same masters and moments."""
    options = ("--input_folder", tag, "--output_folder", universal)
    options += ("--num_extract_workers", "1", "--num_merge_workers", "1")
    succeed("-m", "deepspeed.checkpoint.ds_to_universal", *options)
    kinds = read_tensors(str(tag), describe(str(tag)), states.all_kinds())
    for kind, tensors in kinds.items():
        for key, ours in tensors.items():
            names = (name_of(key), f"layers.{name_of(key)}", f"tied_modules.embed.{key[1]}")
            (found,) = [file for name in names if (file := universal / "zero" / name / f"{kind}.pt").exists()]
            theirs = torch.load(found, weights_only=False)
            theirs = theirs["param"] if isinstance(theirs, dict) else theirs  # ZeRO-3's are tensors
            assert torch.equal(theirs.view(ours.shape), ours.whole()), f"{name_of(key)} {kind}"
