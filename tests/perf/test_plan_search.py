"""The search finds the best legal layout, writes files for the trainer, and explains rejections."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from llama_ds.config.context_parallel import CpSizes, cp_sizes
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import ParallelConfig, RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout
from llama_ds.layout.planned_documents import one_document, ring_imbalance
from llama_ds.layout.recompute import stage_policies
from llama_ds.perf.plan import hardware
from llama_ds.perf.plan import search as plan_search
from llama_ds.perf.plan.bound import lower_bound
from llama_ds.perf.plan.cost import run_cost
from llama_ds.perf.plan.estimate import estimate, report
from llama_ds.perf.plan.job import job_of
from llama_ds.perf.plan.page import page
from llama_ds.perf.plan.search import KINDS, SearchResult, layouts, nearest, search
from llama_ds.perf.plan.sharing_costs import sharing_costs
from llama_ds.perf.plan.sizes import rows_of
from llama_ds.perf.plan.step import step_time
from llama_ds.perf.plan.tables import paper_speed, search_data, search_table
from llama_ds.perf.plan.write import write
from llama_ds.schedules.schedule import DEFERRING
from llama_ds.schedules.zero_bubble_v import V_SCHEDULES

REPO = Path(__file__).resolve().parents[2]
A100 = hardware.load("a100-80gb")


def base(size: str, *overrides: str) -> RunConfig:
    return load_run(str(REPO / f"ds_configs/llama_{size}.yaml"), ["parallel={}", *overrides])


@pytest.fixture(scope="module")
def found() -> SearchResult:
    return search(base("65b"), 2048, A100, top=5)


@pytest.mark.slow
def test_the_ranking_is_of_legal_layouts_fastest_first(found: SearchResult) -> None:
    assert len(found.best) == 5
    seconds = [item.step.seconds for item in found.best]
    assert seconds == sorted(seconds)
    for item in found.best:
        layout = resolve_layout(item.run, 2048)
        assert layout.pp * layout.tp * layout.cp * layout.dp == 2048
        deepspeed_config(item.run, layout, bf16_native=True)
        assert item.fits and item.peak_bytes <= A100.memory_bytes
        assert 0.2 < item.step.mfu(A100) < 0.75


@pytest.mark.slow
def test_the_papers_speed_lies_between_a_layout_of_its_time_and_the_best(found: SearchResult) -> None:
    """The paper reports 380 tokens/s/GPU (section 2.4)."""
    plain = found.of_kind["1F1B with tp over a whole node, as in 2021-23"]
    paper = paper_speed(found.best[0])
    assert paper == pytest.approx(380.4, abs=0.1)
    assert plain.step.tokens_per_second == pytest.approx(paper, rel=0.12)
    assert found.best[0].step.tokens_per_second > paper
    text = search_table(found, run_cost(1.4e12, 400, 2048, 400))
    assert "380 tokens/s/GPU" in text and "exposed tensor-parallel" in text
    assert set(KINDS) - set(found.of_kind) == {
        "context parallelism by a ring",  # rows of 2,048 tokens are not shared
        "context parallelism by all-to-alls",
        "context parallelism by both",
    }


@pytest.mark.slow
def test_no_pruned_layout_is_faster() -> None:
    """Exhaustive search on a small problem: the bound must not prune a layout that belongs among the best.

    The ninth has tp_chunks 4, which the search alone considers.
    """
    run = base("7b", "training.global_batch=16", "data.seq_len=8192")
    best = search(run, 16, A100, top=8)
    every = []
    for layout in layouts(run, 16, A100):
        if layout.parallel.schedule in V_SCHEDULES:  # tests/perf/test_plan_v_search.py
            continue
        joint = (1, 2) if layout.parallel.pp > 1 and layout.parallel.schedule in DEFERRING else (1,)
        times = []
        for parallel in (replace(layout.parallel, joint_weight_gradients=number) for number in joint):
            try:
                item = estimate(replace(layout, parallel=parallel), 16, A100)
            except UserError:
                continue
            times += [item.step.seconds] if item.fits else []
        every += [min(times)] if times else []
    others = [item.step.seconds for item in best.best if item.run.parallel.schedule not in V_SCHEDULES]
    assert len(others) >= 3 and best.legal > len(every)
    assert others == pytest.approx(sorted(every)[: len(others)])
    assert {f"context parallelism by {how}" for how in ("a ring", "all-to-alls")} <= set(best.of_kind)


def test_long_rows_are_shared_by_every_method() -> None:
    """8B with rows of 131,072 tokens on 256 A100s: layouts that share rows beat all others, and the table says why."""
    options = ["parallel={}", "data.seq_len=131072", "training.global_batch=32"]
    found = search(load_run(str(REPO / "ds_configs/llama3_8b.yaml"), options), 256, A100, top=3)
    whole, *shared = (found.of_kind[kind] for kind in list(KINDS)[-4:])
    assert [item.run.parallel.cp_method for item in shared] == ["ring", "all_to_all", "hierarchical"]
    assert max(item.step.seconds for item in shared) < 0.9 * whole.step.seconds
    both = shared[-1].run.parallel  # the largest group within a node of 8
    assert shared[-1].step.job.cp_sizes == cp_sizes(shared[-1].run)[0] and both.cp_all_to_all * both.tp <= 8
    text = search_table(found, run_cost(1e12, 400, 256, 400))
    assert re.search(r"all_to_all x\d+ .*\d%", text) and "best of no context parallelism: tp 8" in text
    assert re.search(r"best of context parallelism by both: tp \d pp 1 hierarchical \dx\d dp", text)
    assert "exposed context-parallel" in text and "imbalance of causal work 0.0%" in text


def test_smaller_groups_beat_larger_micro_batches() -> None:
    """The search leaves out micro-batches that have a factor in common with cp."""
    run = base("7b", "data.seq_len=32768", "training.global_batch=64", "parallel.recompute=full")
    for method in ("ring", "all_to_all"):
        parallel = ParallelConfig(recompute="full", cp=8, cp_method=method, micro_batch=2)
        larger = estimate(replace(run, parallel=parallel), 64, A100)
        smaller = estimate(replace(run, parallel=replace(parallel, cp=4, micro_batch=1)), 64, A100)
        assert smaller.step.seconds < larger.step.seconds
        assert smaller.peak_bytes == larger.peak_bytes


def test_a_ring_sends_keys_and_values_and_the_gradients_of_both() -> None:
    """In bytes: 16,384 tokens of 8 heads of 128, keys and values in bf16, gradients in fp32, 32 layers, by hand."""
    options = ["data.seq_len=131072", "training.global_batch=32", "parallel.tp=1", "parallel.sequence_parallel=false"]
    options += ["parallel.cp=8", "parallel.cp_method=ring", "parallel.recompute=full"]
    found = estimate(load_run(str(REPO / "ds_configs/llama3_8b.yaml"), options), 256, A100)
    costs = sharing_costs(A100, found.step)
    assert costs is not None and costs.key_value_bytes == 2 * 16384 * 8 * 128 * 2
    forwards, backward = 2 * 7 * costs.key_value_bytes, (7 + 2 * 8) * costs.key_value_bytes
    assert costs.sent_bytes == 32 * (forwards + backward)
    # In stripes, the last rank's tokens are 3.5 later than the mean, at 65,536.5.
    assert costs.imbalance == pytest.approx(3.5 / 65536.5)
    assert costs.hidden_s > 10 * costs.exposed_s > 0
    assert "imbalance of causal work 0.0%" in report(found)
    assert ring_imbalance(one_document(1200), CpSizes(3), 1) == 0


def test_the_bound_is_below_the_simulated_time() -> None:
    run = base("13b", "training.global_batch=256")
    for layout in list(layouts(run, 64, A100))[::7]:
        try:
            item = estimate(layout, 64, A100)
        except UserError:
            continue
        job = job_of(item.run, item.layout, stage_policies(item.run, item.layout, 2))
        assert lower_bound(A100, job) <= step_time(A100, job).seconds * (1 + 1e-9)
    for name in ("zb_h1", "interleaved"):
        joint = ["parallel.joint_weight_gradients=2", f"parallel.schedule={name}", "parallel.pp=4", "parallel.tp=2"]
        joint += [f"parallel.virtual_stages={1 + (name == 'interleaved')}"]
        item = estimate(base("13b", "training.global_batch=256", *joint), 64, A100)
        assert lower_bound(A100, item.step.job) <= item.step.seconds * (1 + 1e-9)
    order = ["parallel.schedule=zb_v", "parallel.virtual_stages=2", "parallel.extra_warmup=2", "parallel.pp=4"]
    early = [*order, "parallel.post_validation=true"]
    for batch, options in ((8, order), (8, early), (64, order), (64, early)):  # one micro-batch and eight
        item = estimate(base("13b", f"training.global_batch={batch}", "parallel.tp=2", *options), 64, A100)
        assert lower_bound(A100, item.step.job) <= item.step.seconds * (1 + 1e-9)


@pytest.mark.slow
def test_the_trainer_accepts_the_written_files(found: SearchResult, tmp_path: Path) -> None:
    for number, item in enumerate((found.best[0], *found.of_kind.values())):
        yaml_path, json_path = write(item.run, tmp_path / str(number))
        run = load_run(str(yaml_path))
        assert run.deepspeed_path == str(json_path)
        assert (run.parallel, run.training, run.model) == (item.run.parallel, item.run.training, item.run.model)
        again = estimate(run, 2048, A100)
        assert again.step.seconds == pytest.approx(item.step.seconds)


@pytest.mark.slow
def test_the_page_is_one_file_with_all_pictures(found: SearchResult) -> None:
    text = page("65B <on> 2,048", found, run_cost(1.4e12, 400, 2048, 400))
    assert text.count("<svg") == 3 and text.count("</svg>") == 3
    assert "&lt;on&gt;" in text
    assert not re.search(r"(src|href)=", text)
    assert "nan" not in text.lower().split() and "NaN" not in text
    assert "<circle" in text and "MWh" in text and "rank 0" in text


@pytest.mark.slow
def test_rejections_are_counted_with_an_example(found: SearchResult) -> None:
    assert "tensor parallelism across nodes" in found.rejected
    assert any(why.startswith("does not fit") for why in found.rejected)
    data = search_data(found, run_cost(1.4e12, 400, 2048, 400))
    assert all(item["count"] > 0 and item["example"] for item in data["rejected"].values())


@pytest.mark.parametrize(
    ("size", "gpus", "batch", "words"),
    [
        (
            "65b",
            8,
            64,
            r"no layout is possible: weights, gradients and optimizer alone do not fit.* On (\d+) GPUs there is one",
        ),
        ("7b", 37, 64, r"no layout is possible: dp does not divide the global batch.* On (\d+) GPUs there is one"),
    ],
)
def test_an_impossible_request_names_the_nearest_possible(size: str, gpus: int, batch: int, words: str) -> None:
    run = base(size, f"training.global_batch={batch}")
    with pytest.raises(UserError, match=words) as error:
        search(run, gpus, A100)
    match = re.search(r"On ([\d,]+) GPUs there is one", str(error.value))
    assert match
    assert search(run, int(match[1].replace(",", "")), A100, top=1).best


def test_the_nearest_possible_may_be_a_zero_bubble_v(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing else fits; Vs that hold less may, and their size is named instead of a larger one."""
    monkeypatch.setattr(plan_search, "candidate", lambda *_: None)
    gpu = replace(A100, memory_gib=40)
    assert nearest(base("7b", "training.global_batch=16"), 12, gpu).startswith("On 8 GPUs there is one")
    assert nearest(base("7b", "training.global_batch=16"), 12, replace(gpu, memory_gib=1)).startswith("Use GPUs with")


def test_tokens_become_rows_that_layouts_can_divide() -> None:
    assert rows_of(4_194_304, 2048) == 2048
    assert rows_of(4_000_000, 2048) == 2048
    assert rows_of(6144, 2048) == 3
    with pytest.raises(UserError, match="less than one row"):
        rows_of(1000, 2048)


def test_weight_gradients_are_joined_where_it_is_faster(tmp_path: Path) -> None:
    """13B on 64 H100s, which compute faster for their bandwidth; the table and the written files say so."""
    found = search(base("13b", "training.global_batch=512"), 64, hardware.load("h100-80gb"), top=10)
    joined = [item for item in found.best if item.run.parallel.joint_weight_gradients > 1]
    assert joined
    for item in joined:
        single = replace(item.run, parallel=replace(item.run.parallel, joint_weight_gradients=1))
        assert estimate(single, 64, item.gpu).step.seconds > item.step.seconds
    assert " joint 2 " in search_table(found, run_cost(1e12, 400, 64, 400))
    yaml_path, _ = write(joined[0].run, tmp_path / "planned")
    assert load_run(str(yaml_path)).parallel == joined[0].run.parallel
