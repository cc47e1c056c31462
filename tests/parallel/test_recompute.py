"""Save policy of each layer: as set, per stage, or the cheapest that fits a budget."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from llama_ds.config.recompute import POLICIES
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.flops import layer_forward_flops
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.layout.optimizer_states import ADAMW, EXP_AVG
from llama_ds.layout.partition import stage_boundaries, stage_roles
from llama_ds.layout.rank_memory import layer_work, rank_memory
from llama_ds.layout.recompute import (
    GIB,
    USABLE,
    recomputed_flops_per_token,
    stage_policies,
    with_device_memory,
)
from llama_ds.layout.weights import Role

RUN_FILE = str(Path(__file__).resolve().parents[2] / "ds_configs" / "llama_65b.yaml")


def plan(*overrides: str) -> tuple[RunConfig, Layout]:
    run = load_run(RUN_FILE, overrides)
    return run, resolve_layout(run, 2048)


@pytest.mark.parametrize(("element_bytes", "each", "hidden"), [(2, 12, 8), (4, 8, 4)])
def test_the_optimizer_takes_the_bytes_of_each_weights_states(
    element_bytes: int, each: int, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, layout = plan()
    held = stage_roles(run.model, stage_boundaries(run), layout.tp)
    found = [memory.optimizer for memory in rank_memory(run, layout, element_bytes)]
    assert found == [each * by_role.total() // layout.dp for by_role in held]
    monkeypatch.setitem(ADAMW.moments, Role.HIDDEN_MATRIX, (EXP_AVG,))  # type: ignore[arg-type]
    assert [memory.optimizer for memory in rank_memory(run, layout, element_bytes)] == [
        (each * (by_role.total() - by_role[Role.HIDDEN_MATRIX]) + hidden * by_role[Role.HIDDEN_MATRIX]) // layout.dp
        for by_role in held
    ]


@pytest.mark.parametrize("text", ["selective", "none,none,none,none,full,full,full,selective"])
def test_policies_as_written(text: str) -> None:
    run, layout = plan(f"parallel.recompute={text}")
    wanted = text.split(",") if "," in text else [text] * 8
    found = stage_policies(run, layout, 2)
    assert [set(stage.policies) for stage in found] == [{policy} for policy in wanted]
    assert [stage.in_flight for stage in found] == [8, 7, 6, 5, 4, 3, 2, 1]  # 1F1B


def test_list_and_mapping_are_the_same_as_text(tmp_path: Path) -> None:
    run, _ = plan("parallel.recompute=[none,none,none,none,none,none,none,full]")
    assert run.parallel.recompute == "none,none,none,none,none,none,none,full"
    run, _ = plan("parallel.recompute={budget: 4.5 GiB}")
    assert run.parallel.recompute == "budget: 4.5 GiB"


@pytest.mark.parametrize("budget", [0.25, 0.6, 1.0, 1.4, 2.5, 100.0])
def test_budget_takes_the_cheapest_that_fits(budget: float) -> None:
    """Against all 3^4 choices of a stage of four layers."""
    run, layout = plan("model.num_hidden_layers=32", f"parallel.recompute={{budget: {budget} GiB}}", "parallel.tp=1",
                       "parallel.sequence_parallel=false", "parallel.pp=8", "data.seq_len=256")  # fmt: skip
    work = layer_work(run, layout, 2)
    for stage in stage_policies(run, layout, 2):

        def bytes_of(policies: tuple[str, ...], in_flight: int = stage.in_flight) -> int:
            return in_flight * sum(map(work.saved_bytes, policies))

        def flops_of(policies: tuple[str, ...]) -> float:
            return sum(map(work.recomputed_flops, policies))

        fitting = [choice for choice in product(POLICIES, repeat=4) if bytes_of(choice) <= budget * GIB]
        assert stage.saved_bytes == bytes_of(stage.policies) <= budget * GIB
        assert flops_of(stage.policies) == min(map(flops_of, fitting))


def test_budget_that_nothing_fits_is_refused_with_the_need() -> None:
    run, layout = plan("parallel.recompute={budget: 0.1 GiB}")
    with pytest.raises(UserError) as error:
        stage_policies(run, layout, 2)
    assert "pipeline rank 0 keeps 0.312 GiB under full recompute, above the 0.1 GiB that parallel.recompute" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("all", "'all' is not none, selective or full"),
        ("{budget: much}", "'budget: much' is not none"),
        ("none,full", "names 2 stages of 8; name one or 8"),
        ("selectiv", "did you mean 'selective'?"),
    ],
)
def test_what_cannot_be_is_refused(value: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        plan(f"parallel.recompute={value}")
    assert words in str(error.value)


def test_autograd_supports_none_and_full() -> None:
    with pytest.raises(UserError, match="requires compute"):
        plan("parallel.recompute=selective", "compute.decoder_layer=autograd")
    run, layout = plan("parallel.recompute=full", "compute.decoder_layer=autograd")
    assert recomputed_flops_per_token(run, layout, 2) == 80 * layer_forward_flops(run.model, 2048)


def test_full_does_not_repeat_the_last_product() -> None:
    run, layout = plan("parallel.recompute=full")
    saved = 2 * 8192 * 22016
    assert recomputed_flops_per_token(run, layout, 2) == 80 * (layer_forward_flops(run.model, 2048) - saved)
    run = replace(run, parallel=replace(run.parallel, recompute="selective"))
    assert recomputed_flops_per_token(run, layout, 2) == 0  # over 8 ranks the sum of the output projection is kept


@pytest.mark.parametrize("device", [22, 30, 40, 80])
@pytest.mark.parametrize("how", [("1f1b", 1), ("zb_h1", 1), ("dualpipe_v", 2)])
def test_auto_fills_the_device(device: int, how: tuple[str, int]) -> None:
    """Kept activations fit what the rest leaves of 92 percent; one more layer's worth of memory would not."""
    schedule, virtual = how
    run, layout = plan(f"parallel.recompute={{auto: {device} GiB}}", f"parallel.schedule={schedule}",
                       f"parallel.virtual_stages={virtual}")  # fmt: skip
    stages, fixed, work = stage_policies(run, layout, 2), rank_memory(run, layout, 2), layer_work(run, layout, 2)
    for rank, memory in enumerate(fixed):
        own = [stages[rank], stages[15 - rank]] if virtual == 2 else [stages[rank]]
        room = USABLE * device * GIB - memory.fixed - sum(stage.saved_bytes for stage in own)
        assert room >= 0
        for stage in own:
            if set(stage.policies) != {"none"}:
                more = min(
                    work.saved_bytes(a) - work.saved_bytes(b) for a, b in (("none", "selective"), ("selective", "full"))
                )
                assert room < len(own) * stage.in_flight * more + len(own)


def test_auto_recomputes_more_where_more_is_held() -> None:
    run, layout = plan("parallel.recompute={auto: 14 GiB}")
    flops = [
        sum(map(layer_work(run, layout, 2).recomputed_flops, stage.policies))
        for stage in stage_policies(run, layout, 2)
    ]
    assert flops == sorted(flops, reverse=True)
    assert flops[0] > flops[-1] == 0


def test_auto_takes_the_measured_memory() -> None:
    run, layout = plan("parallel.recompute=auto")
    assert with_device_memory(run, 80 * GIB).parallel.recompute == "auto: 80.00 GiB"
    with pytest.raises(UserError, match=r"keeps .* GiB under full recompute, above the 0 GiB"):
        stage_policies(with_device_memory(run, 4 * GIB), layout, 2)
