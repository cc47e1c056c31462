"""Muon under every layout is plain Muon with whole matrices on one rank: losses and gradient norms of 20 steps.

1e-5 relative in fp32, as in test_layouts.py (measured: losses 3e-7, norms 2e-6, which do not grow with the steps). bf16
orthogonalises in bf16, with 2^-9 in each product: the bounds of test_layouts.py for losses hold, and gradient norms,
which follow the weights, get 4e-2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from llama_ds.config.schema import OptimizerConfig
from llama_ds.layout.matrix_owners import HeldMatrix, owners, waves
from llama_ds.parallel.muon import Muon, _Piece
from llama_ds.parallel.newton_schulz import orthogonalised
from llama_ds.training.self_test.plain_muon import newton_schulz
from tests.parallel.layout_cases import Case
from tests.parallel.layout_histories import History, check_equals_plain, histories_of

TOLERANCE = {"fp32": (1e-5, 1e-5), "bf16": (3e-3, 4e-2)}
TWO, V = {"layers": 2, "micro_batch": 4}, {"virtual_stages": 2, "micro_batch": 2, "clip": 2.3}
CASES = [  # one layout of each kind: every engine, ZeRO stage, axis and schedule
    Case(zero=0, **TWO),
    Case(zero=3, muon="jordan", **TWO),
    Case(1, 1, 2, zero=0, **TWO),
    Case(1, 1, 2, zero=1, **TWO),
    Case(1, 1, 2, zero=2, tied=True, **TWO),
    Case(1, 1, 1, zero=3, cp=2, cp_method="ring", **TWO),
    Case(1, 2, 1, sequence_parallel=True, muon="jordan", **TWO),
    Case(1, 2, 1, zero=3, tied=True, **TWO),
    Case(2, 1, 1, schedule="zb_h1", tied=True, **TWO),
    Case(2, 1, 1, dtype="bf16", **TWO),
    *(Case(2, 1, 1, schedule=name, **V) for name in ("interleaved", "zb_v", "v_min")),
    Case(1, 2, 2, zero=0, **TWO),
    Case(1, 2, 2, zero=3, sequence_parallel=True, **TWO),
    Case(2, 2, 1, sequence_parallel=True, muon="jordan", **TWO),
    Case(2, 1, 2, schedule="dualpipe_v", virtual_stages=2, tied=True, clip=100.0),  # never clipped
    Case(2, 1, 2, schedule="deepspeed", neighbour=True, **TWO),
    Case(2, 1, 2, schedule="zb_h1", micro_batch=2, partition=(3, 1), clip=2.3),  # some steps clipped
]
CASES = [replace(case, muon=case.muon or "moonlight") for case in CASES]


@pytest.fixture(scope="module")
def history_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], History]:
    return histories_of(CASES, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_equals_plain_muon(case: Case, history_of: Callable[[Case], History]) -> None:
    check_equals_plain(case, history_of(case), TOLERANCE[case.dtype])


def test_singular_values_become_about_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((32, 88), (88, 32), (16, 16)):
        matrix = torch.randn(shape, generator=generator)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        found = orthogonalised(matrix * 1e-4)
        assert torch.allclose(found, orthogonalised(matrix), rtol=1e-2, atol=1e-3), "its size does not count"
        kept = torch.diagonal(left.mT @ found @ right.mT)
        assert kept[values > 0.02 * values.max()].sub(1).abs().max() < 0.35
        assert (found - left @ torch.diag(kept) @ right).abs().max() < 1e-4, "singular vectors stay"


def test_a_step_with_gradients_that_are_not_finite_changes_nothing() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))
    settings = OptimizerConfig(lr=1e-2, warmup_steps=0, name="muon")
    muon = Muon([{"params": [weight], "weight_decay": 0.1, "muon": True}], settings, 0, torch.float32)
    matrix = HeldMatrix("1.mlp.up_proj.weight", (4, 6), 0, ((0, 24),))
    muon._pieces, muon._place = {id(weight): [_Piece(matrix, 0, 24)]}, (Case().layout, 0, None)
    muon._load = [0]
    history = []
    for gradient, infinite in ((torch.ones(4, 6), 0.0), (torch.full((4, 6), torch.nan), 1.0), (torch.ones(4, 6), 0.0)):
        weight.grad, muon.found_inf = gradient, torch.tensor(infinite)  # type: ignore[attr-defined]
        muon.step()
        state = muon.state[weight]
        history.append((weight.detach().clone(), state["exp_avg"].clone(), int(state["step"])))
    assert all(torch.equal(a, b) for a, b in zip(history[0][:2], history[1][:2], strict=True))
    assert [steps for *_, steps in history] == [1, 1, 2]
    assert history[2][0].isfinite().all() and not torch.equal(history[2][0], history[1][0])


def test_fewer_products_equal_the_iterations_in_double_precision() -> None:
    """fp32 iterates on X X^T and mirrors halves: 1e-5 of values up to 1.2, also where a gradient lacks directions."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, rank in ((256, 688, 256), (688, 256, 64), (257, 300, 257), (128, 256, 16)):
        left, right = (torch.randn(n, rank, generator=generator) for n in (rows, columns))
        matrix = left @ (right * torch.logspace(0, -3, rank)).T
        assert (orthogonalised(matrix) - newton_schulz(matrix.double())).abs().max() < 1e-5, (rows, columns)


def test_owners_share_the_cost_fairly() -> None:
    costs, load = [9, 1, 1, 1, 9, 3, 3, 3], [0, 0, 0]
    found = owners(costs, load)
    loads = [sum(cost for cost, owner in zip(costs, found, strict=True) if owner == rank) for rank in range(3)]
    assert sorted(loads) == sorted(load) == [10, 10, 10]
    assert owners([5, 5], [0]) == [0, 0]
    assert owners([7], [3, 1, 2]) == [1], "what ranks own already counts"


def test_waves_keep_all_ranks_busy() -> None:
    assert waves([0, 0, 1, 1, 1, 0, 1, 2], 2) == [[0, 1, 2, 3, 7], [4, 5, 6]], "halves of 3, 4 and 1 items"
    assert waves([0, 0], 4) == [[0], [1]], "no wave is empty"
