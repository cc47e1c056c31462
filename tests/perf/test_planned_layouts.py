"""Any layout that the search may write is one that the trainer accepts, and a dry run of it takes a step."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.run_file import load_run
from llama_ds.layout.layout import resolve_layout
from llama_ds.perf.plan import hardware
from llama_ds.perf.plan.estimate import Estimate
from llama_ds.perf.plan.models import base_run
from llama_ds.perf.plan.search import SearchResult, search
from llama_ds.perf.plan.write import write
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
GPUS = 8
ROWS = 32  # the most of a step: more micro-batches only take longer to simulate
MASKED = "llama3_8b"  # the shipped run file with document masks
PLANS = [(MASKED, GPUS, "a100-40gb"), ("llama_7b", GPUS, "a100-40gb"), ("quickstart", 2, "a100-80gb")]
KINDS = [
    *(("pp 1", f"ZeRO-{zero}", policy) for zero in (2, 3) for policy in ("none", "selective", "full")),
    ("pp 1", "ZeRO-1", "auto"),
    *(("pipeline", schedule, str(warmup)) for schedule, warmup in (("1f1b", 0), ("zb_h1", 0), ("zb_h1", 1))),
    *(("pipeline", schedule, "0") for schedule in ("interleaved", "dualpipe_v", "zb_v", "v_half", "v_min")),
    ("pipeline", "zb_v", "2"),
]


# All kinds pass; these differ most, and `tests/training/test_dry_run.py` has ZeRO-1 and 1F1B. A dry run takes 3 s.
TRIED = [
    *(("pp 1", "ZeRO-3", "none"), ("pp 1", "ZeRO-3", "full"), ("pp 1", "ZeRO-2", "selective")),
    *(("pipeline", "interleaved", "0"), ("pipeline", "zb_h1", "1"), ("pipeline", "dualpipe_v", "0")),
    ("pipeline", "zb_v", "2"),
]


@cache
def searched(name: str, gpus: int, gpu: str, top: int) -> SearchResult:
    base = base_run(name)
    rows = min(base.training.global_batch, ROWS)
    return search(replace(base, training=replace(base.training, global_batch=rows)), gpus, hardware.load(gpu), top)


def kind_of(found: Estimate) -> tuple[str, str, str]:
    """Return what the trainer does differently in this layout."""
    run, parallel = found.run, found.run.parallel
    if parallel.pp == 1:
        return "pp 1", f"ZeRO-{run.zero_stage}", parallel.recompute.partition(":")[0]
    return "pipeline", parallel.schedule, str(parallel.extra_warmup)


@cache
def smallest_of_kinds() -> dict[tuple[str, str, str], Estimate]:
    """Return a layout of each kind, with the fewest stages, for a model with document masks."""
    every = searched(MASKED, GPUS, "h100-80gb", 1000).best
    # With 2 tensor-parallel and 2 context-parallel ranks, if one is, so that most axes are larger than 1.
    ordered = sorted(
        every,
        key=lambda e: (
            e.run.parallel.pp * e.run.parallel.virtual_stages,
            abs(e.layout.tp - 2) + abs(e.layout.cp - 2),
        ),
    )
    return {kind_of(found): found for found in reversed(ordered)}


def dry_run(found: Estimate, folder: Path, gib: int) -> dict[str, bool]:
    """Write the layout's files as the tool does, and simulate a short step of few layers on its first and last rank."""
    path, _ = write(found.run, folder)
    parallel, layout = found.run.parallel, found.layout
    stages = parallel.pp * parallel.virtual_stages
    micro_batches = 2 * parallel.pp if parallel.pp > 1 else 1
    shorter = [
        f"model.num_hidden_layers={stages}",
        f"parallel.partition={[1] * stages}",
        f"training.global_batch={layout.dp * parallel.micro_batch * micro_batches}",
    ]
    words = (path, *shorter, "--world", layout.world, "--rank", "first,last", "--device-gib", gib, "--json")
    done = warm.run(ROOT / "tools" / "dryrun.py", *words)
    assert done.stdout, done.stderr[-3000:]
    return {check["name"]: check["ok"] for check in json.loads(done.stdout)["checks"]}


@pytest.mark.parametrize(("name", "gpus", "gpu"), PLANS)
def test_what_the_search_ranks_loads_as_a_run(name: str, gpus: int, gpu: str, tmp_path: Path) -> None:
    found = searched(name, gpus, gpu, 10)
    for number, estimate in enumerate([*found.best, *found.of_kind.values()]):
        path, _ = write(replace(estimate.run, name=f"planned_{number}"), tmp_path)
        run = load_run(str(path))
        layout = resolve_layout(run, gpus)
        assert layout == estimate.layout
        config = deepspeed_config(run, layout, bf16_native=True)
        assert config["zero_optimization"]["stage"] == estimate.run.zero_stage


@pytest.mark.slow
def test_the_layout_recommended_for_a_node_takes_a_step(tmp_path: Path) -> None:
    best = searched(*PLANS[0], 10).best[0]
    checks = dry_run(best, tmp_path, 40)
    assert checks and all(checks.values()), checks


def test_the_kinds_are_those_of_the_search() -> None:
    """Otherwise a new kind of layout would be recommended without a dry run."""
    assert set(smallest_of_kinds()) == set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRIED, ids=" ".join)
def test_each_kind_of_layout_takes_a_step(kind: tuple[str, str, str], tmp_path: Path) -> None:
    checks = dry_run(smallest_of_kinds()[kind], tmp_path, 80)
    assert checks and all(checks.values()), checks
