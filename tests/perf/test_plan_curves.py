"""A machine's measured curves: interpolation, use by the planner, and refused descriptions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from llama_ds.benchmarks.machine.describe import spread_of_ranks
from llama_ds.config.run_file import load_run
from llama_ds.errors import UserError
from llama_ds.perf.plan import hardware
from llama_ds.perf.plan.communication import RankGroup, all_gather, all_reduce, half, message, reduce_scatter
from llama_ds.perf.plan.compute import flash_attention, gemm, pointwise
from llama_ds.perf.plan.curves import (
    OPERATIONS,
    AttentionRates,
    Collective,
    Curves,
    Kernels,
    ProductRates,
    Rate,
    bus_share,
)
from llama_ds.perf.plan.estimate import Estimate, estimate
from llama_ds.perf.plan.explain import explain
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.search import search

REPO = Path(__file__).resolve().parents[2]
A100 = hardware.load("a100-80gb")
PRODUCTS = ProductRates((16, 64), (((1.0, 2.0), (3.0, 4.0)), ((5.0, 6.0), (7.0, 8.0))))
RATE = Rate((1e6, 1e8), (10.0, 40.0))
ATTENTION = AttentionRates((32, 128), (256, 1024), ((1.0, 2.0), (3.0, 4.0)), ((0.5, 1.0), (1.5, 2.0)))
CURVES = Curves(
    PRODUCTS,
    ATTENTION,
    Kernels(RATE, RATE, RATE, RATE),
    (
        Collective("all_reduce", 2, 1, (1000, 4000), (10.0, 40.0)),
        Collective("all_gather", 2, 1, (1000, 4000), (5.0, 20.0)),
        Collective("reduce_scatter", 2, 1, (1000, 4000), (6.0, 24.0)),
        Collective("send", 2, 1, (1000, 4000), (1.0, 2.0)),
        Collective("send", 1, 2, (1000, 4000), (3.0, 8.0)),
    ),
)
CPU = replace(
    A100,
    name="cpu",
    device="some CPU",
    dtype="fp32",
    peak_tflops=8.0,
    host_computes=True,
    links=replace(A100.links, gpus_per_node=2),
    curves=CURVES,
)


def with_curves(**changed: object) -> dict[str, object]:
    return {"curves": replace(CURVES, **changed)}  # type: ignore[arg-type]


def planned(gpu: Hardware, gpus: int, *overrides: str) -> Estimate:
    return estimate(load_run(str(REPO / "ds_configs/quickstart.yaml"), overrides), gpus, gpu)


def test_rates_are_interpolated_geometrically_between_measurements() -> None:
    for i, m in enumerate((16, 64)):
        for j, n in enumerate((16, 64)):
            for h, k in enumerate((16, 64)):
                assert PRODUCTS.flops_per_second(m, n, k) == PRODUCTS.tflops[i][j][h] * 1e12
    assert PRODUCTS.flops_per_second(32, 16, 16) == pytest.approx(math.sqrt(1 * 5) * 1e12)
    assert PRODUCTS.flops_per_second(16, 16, 32) == pytest.approx(math.sqrt(1 * 2) * 1e12)
    assert PRODUCTS.flops_per_second(9999, 9999, 9999) == 8e12
    assert PRODUCTS.flops_per_second(1, 1, 1) == 1e12
    forward, backward = ATTENTION.flops_per_second(512, 32)
    assert (forward, backward) == pytest.approx((math.sqrt(2) * 1e12, math.sqrt(0.5) * 1e12))
    assert RATE.bytes_per_second(1e7) == pytest.approx(20e9)


def test_collectives_keep_the_bandwidth_of_the_largest_measured_size() -> None:
    curve = CURVES.collectives[0]
    assert curve.seconds(1000) == pytest.approx(10e-6)
    assert curve.seconds(2000) == pytest.approx(20e-6)
    assert curve.seconds(8000) == pytest.approx(80e-6)
    assert curve.seconds(1) == pytest.approx(10e-6)  # latency


@pytest.mark.parametrize(
    "operation, share", [("all_reduce", 2 * 7 / 8), ("all_gather", 7 / 8), ("reduce_scatter", 7 / 8), ("send", 1)]
)
def test_bus_bandwidth_is_nccl_tests(operation: str, share: float) -> None:
    """nccl-tests, doc/PERFORMANCE.md: all-reduce 2 (n - 1) / n, gather and reduce-scatter (n - 1) / n, sendrecv 1."""
    assert bus_share(operation, 8) == share
    assert Collective(operation, 4, 2, (8000,), (2.0,)).bus_gb_s() == (share * 4.0,)


def test_the_planner_prefers_measurements() -> None:
    assert gemm(CPU, 64, 64, 64, batch=2) == pytest.approx(2 * 2 * 64**3 / 8e12)
    assert pointwise(CPU, 1e6, "loss") == pytest.approx(1e6 / 10e9)
    product = 2.0 * 2 * 4 * 32 * 256 * 257 / 2
    assert flash_attention(CPU, 2, 256, 4, 32) == pytest.approx((2 * product / 1e12, 5 * product / 0.5e12))
    pair = RankGroup(2)
    times = [operation(CPU, pair, 4000) for operation in (all_reduce, all_gather, reduce_scatter)]
    assert times == pytest.approx([40e-6, 20e-6, 24e-6])
    assert message(CPU, 1, 4000, 4) == pytest.approx(
        (0.5 * 2e-6 + 0.5 * 8e-6, 0.0)
    )  # every second message leaves its node
    assert message(CPU, 2, 4000, 4) == pytest.approx((8e-6, 0.0))
    assert message(CPU, 1, 4000, 2) == pytest.approx((2e-6, 0.0))  # the job is on one node


def test_times_that_were_not_measured_are_calculated() -> None:
    four = RankGroup(4, 1)
    assert all_gather(CPU, four, 4000) == half(CPU, four, 4000)
    bare = replace(CPU, curves=None)
    assert gemm(bare, 64, 64, 64) != gemm(CPU, 64, 64, 64)


def test_jobs_over_nodes_with_an_unknown_network_are_refused() -> None:
    within = replace(CURVES, collectives=CURVES.collectives[:4])
    alone = replace(CPU, links=replace(CPU.links, network_gb_s=None), curves=within)
    one_rank = ("parallel.pp=1", "parallel.tp=2")
    assert planned(alone, 2, *one_rank).step == planned(CPU, 2, *one_rank).step
    assert "between nodes            not known" in explain(planned(alone, 2, *one_rank))
    for plan in (
        lambda: planned(alone, 4),
        lambda: search(load_run(str(REPO / "ds_configs/quickstart.yaml")), 4, alone, 1),
    ):
        with pytest.raises(
            UserError, match=r"cpu: links.network_gb_s is not stated, and this is over more than one node of 2"
        ):
            plan()


def test_a_run_in_fp32_needs_a_machine_described_for_fp32() -> None:
    found = planned(CPU, 4)
    assert found.step.job.program.element_bytes == 4
    held = found.memory[0]
    assert held.gradients == held.weights  # 4 bytes each
    words = explain(found)
    assert "measured, 8 sizes from 16 to 64" in words and "8 bytes each: masters and moments of adamw" in words
    with pytest.raises(UserError, match=r"a run in bf16, and cpu is described for fp32: set it to false"):
        planned(CPU, 4, "deepspeed.bf16.enabled=true")
    with pytest.raises(UserError, match=r"a run in fp32, and a100-80gb is described for bf16: set it to true"):
        planned(A100, 4, "deepspeed.bf16.enabled=false")


def test_ranks_on_oversubscribed_processors_are_slower() -> None:
    """With four ranks and processors for two, the step takes at least twice the work, and waits cost nothing more."""
    machine = replace(CPU, links=replace(CPU.links, gpus_per_node=4))
    alone, shared = (planned(replace(machine, at_once=n), 4).step for n in (4, 2))
    work = alone.pipeline * (1 - alone.bubble)
    assert shared.pipeline == pytest.approx(max(2 * work, alone.pipeline))
    assert shared.optimizer == pytest.approx(2 * alone.optimizer)
    assert planned(replace(machine, at_once=4), 4).step == planned(machine, 4).step


def test_host_time_adds_up_if_the_host_computes() -> None:
    parallel, serial = (
        planned(replace(CPU, host_computes=c), 2, "parallel.tp=1", "parallel.sequence_parallel=false")
        for c in (False, True)
    )
    assert serial.step.pipeline > parallel.step.pipeline


def test_search_ranks_layouts_of_a_measured_machine_in_its_dtype() -> None:
    run = load_run(str(REPO / "ds_configs/quickstart.yaml"), ["parallel={}"])
    found = search(run, 4, CPU, 3)
    assert [item.run.deepspeed["bf16"] for item in found.best] == [{"enabled": False}] * 3


def test_a_description_with_curves_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "cpu.yaml"
    path.write_text(hardware.text(CPU))
    assert hardware.load(str(path)) == CPU


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"dtype": "int8"}, r"dtype = 'int8' is not bf16 or fp32"),
        ({"peak_tflops": None}, r"not a device whose fp32 peak layout/flops.py has, such as A100; give its peak_t"),
        ({"at_once": 0}, r"at_once = 0 is not positive"),
        (with_curves(products=ProductRates((64, 16), PRODUCTS.tflops)), r"products.tflops has sizes \[64, 16\]"),
        (with_curves(products=ProductRates((16,), PRODUCTS.tflops)), r"products.tflops has 2 entries for 1 sizes"),
        (with_curves(kernels=Kernels(RATE, RATE, RATE, Rate((1.0,), (0.0,)))), r"kernels.optimizer holds a value that"),
        (
            with_curves(collectives=(Collective("cast", 2, 1, (1,), (1.0,)),)),
            r"operation = 'cast' is not one of all_red",
        ),
        (with_curves(collectives=(Collective("send", 2, 1, (), ()),)), r"collectives.0 has sizes \[\]"),
    ],
)
def test_a_description_that_cannot_be_interpolated_is_refused(changed: dict, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(hardware.text(replace(CPU, **changed)))
    with pytest.raises(UserError, match=rf"bad.yaml: .*{words}"):
        hardware.load(str(path))


def test_without_a_pipeline_gradients_are_reduced_after_the_last_one() -> None:
    """DeepSpeed's BF16_Optimizer: one exposed all-reduce of fp32 gradients, and an all-gather of weights."""
    step = planned(A100, 2, "parallel.pp=1", "parallel.tp=1", "parallel.sequence_parallel=false").step
    parameters = 6_450_176  # without the norms
    expected = all_reduce(A100, RankGroup(2), 4.0 * parameters) + all_gather(A100, RankGroup(2), 2.0 * parameters)
    assert step.reduction == pytest.approx(expected, rel=1e-3)


def test_the_planner_knows_the_operations_that_ranks_measure() -> None:
    from llama_ds.parallel.sweep import CALLS

    assert set(OPERATIONS) == set(CALLS)


def test_the_spread_of_ranks_leaves_slow_ones_out_and_needs_eight() -> None:
    """Rates of 99 to 101 in equal parts have a sample standard deviation of sqrt(8 / 7) percent; 50 is a slow rank."""

    def found(*rates: float) -> dict[str, object]:
        return {"ranks": {str(rank): {"products": {"tflops": [[[rate]]]}} for rank, rate in enumerate(rates)}}

    measured = spread_of_ranks(found(99, 99, 99, 99, 101, 101, 101, 101, 50))
    assert measured == pytest.approx(0.01 * math.sqrt(8 / 7) * 100 / 99, rel=0.01)  # the median rate is 99
    assert spread_of_ranks(found(99, 99, 99, 101, 101, 101, 101, 50)) is None
