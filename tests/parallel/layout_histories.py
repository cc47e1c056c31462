"""Trains layouts on ranks, and compares what they computed with plain torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest

from tests import warm
from tests.parallel.layout_cases import STEPS, Case, train_reference

# loss and gradient norm of each step; the validation loss after them; the last step's norms of every weight by kind
History = tuple[list[tuple[float, float]], float, dict[str, list[float]]]
reference_of = cache(train_reference)


@cache
def sensitivity(case: Case) -> list[tuple[float, float, float, dict[str, list[float]]]]:
    """Return by how much each number of the reference changes where the weights begin a rounding away.

    In float8, a rounding decides ties between two numbers 6 percent apart. Otherwise nothing does: zeros.
    """
    own = reference_of(case)
    runs = [train_reference(case, nudge) for nudge in range(1, 7)] if case.fp8 != "off" else [own]
    found = []
    for step, (loss, norm, after, norms) in enumerate(own):
        others = [run[step] for run in runs]
        single = (max(abs(other[n] - value) for other in others) for n, value in enumerate((loss, norm, after)))
        by_kind = {
            kind: [max(abs(other[3][kind][n] - value) for other in others) for n, value in enumerate(values)]
            for kind, values in norms.items()
        }
        found.append((*single, by_kind))
    return found


def histories_of(cases: Sequence[Case], folders: pytest.TempPathFactory) -> Callable[[Case], History]:
    """Return a function to the trained history of a case; all of one world size share one start of its processes."""

    @cache
    def trained(world: int) -> dict[Case, History] | str:
        folder = folders.mktemp(f"world{world}")
        own = [case for case in cases if case.world == world]
        (folder / "cases.json").write_text(json.dumps([asdict(case) for case in own]))
        files = (folder / "cases.json", folder / "histories.json")
        done = warm.run("-m", "tests.parallel.layout_worker", *files, ranks=world, timeout_s=600)
        if done.returncode:  # cached: otherwise every case would restart the processes
            return done.stdout[-2000:] + done.stderr[-6000:]
        return dict(zip(own, json.loads((folder / "histories.json").read_text()), strict=True))

    def history(case: Case) -> History:
        histories = trained(case.world)
        assert not isinstance(histories, str), histories
        return histories[case]

    return history


def check_equals_plain(case: Case, trained: History, tolerance: tuple[float, float]) -> None:
    """Check losses, gradient norms and norms of every weight, to relative tolerances, against one rank of plain torch.

    The tolerance of gradient norms is also that of the norms of every weight, but ten times as large for updates of two
    kinds: that of eight weights near 1 (norms of heads) is a difference of 1e-3 with their rounding of 6e-8 each, a
    tenth of it at the end of the schedule, and Muon enlarges small singular values together with their rounding.
    """
    (history, validation, norms), reference = trained, reference_of(case.reference)
    assert len(history) == case.steps <= len(reference)
    loss_tolerance, norm_tolerance = tolerance
    spread = sensitivity(case.reference)
    for step, ((loss, norm), (wanted_loss, wanted_norm, *_)) in enumerate(zip(history, reference, strict=False)):
        assert loss == near(wanted_loss, loss_tolerance, spread[step][0]), f"loss of step {step}"
        assert norm == near(wanted_norm, norm_tolerance, spread[step][1]), f"gradient norm of step {step}"
    assert validation == near(reference[case.steps - 1][2], loss_tolerance, spread[case.steps - 1][2])
    assert norms.keys() in (reference[0][3].keys(), {"weight"})  # bf16 masters make updates coarse
    for kind in norms:
        wanted = reference[case.steps - 1][3][kind]
        factor = 10 if kind == "update" and (case.neighbour or case.muon) else 1
        factor *= 10 if kind == "update" and case.neighbour and case.steps == STEPS else 1
        spreads = spread[case.steps - 1][3][kind]
        limits = [near(value, factor * norm_tolerance, change) for value, change in zip(wanted, spreads, strict=True)]
        assert norms[kind] == limits, f"{kind} norms"


def near(wanted: float, tolerance: float, spread: float) -> Any:
    """Return what equals `wanted` within a relative tolerance and four times what it depends on a rounding.

    `spread` is the largest of six changes; of 24 the largest loss changed by twice as much, and a layout rounds all
    activations otherwise, not only the first weights.
    """
    return pytest.approx(wanted, abs=tolerance * wanted + 4 * spread)
