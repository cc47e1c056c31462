"""The hand-written backward on 2 and 4 real ranks: autograd's gradients, no repeated collective, no idle wait."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from llama_ds.layout.activation_memory import LayerWork
from tests import warm
from tests.parallel.manual_backward_worker import CASES, PLAIN, ROWS, Case, T

RECORDED = [case for case in CASES if not case.masked]
Results = dict[Case, dict[str, Any]]


def name_of(case: Case) -> str:
    options = (
        (case.sequence_parallel, "sequence"),
        (case.masked, "documents"),
        (case.chunks > 1, f"{case.chunks}chunks"),
        (case.deferred, "deferred"),
    )
    return "-".join([f"tp{case.tp}", case.policy, f"{case.groups}groups", *(word for on, word in options if on)])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Run all cases in one start of four processes."""
    out = tmp_path_factory.mktemp("manual_backward") / "results.json"
    done = warm.run("-m", "tests.parallel.manual_backward_worker", out, ranks=4)
    assert done.returncode == 0, done.stderr[-6000:]
    return {Case(**found["case"]): found for found in json.loads(out.read_text())}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradients_are_autograds_and_finite_differences(case: Case, results: Results) -> None:
    """Against autograd: float64 to 1e-10. Central differences of step 1e-6 are good to 1e-6."""
    found = results[case]
    assert found["worst"] < 1e-10
    assert found["slope"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", RECORDED, ids=name_of)
def test_saved_bytes_are_the_cost_tables(case: Case, results: Results) -> None:
    model = replace(PLAIN, num_key_value_heads=case.groups)
    work = LayerWork(model, T, ROWS, case.tp, case.sequence_parallel, element_bytes=4)
    assert results[case]["saved"] == work.saved_bytes(case.policy)


@pytest.mark.slow
@pytest.mark.parametrize("case", RECORDED, ids=name_of)
def test_no_policy_repeats_a_collective_but_full(case: Case, results: Results) -> None:
    events = results[case]["events"]
    cut = events.index("backward")
    issued = [Counter(e.split()[2] for e in part if e.startswith("issue")) for part in (events[:cut], events[cut:])]
    forward, backward = issued
    # Per layer: its two entries and two exits; two layers.
    each = 4 * case.chunks
    assert forward == ({"gather": each, "reduce": each} if case.sequence_parallel else {"reduce": each})
    again = case.policy == "full"  # all but the layer's last sum, which its backward does not need
    # Without sequence parallelism each rank has all tokens; a backward cuts them only if it defers weight gradients.
    cut_again = case.sequence_parallel or case.deferred
    wanted = Counter(reduce=(each if cut_again else 4) + each // 2 * again)
    if case.sequence_parallel:
        wanted += Counter(gather=each + each * again, norm=4)
    assert backward == wanted


def exposed(events: list[str]) -> list[str]:
    """Return the collectives, in order, that are waited for without a matrix product since they were issued."""
    found = []
    for begin, event in enumerate(events):
        if event.startswith("issue"):
            end = events.index(event.replace("issue", "wait", 1))
            if "product" not in events[begin:end]:
                found.append(event.split()[2])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in RECORDED if c.policy != "full" and not c.deferred], ids=name_of)
def test_each_wait_of_the_backward_is_filled_with_a_product(case: Case, results: Results) -> None:
    """Between the issue of a collective and its wait there is a matrix product of the weight gradients.

    The only exception is the gather of the last layer's gradient under policy none: no work precedes it.
    """
    events = results[case]["events"]
    unfilled = exposed(events[events.index("backward") + 1 :])
    assert set(unfilled) <= {"gather"} and len(unfilled) <= case.sequence_parallel * case.chunks


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in RECORDED if c.chunks > 1], ids=name_of)
def test_chunks_travel_while_others_are_multiplied(case: Case, results: Results) -> None:
    """What is left is at the ends: a layer's first gather and last sum, of one chunk in four each.

    In a backward that defers the weight gradients, where a layer issues the gathers of the one below, it is the stage's
    first gather, each layer's last sum, and that of the input norm's gradient, a vector.
    """
    events = results[case]["events"]
    cut, sequence = events.index("backward"), case.sequence_parallel
    assert exposed(events[:cut]) == (["gather", "reduce"] if sequence else ["reduce"]) * 2
    if case.deferred and case.policy != "full":
        assert exposed(events[cut:]) == (["gather", "reduce", "norm", "reduce", "norm"] if sequence else ["reduce"] * 2)
