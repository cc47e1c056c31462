"""The planner's step time and memory: invariants for every machine, and agreement with measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from llama_ds.config.moved_keys import renamed_data
from llama_ds.config.reader import ConfigSource, read
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import ModelConfig, ParallelConfig
from llama_ds.errors import UserError
from llama_ds.layout.axes import Axes
from llama_ds.layout.layout import resolve_layout
from llama_ds.layout.rank_memory import rank_memory
from llama_ds.perf.plan import hardware
from llama_ds.perf.plan.communication import RankGroup, all_reduce, contention, exposed_by_chunks, half, message
from llama_ds.perf.plan.compute import gemm
from llama_ds.perf.plan.curves import ALL_REDUCE, Collective, Curves
from llama_ds.perf.plan.estimate import Estimate, as_data, estimate, report
from llama_ds.perf.plan.explain import explain
from llama_ds.perf.plan.job import StepJob
from llama_ds.perf.plan.layer import layer_time
from llama_ds.perf.plan.program import OURS
from llama_ds.perf.plan.rank_spread import expected_maximum, slowdown
from llama_ds.perf.plan.relief import check_matrices
from llama_ds.perf.plan.search import search
from llama_ds.perf.plan.step import rank_roles, run_schedule, stage_times
from llama_ds.perf.plan.tensor_chunks import best_chunks, with_chunks
from llama_ds.perf.plan.update import update_time
from llama_ds.schedules.simulate import StageCost, simulate

REPO = Path(__file__).resolve().parents[2]
A100, H100 = hardware.load("a100-80gb"), hardware.load("h100-80gb")


def planned(*overrides: str, size: str = "65b", gpus: int = 2048, gpu: hardware.Hardware = A100) -> Estimate:
    return estimate(load_run(str(REPO / f"ds_configs/llama_{size}.yaml"), overrides), gpus, gpu)


def test_the_papers_65b_run_lies_between_the_layouts_of_its_time() -> None:
    """LLaMA, section 2.4: around 380 tokens/s/GPU on 2,048 A100-80GB, 1.4T tokens in about 21 days.

    The layout was not published. Of those then usual, 1F1B with tp 8 is slower, and interleaved with tp 4 faster.
    """
    slow = planned("parallel.schedule=1f1b")
    fast = planned("parallel.tp=4", "parallel.schedule=interleaved", "parallel.virtual_stages=5")
    assert slow.fits and fast.fits
    assert 0.87 * 380 < slow.step.tokens_per_second < 380 < fast.step.tokens_per_second < 1.12 * 380
    assert 0.87 * 21 < fast.days < 21 < slow.days < 1.14 * 21


@pytest.mark.parametrize("name", hardware.names())
def test_every_machine_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    machine = hardware.load(name)
    path = tmp_path / "copy.yaml"
    path.write_text(hardware.text(machine))
    assert hardware.load(str(path)) == machine
    assert machine.name == name


@pytest.mark.parametrize("machine", [A100, H100])
@pytest.mark.parametrize("sizes", [(2048, 4096, 4096), (8192, 8192, 8192), (512, 1376, 4096), (8, 8, 8)])
def test_no_product_is_faster_than_peak_and_memory(machine: hardware.Hardware, sizes: tuple[int, int, int]) -> None:
    m, n, k = sizes
    time = gemm(machine, m, n, k)
    assert time >= 2 * m * n * k / machine.peak
    assert time >= 2 * (m * k + k * n + m * n) / (machine.bandwidth_gb_s * 1e9)


def test_products_with_badly_aligned_rows_are_slower() -> None:
    aligned, bytes_16, bytes_8 = (gemm(A100, 4096, 4096, k) / k for k in (4096, 4104, 4100))
    assert aligned < bytes_16 < bytes_8


def test_collectives_follow_the_ring_and_the_links() -> None:
    size = 2.0**30
    within = half(A100, RankGroup(8), size)
    assert within == pytest.approx(7 / 8 * size / (A100.links.nvlink_gb_s * 1e9), rel=0.05)
    assert half(A100, RankGroup(1), size) == 0
    assert all_reduce(A100, RankGroup(8), size) == pytest.approx(2 * within, rel=0.05)
    # All eight ranks of a node send to other nodes at once, so each has an eighth of the node's links.
    across = half(A100, RankGroup(16, stride=8), size)
    share = A100.links.network_gb_s * 1e9 * A100.calibration.network / 8
    assert across == pytest.approx(15 / 16 * size / share, rel=0.05)
    assert message(A100, 8, size, 16)[0] == pytest.approx(size / share)


def test_all_reduce_is_near_what_nccl_measured_on_nvlink() -> None:
    """No constant was fitted to the rows of docs/calibration/nccl_allreduce_a100_nvlink.csv."""
    lines = (REPO / "docs/calibration/nccl_allreduce_a100_nvlink.csv").read_text().splitlines()[1:]
    errors = []
    for line in lines:
        n, size, time_us, _ = map(float, line.split(","))
        errors.append(abs(all_reduce(A100, RankGroup(int(n)), size) * 1e6 / time_us - 1))
    assert sorted(errors)[len(errors) // 2] < 0.12


@pytest.mark.parametrize("seq_len", [2048, 4096])
@pytest.mark.parametrize(("shape", "within"), [("7b-tp1", 0.05), ("65b-tp8", 0.10)])
@pytest.mark.parametrize("policy", ["none", "selective"])
def test_a_layer_agrees_with_measurements_on_an_h100(shape: str, within: float, seq_len: int, policy: str) -> None:
    """The files are in docs/measurements; the 65B file has one rank's shard. No constant was fitted to them."""
    name = f"docs/measurements/2026-11-26-h100-layer-{shape}-bf16-seq{seq_len}.json"
    measured = json.loads((REPO / name).read_text())
    job = bare_job(shape_of(measured["model"]), seq_len, measured["batch"])
    time = layer_time(H100, job, policy)
    parts = (time.forward, time.recompute, time.input_backward, time.weight_backward)
    assert sum(p.device for p in parts) == pytest.approx(
        measured["layers"][f"llama_ds_{policy}"]["median_s"], rel=within
    )


def shape_of(recorded: dict[str, object]) -> ModelConfig:
    """Return the model shape in a measurement, which may use old key names."""
    return read(
        ModelConfig,
        renamed_data({"model": recorded}, ConfigSource("measurement"))["model"],
        ConfigSource("measurement"),
    )


def bare_job(model: ModelConfig, seq_len: int, rows: int) -> StepJob:
    return StepJob(model, OURS, seq_len, rows, 1, Axes(), False, 1, "1f1b", 1, 0, ((("none", 1),),), whole_model=False)


def test_the_extrapolation_of_a_long_step_agrees_with_its_full_simulation() -> None:
    """Long steps are simulated in part and extrapolated."""
    for schedule, chunks, stages in (("1f1b", 1, 4), ("zb_h1", 1, 4), ("interleaved", 2, 8), ("dualpipe_v", 2, 8)):
        layers = tuple((("none", 1),) for _ in range(stages))
        job = replace(
            bare_job(planned().run.model, 2048, 1),
            **{"axes": Axes(pp=4), "chunks": chunks, "schedule": schedule, "stages": layers, "micro_batches": 88},
        )
        costs = tuple(StageCost(1.0 + 0.1 * s, 1.1, 0.9) for s in range(stages))
        full = simulate(job.plan(88), costs, 0.05, 0.01)
        length, bubble = run_schedule(job, costs, 0.05, 0.01)
        assert length == pytest.approx(full.length, rel=0.01), schedule
        assert bubble == pytest.approx(full.bubble, abs=0.01), schedule


def test_settings_change_time_and_memory_in_the_expected_direction() -> None:
    base = planned()
    recomputing = planned("parallel.recompute=full")
    assert recomputing.step.seconds > 1.2 * base.step.seconds
    assert recomputing.peak_bytes < base.peak_bytes
    assert planned("parallel.micro_batch=2").step.bubble > base.step.bubble
    assert planned("parallel.schedule=zb_h1").step.bubble < base.step.bubble
    slow = replace(A100, links=replace(A100.links, network_gb_s=A100.links.network_gb_s / 8))
    assert planned(gpu=slow).step.seconds > base.step.seconds
    assert planned(gpu=H100).step.seconds < base.step.seconds / 1.5
    assert planned("training.global_batch=4096").step.bubble < base.step.bubble


def test_a_job_waits_for_the_slowest_of_its_ranks() -> None:
    """Exact expected maxima of 2, 3 and 8 normal values: 1 / sqrt(pi), 3 / (2 sqrt(pi)), 1.4236."""
    exact = {1: 0.0, 2: math.pi**-0.5, 3: 1.5 * math.pi**-0.5, 8: 1.4236}
    for count, value in exact.items():
        assert expected_maximum(count) == pytest.approx(value, abs=0.03)
    assert expected_maximum(2048) < math.sqrt(2 * math.log(2048))  # an upper bound for any number
    slowdowns = [slowdown(A100, ranks) for ranks in (8, 16, 256, 2048, 16384)]
    assert slowdowns[0] == 1 and slowdowns == sorted(set(slowdowns))
    steady, found = planned(gpu=replace(A100, rank_spread=0.0)).step, planned().step
    assert steady.stragglers == 0
    assert found.pipeline == pytest.approx(steady.pipeline * slowdown(A100, 2048))
    assert found.stragglers == pytest.approx(found.pipeline - steady.pipeline)
    assert "2,048 ranks is expected to take 4.6% longer" in explain(planned())


def test_a_hidden_collective_costs_less_where_the_network_slows_it_down() -> None:
    assert contention(A100, RankGroup(8)) == A100.calibration.contention
    share = A100.network / 8 / (A100.links.nvlink_gb_s * 1e9)
    assert contention(A100, RankGroup(16, stride=8)) == pytest.approx(A100.calibration.contention * (1 + share) / 2)
    measured = replace(A100, curves=Curves(collectives=(Collective(ALL_REDUCE, 8, 1, (1.0, 2.0), (1.0, 2.0)),)))
    assert contention(measured, RankGroup(16, stride=8)) == A100.calibration.contention


def test_nothing_hides_the_gather_of_the_gradient_that_a_stage_receives() -> None:
    """The layer above issues it before its last weight gradient; the last layer of a stage has none above."""
    base = planned("parallel.schedule=interleaved", "parallel.virtual_stages=10").step.job
    layer = layer_time(A100, base, "none")
    assert 0 < layer.ahead < layer.forward.tensor
    middle = stage_times(A100, base)[40]
    assert middle.input_backward.tensor == pytest.approx(layer.input_backward.tensor + layer.ahead)
    assert layer_time(A100, planned("parallel.schedule=zb_h1").step.job, "none").ahead < layer.ahead


@pytest.mark.parametrize(
    ("count", "times", "how", "exposed"),
    [
        (1, (3, 2, 1, 4), {}, 3),  # the product behind waits for sum and gather
        (2, (3, 2, 1, 4), {}, 4),  # both gathers, of which nothing is between issue and wait, and the second sum
        (3, (3, 2, 1, 4), {}, 0),
        (4, (3, 2, 1, 4), {"early": True}, 0),
        (4, (3, 2, 1, 4), {"early": False}, 0),
        (4, (1, 2, 1, 6), {"early": True}, 4),  # three sums longer than the product beside them
        (4, (1, 2, 1, 6), {"early": False}, 2),  # the first sum, and the first gather behind the second sum
        (4, (3, 2, 1, 4), {"ends": True}, 2),  # the last sum; its gather has three products beside it
        (4, (0, 0, 1, 4), {}, 1),  # the first gather of a layer
        (4, (3, 2, 0, 0), {}, 2),  # the last sum of a layer
        (4, (3, 5, 0, 0), {}, 4 * 5 - 3 * 3),  # the link takes longer than the products
    ],
)
def test_chunks_hide_all_but_the_ends(
    count: int, times: tuple[float, float, float, float], how: dict[str, bool], exposed: float
) -> None:
    """By hand, on the order that `tests/parallel/test_manual_backward_tp.py` records on real ranks."""
    assert exposed_by_chunks(count, *times, **how) == exposed


def test_chunks_are_planned_where_they_pay() -> None:
    """With small micro-batches, cut products lose more than the overlap saves."""
    cut = "parallel.tp=8", "parallel.pp=8", "parallel.schedule=zb_h1", "parallel.virtual_stages=1"
    job = planned(*cut, "parallel.micro_batch=4").step.job
    assert job.split_share > 0.5 and best_chunks(A100, job) == 4
    assert best_chunks(A100, replace(job, micro_batch=1)) == 1
    assert best_chunks(A100, replace(job, zero_stage=3)) == 1
    run = planned("parallel.tp=8", "parallel.pp=8", "parallel.schedule=1f1b", "parallel.micro_batch=4").run
    assert with_chunks(A100, run, job)[0].parallel.tp_chunks == 4
    by_autograd = replace(run, compute=replace(run.compute, decoder_layer="autograd"))
    assert with_chunks(A100, by_autograd, job) == (by_autograd, job), "its layers wait for each collective at once"
    whole, chunks = (layer_time(A100, replace(job, tp_chunks=n), "none") for n in (1, 4))
    for before, after in ((whole.forward, chunks.forward), (whole.input_backward, chunks.input_backward)):
        assert after.tensor < before.tensor and after.matrices > before.matrices
        assert after.device < before.device < after.device + before.tensor


def test_updates_before_their_norm_hold_states_twice_and_say_so() -> None:
    v = ("parallel.schedule=dualpipe_v", "parallel.virtual_stages=2")
    plain, twice = planned(*v), planned(*v, "parallel.post_validation=true")
    assert [m.optimizer for m in twice.memory] == pytest.approx([2 * m.optimizer for m in plain.memory])
    assert "and copies of them" in explain(twice) and "and copies of them" not in explain(plain)


def test_float8_speeds_up_products_of_many_tokens_on_machines_that_have_it() -> None:
    """By less than twice: attention and the passes over the factors stay. Those over weights outweigh few tokens."""

    def step(compute: Sequence[str], rows: int) -> float:
        settings = (f"parallel.micro_batch={rows}", "parallel.tp=1", "parallel.sequence_parallel=false", *compute)
        return planned(*settings, size="7b", gpus=64, gpu=H100).step.seconds

    current, everything = ["compute.fp8=current"], ["compute.fp8=delayed", "compute.fp8_weight_gradients=true"]
    assert 1.1 < step([], 8) / step(current, 8) < 1.6
    assert step(everything, 8) < step(current, 8)
    assert step([], 8) / step(current, 8) > step([], 1) / step(current, 1)
    plain, fp8 = planned(size="7b", gpus=64, gpu=H100), planned("compute.fp8=current", size="7b", gpus=64, gpu=H100)
    matrices = plain.run.model.num_hidden_layers * (4 * 4096**2 + 3 * 4096 * 11008)
    assert fp8.memory[0].working - plain.memory[0].working == 2 * matrices  # quantised along each dimension
    words = explain(fp8)
    assert "products 2.00 times as fast as in bf16" in words and "and matrices in float8" in words
    assert "float8" not in explain(plain)
    seven = str(REPO / "ds_configs/llama_7b.yaml")
    for find in (planned, lambda *overrides: search(load_run(seven, overrides), 8, A100)):
        with pytest.raises(UserError, match=r"compute\.fp8 = current: layout/flops\.py has no float8 peak for A100"):
            find("compute.fp8=current")


def test_muon_pays_for_whole_matrices() -> None:
    """Counted by hand for 7B: four D x D and three D x F matrices a layer, owned by 2 x 4 ranks of each of 2 stages.

    An iteration has 2 n^2 m FLOPs for X X^T, 2 n^3 for its square, 2 n^2 m for the product with X, n <= m.
    """
    layouts = ("parallel.pp=2", "parallel.tp=4", "optimizer.schedule=cosine")
    adamw, muon = (planned(*layouts, f"optimizer.name={name}", size="7b", gpus=16) for name in ("adamw", "muon"))
    narrow, wide, layers = 4096, 11008, 16
    flops = 5 * layers * (4 * 6 * narrow**3 + 3 * (4 * narrow**2 * wide + 2 * narrow**3))
    found = update_time(A100, muon.step.job, 0, rank_roles(muon.step.job)[0])
    assert found.flops == flops
    # At best the 8 ranks share them evenly, and no product is faster than the peak.
    assert flops / 8 / A100.peak < found.products < 3 * flops / 8 / A100.peak
    elements = layers * (4 * narrow**2 + 3 * narrow * wide) / 8
    assert found.sent == 2 * 2 * elements * 7 / 8, "there and back, 2 bytes each, but for the rank's own eighth"
    assert adamw.step.optimizer < found.products < muon.step.optimizer
    assert muon.step.seconds - adamw.step.seconds == pytest.approx(muon.step.optimizer - adamw.step.optimizer)
    assert muon.peak_bytes < adamw.peak_bytes
    assert "Newton-Schulz" in explain(muon) and "8 of hidden matrices" in explain(muon)


def test_whole_matrices_are_planned_where_muon_holds_them() -> None:
    """7B on one rank, in bf16: what is to be orthogonalised, the results, and temporaries of the last matrix.

    `tests/parallel/layout_worker.py` counts the bytes of real steps.
    """
    options = ("parallel={micro_batch: 1, recompute: full}", "training.global_batch=64", "optimizer.name=muon")
    one = planned(*options, size="7b", gpus=1)
    elements, (held,) = 32 * (4 * 4096**2 + 3 * 4096 * 11008), one.memory
    last = 3 * 4096 * 11008 + 4096**2  # four (n, m), one of which will be its result, and one (n, n)
    assert held.matrices == 2 * (2 * elements + last)
    assert held.total == held.kept + held.matrices > held.kept + held.activations + held.working
    assert "DOES NOT FIT" in report(one) and "matrices" in report(one) and "whole matrices" in explain(one)
    shared = planned(*options, size="7b", gpus=8)
    assert shared.memory[0].matrices < held.matrices / 4
    smaller = load_run(str(REPO / "ds_configs/llama_7b.yaml"), [*options, "model.num_hidden_layers=24"])
    found = search(replace(smaller, parallel=ParallelConfig()), 1, A100)
    assert "whole matrices of Muon do not fit" in found.rejected and found.best[0].fits


@pytest.mark.parametrize(
    ("sizes", "gib", "words"),
    [
        ("", 45, "stage 0 .* 48.58 GiB .* 45.00 GiB; use .*stage=2, planned to need .* less$"),
        ("pp: 2", 26, "stage 1 .*; use parallel.tp=2 parallel.sequence_parallel=true, planned to need .* less$"),
        ("pp: 2", 10, "less, which alone is not enough: use more ranks or larger devices too$"),
        ("pp: 4, tp: 2, sequence_parallel: true", 2, "use more ranks or larger devices$"),
    ],
)
def test_stages_that_cannot_hold_whole_matrices_are_refused(sizes: str, gib: int, words: str) -> None:
    options = [f"parallel={{micro_batch: 1, recompute: full, {sizes}}}", "training.global_batch=64"]
    run = load_run(str(REPO / "ds_configs/llama_7b.yaml"), [*options, "optimizer.name=muon"])
    layout = resolve_layout(run, 8)
    with pytest.raises(UserError, match=f"^.*optimizer.name = muon: .*{words}"):
        check_matrices(run, layout, 2, gib * 2**30)
    check_matrices(run, layout, 2, 80 * 2**30)
    check_matrices(
        replace(run, optimizer=replace(run.optimizer, name="adamw")), layout, 2, 1
    )  # out_of_memory.py speaks


def test_memory_agrees_with_the_trainers_own_model() -> None:
    run = load_run(str(REPO / "ds_configs/llama_65b.yaml"))
    owner = rank_memory(run, resolve_layout(run, 2048), 2)
    for held, rank in zip(planned().memory, owner, strict=True):
        assert (held.weights, held.gradients, held.optimizer) == (rank.weights, rank.gradients, rank.optimizer)
    zero = [planned("parallel.recompute=full", f"deepspeed=zero{z}_bf16.json", size="7b", gpus=256) for z in (1, 2, 3)]
    assert zero[0].peak_bytes > zero[1].peak_bytes > zero[2].peak_bytes


def test_every_number_is_finite_and_explained() -> None:
    for found in (planned(), planned(size="7b", gpus=256), planned(size="13b", gpus=256, gpu=H100)):
        text = json.dumps(as_data(found), allow_nan=False)
        assert math.isfinite(json.loads(text)["step_s"])
        for words in (report(found), explain(found)):
            assert "nan" not in words.lower().split() and "inf" not in words.lower().split()
        for word in ("peak", "pipeline", "reduction", "optimizer", "MFU", "weights", "activations"):
            assert word in explain(found)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("memory_gib: -1", "memory_gib = -1.0 is not positive"),
        ("memory_gib: 81920", "memory_gib = 81920 is not from 1e-09 to 10000; give it in the unit of its name"),
        ("bandwidth_gb_s: 2.039e12", "bandwidth_gb_s = 2.039e\\+12 is not from"),
        ("peak_tflops: 1e300", "peak_tflops = 1e\\+300 is not from"),
        ("name: ''", "name is empty"),
        ("device: A101", "device = 'A101' is not a device"),
        ("processors: many", "processors = 'many' is not an integer"),
        ("colour: red", "colour is not a known key"),
        ("rank_spread: 0.5", "rank_spread = 0.5 is not from 0 to 0.2"),
    ],
)
def test_a_bad_machine_is_refused_with_its_key(line: str, words: str, tmp_path: Path) -> None:
    key = line.split(":")[0]
    lines = [row for row in hardware.text(A100).splitlines() if not row.startswith(f"{key}:")]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join([*lines, line]) + "\n")
    with pytest.raises(UserError, match=words) as error:
        hardware.load(str(path))
    assert str(path) in str(error.value)


def test_a_machine_file_without_keys_is_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("- a list\n")
    with pytest.raises(UserError, match=r"the description of a machine is a YAML mapping .*a100-80gb\.yaml"):
        hardware.load(str(tmp_path / "mine.yaml"))


def test_an_unknown_machine_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"a100-90gb: not a described machine.*did you mean 'a100-80gb'"):
        hardware.load("a100-90gb")


def test_shared_rows_take_less_memory_and_little_more_time() -> None:
    """By 8 ranks, the activations are an eighth; computing blocks of 16,384 tokens hides all but a ring's last hop."""
    path = str(REPO / "ds_configs/llama3_8b.yaml")
    options = ["data.seq_len=131072", "training.global_batch=128", "parallel.recompute=full", "parallel.tp=2"]
    found = {
        (cp, method): estimate(
            load_run(path, [*options, f"parallel.cp={cp}", f"parallel.cp_method={method}"]), 256, A100
        )
        for cp, method in ((1, "auto"), (8, "ring"), (8, "all_to_all"))
    }
    whole = found.pop((1, "auto"))
    for (_, method), item in found.items():
        assert item.memory[0].activations == whole.memory[0].activations / 8
        assert item.memory[0].optimizer == whole.memory[0].optimizer  # dp * cp ranks share it, as dp did
        assert whole.step.seconds < item.step.seconds < 1.05 * whole.step.seconds
        (stage,) = item.step.stages
        assert (stage.forward.context > 0) == (method == "all_to_all") and stage.input_backward.context > 0
        assert "exposed context-parallel" in explain(item)
