"""A run has the same losses with every supported launcher."""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Callable

import pytest
from launching import ROOT, TRAIN, alone, deepspeed, forked, mpirun, python, run, succeed, torchrun
from tiny_run import GLOBAL_BATCH, SEQ_LEN, STEPS, Run

from llama_ds.machine import cpu_name

PROSE = "bits_per_byte/prose"
STEP_KEYS = [
    *("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "tokens_per_s_per_gpu", "mfu", "hfu"),
    *("step_s", "data_wait_s", "peak_mem_gib"),
]


@pytest.mark.slow
def test_every_launcher_trains_the_same_run(trained: Callable[[str], Run], make_run: Callable[..., Run]) -> None:
    pipeline = trained("pp2")
    for launch in (deepspeed, torchrun, mpirun):
        started = make_run(launch.__name__, {})
        succeed(launch(2, TRAIN, started.file, "parallel.pp=2"), started.log)
        assert started.losses == pipeline.losses, launch.__name__
        assert started.validation_loss == pipeline.validation_loss, launch.__name__


@pytest.mark.slow
def test_one_process_needs_no_launcher(trained: Callable[[str], Run]) -> None:
    one, pipeline = trained("alone"), trained("pp2")
    assert one.losses == pytest.approx(pipeline.losses, rel=1e-5)
    assert one.validation == pytest.approx(pipeline.validation, rel=1e-5), "also by source"


AND_SHOW_WHAT_IS_LEFT = """
import runpy, sys, threading
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
readers = [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
print(f"{len(readers)} readers left, compilers imported: {sorted({'torch._dynamo', 'setuptools'} & {*sys.modules})}")
"""


@pytest.mark.slow
def test_what_a_run_leaves_in_its_process(make_run: Callable[..., Run]) -> None:
    """A daemon thread in native code when the interpreter ends is an abort, now and then: "terminate called".

    Without torch's compiler, which nothing uses on a CPU, a rank starts in half the time; DeepSpeed's search for a C
    compiler, by setuptools, would take more.
    """
    started = make_run("left", {"training.steps": 3, "optimizer.warmup_steps": 1})
    output = succeed(python("-c", AND_SHOW_WHAT_IS_LEFT, TRAIN, started.file), started.log)
    assert "0 readers left, compilers imported: []" in output
    assert re.search(r"source (code|prose): [1-9]\d* of \d+ labels are filler after its last document", output)


@pytest.mark.slow
def test_document_mask_crosses_the_pipeline(make_run: Callable[..., Run]) -> None:
    mask = {"data.document_mask": True, "optimizer.lr": 1e-2}
    one, pipeline = make_run("mask_pp1", mask), make_run("mask_pp2", {**mask, "parallel.pp": 2})
    succeed(alone(TRAIN, one.file), one.log)
    succeed(forked(2, TRAIN, pipeline.file), pipeline.log)
    assert pipeline.losses == pytest.approx(one.losses, rel=1e-5)
    assert pipeline.validation_loss == pytest.approx(one.validation_loss, rel=1e-5)


def test_metrics_hold_what_they_promise(trained: Callable[[str], Run]) -> None:
    lines = [line for line in trained("pp2").metrics if "loss" in line]
    assert all(list(line) == STEP_KEYS for line in lines)
    assert [line["tokens"] for line in lines] == [(n + 1) * GLOBAL_BATCH * SEQ_LEN for n in range(STEPS)]
    assert all(line["mfu"] is None and line["hfu"] is None for line in lines), "the peak of a CPU is not known"
    assert all(line["tokens_per_s"] == pytest.approx(2 * line["tokens_per_s_per_gpu"]) for line in lines)


def test_a_start_records_its_machine(trained: Callable[[str], Run]) -> None:
    (line,) = map(json.loads, (trained("pp2").dir / "machines.jsonl").read_text().splitlines())
    assert (line["step"], line["ranks"]) == (0, 2) and line["device"] == cpu_name()
    assert {"llama_ds", "Python", "torch", "deepspeed"} <= line["versions"].keys()
    assert line["hosts"] == {socket.gethostname(): 2} and line["packages"]["torch"] == line["versions"]["torch"]
    assert any(word.endswith("train.py") for word in line["command"])
    assert json.loads((trained("pp2").dir / "deepspeed.json").read_text())["train_batch_size"] == GLOBAL_BATCH


def test_tensorboard_holds_the_same_losses_and_norms(trained: Callable[[str], Run]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pipeline = trained("pp2")
    events = EventAccumulator(str(pipeline.dir / "tensorboard"))
    events.Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in ("loss", "val_loss", PROSE)}
    # Event files hold float32, and so were the losses.
    assert scalars["loss"] == list(enumerate(pipeline.losses, start=1))
    assert scalars["val_loss"] == [(STEPS, pytest.approx(pipeline.validation_loss))]
    assert scalars[PROSE] == [(STEPS, pytest.approx(pipeline.validation[PROSE]))]
    norms = {line["step"]: line["norms"] for line in pipeline.metrics if "norms" in line}
    assert list(norms) == list(range(2, STEPS + 1, 2))
    total = {line["step"]: line["grad_norm"] for line in pipeline.metrics if "grad_norm" in line}
    for step, found in norms.items():
        every = [number for row in found["gradient"].values() for number in row]
        assert math.hypot(*every) == pytest.approx(total[step], rel=1e-5)
        assert len(every) == 4 * 9 + 3 and list(found) == ["gradient", "weight", "update", "activation"]
    third = [(event.step, event.value) for event in events.Scalars("norms/update/q_proj/3")]
    assert third == [(step, pytest.approx(found["update"]["q_proj"][2])) for step, found in norms.items()]


def test_dry_run_plans_2048_ranks_in_one_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    logs = tmp_path_factory.mktemp("dry_run")
    plan = (TRAIN, ROOT / "ds_configs" / "llama_65b.yaml", "--dry-run", "--world")
    output = succeed(alone(*plan, 2048), logs / "2048")
    assert "2,048 = pp" in output and "65.3B" in output, output
    refused = run(alone(*plan, 2047), logs / "2047")
    assert refused.code == 2
    assert "Traceback" not in refused.output
    assert len(refused.errors) == 1 and "world size 2047" in refused.errors[0], refused.output
