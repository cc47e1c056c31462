"""The self-test at a start: it names planted faults, and every legal run has one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from llama_ds.config.document_marks import LLAMA_MARKS, DocumentMarks
from llama_ds.config.row_stages import stage_runs
from llama_ds.config.rules import check
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.layout.flops import parameter_count
from llama_ds.layout.layout import Layout, model_axes, resolve_layout
from llama_ds.training.self_test.axes import options_off
from llama_ds.training.self_test.small_run import SmallRun, small_run, with_axes
from tests import warm
from tests.parallel.layout_cases import Case
from tests.parallel.test_layouts import CASES

RUN_FILES = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.yaml"))

# Fault, layout, and what the error must and must not say.
FAULTS: dict[int, list[tuple[str, Case, list[str], list[str]]]] = {
    2: [
        ("mask", Case(dp=2, document_mask=True, zero=2), ["in what each rank computes by itself",
         "One rank alone passes with data.document_mask=false."], ["along"]),
        ("tp", Case(tp=2, sequence_parallel=True, dtype="bf16"), ["The fault is along tp: ",
         "One rank alone passes."], []),
        ("pp", Case(pp=2), ["The fault is along pp: ", "One rank alone passes."], []),
        ("dp", Case(dp=2, zero=0), ["The fault is along dp: ", "One rank alone passes."], []),
        ("cp ring", Case(cp=2, cp_method="ring", document_mask=True), ["The fault is along cp: ",
         "One rank alone passes."], []),
        ("cp all_to_all", Case(cp=2, cp_method="all_to_all"), ["The fault is along cp: ", "One rank alone passes.",
         "passes with parallel.cp_method=ring"], []),
        ("muon", Case(dp=2, muon="moonlight", dtype="bf16"), ["The fault is along dp: ", "One rank alone passes.",
         "passes with optimizer.name=adamw"], []),
    ],
    4: [
        # dp alone has another reduction, that of DeepSpeed
        ("pp dp", Case(pp=2, dp=2, micro_batch=4), ["The fault is along pp and dp: ",
         "One rank alone, pp 2 alone and dp 2 alone pass."], []),
    ],
}  # fmt: skip


SOUND = [Case(dp=2, zero=3), Case(pp=2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """Return a function to what the ranks of a world found; all tests of a world share one start of its processes."""

    @cache
    def run(ranks: int) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(f"world{ranks}")
        request = {
            "faults": [(fault, asdict(case)) for fault, case, *_ in FAULTS[ranks]],
            "sound": [asdict(case) for case in SOUND if case.world == ranks],
        }
        (folder / "request.json").write_text(json.dumps(request))
        files = (folder / "request.json", folder, folder / "found.json")
        done = warm.run("-m", "tests.training.self_test_worker", *files, ranks=ranks, timeout_s=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return json.loads((folder / "found.json").read_text())

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "number"), [(n, i) for n, faults in FAULTS.items() for i in range(len(faults))],
    ids=[f"{fault} of {case.name}" for faults in FAULTS.values() for fault, case, *_ in faults],
)  # fmt: skip
def test_a_planted_fault_is_named(ranks: int, number: int, found: Callable[[int], dict[str, Any]]) -> None:
    _, case, wanted, unwanted = FAULTS[ranks][number]
    text = found(ranks)["outcomes"][number]
    assert text.startswith(f"self-test of {case.layout.words()}: the run would compute wrong numbers: "), text
    assert all(part in text for part in wanted) and not any(part in text for part in unwanted), text


@pytest.mark.slow
def test_it_leaves_no_tensor(found: Callable[[int], dict[str, Any]]) -> None:
    """The run needs the memory, and ZeRO-3 has cycles through C++ that Python does not collect."""
    assert found(2)["left"] == [0] * len(SOUND)


@pytest.mark.slow
def test_a_crash_of_the_test_itself_says_so(found: Callable[[int], dict[str, Any]]) -> None:
    (line,) = found(2)["crash"]
    assert "could not be finished (RuntimeError)" in line and "compute.self_test=off trains without it" in line


def variants(small: SmallRun) -> list[SmallRun]:
    """All tests that a search for the fault may make of a self-test."""
    axes = [axis for axis, size in small.layout.sizes._asdict().items() if size > 1]
    chosen = [some for n in range(len(axes) + 1) for some in combinations(axes, n)]
    alone = [with_axes(small, some) for some in chosen]
    return [small, *alone, *(variant for one in alone for _, variant in options_off(one))]


def runs() -> list[Any]:
    cases = {case.name: (case.run, case.layout) for case in CASES}
    for file in RUN_FILES:
        run = load_run(str(file))
        stages = stage_runs(run)
        world = 2 * math.lcm(*(model_axes(stage.parallel).replica for stage in stages))
        for number, stage in enumerate(stages):
            cases[f"{file.stem} {number}" if number else file.stem] = stage, resolve_layout(stage, world)
    return [pytest.param(*one, id=name) for name, one in cases.items()]


@pytest.mark.parametrize(("run", "layout"), runs())
def test_every_run_has_a_valid_self_test(run: RunConfig, layout: Layout) -> None:
    """The user's rules hold for the small run too, so that a legal run is never refused for the sake of its test."""
    if run.parallel.recompute.startswith("auto"):
        return
    for dtype in ("fp32", "bf16"):
        if dtype == "bf16" and run.zero_stage == 0:
            continue
        for marks in (LLAMA_MARKS, DocumentMarks(None, 0)):
            for small in variants(small_run(run, layout, dtype, marks)):
                check(small.run)
                assert resolve_layout(small.run, small.layout.world) == small.layout
                assert small.config["bf16"]["enabled"] == (dtype == "bf16")
                assert parameter_count(small.run.model) < 20e6
