"""`profile_run.py record` profiles the real job and merges what ranks recorded; hosts' clocks are aligned in it."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, TRAIN, Finished, alone, environment, forked, python, run, succeed
from tiny_run import DATA, GLOBAL_BATCH, SEQ_LEN, Run

from llama_ds.machine import free_port
from llama_ds.perf.trace.files import analyse_folder
from llama_ds.perf.trace.merge import merge
from tests import time_namespaces
from tests.chrome_format import check_chrome_format
from tests.hosts import Hosts, missing

MICRO_BATCHES = 4  # 8 rows by 2
LAYERS = 2
MakeRun = Callable[..., Run]


def record(made: Run, *arguments: object, **variables: str) -> Finished:
    tool = (ROOT / "tools" / "profile_run.py", "record", made.file, *arguments)
    named = [f"{name}={value}" for name, value in variables.items()]
    return run(["env", *named, *python(*tool)] if named else alone(*tool), made.log)


def merged_events(path: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def slices(events: list[dict[str, Any]], rank: int, *cats: str) -> list[tuple[float, float]]:
    found = [e for e in events if e["ph"] == "X" and e["pid"] == rank and e["cat"] in cats]
    return [(e["ts"], e["ts"] + e["dur"]) for e in found]


def arrows(events: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return when messages were sent, and when the waits for them ended."""
    sent, came = ({e["id"]: e["ts"] for e in events if e["ph"] == ph and e["cat"] == "message"} for ph in "sf")
    assert sent.keys() == came.keys()
    return [(sent[number], came[number]) for number in sent]


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_job_on_two_hosts_is_profiled(make_run: MakeRun, tmp_path: Path) -> None:
    """pp 2 x tp 2: the products of all ranks are the model's, each within its forward or backward."""
    layout = {"parallel.pp": 2, "parallel.tp": 2, "parallel.sequence_parallel": True}
    made = make_run("profiled", {**layout, "model.num_hidden_layers": LAYERS, "checkpoint.interval": 1})
    out = tmp_path / "profile"
    asked = ("--ranks", "all", "--steps", 1, "--warmup", 1, "--json", "--fail-if", "other>=100")
    with Hosts(2, tmp_path / "hosts", subnet=92) as hosts:
        hostfile = hosts.write_hostfile(tmp_path / "hostfile", 2)
        done = record(made, "--out", out, *asked, "--hostfile", hostfile, **hosts.environment)
    assert done.code == 0, done.output[-4000:]
    assert "step 3/6" in done.output and "step 4/6" not in done.output
    assert not made.dir.exists() and not (out / "checkpoints").exists(), "nothing of the run itself is touched"

    found = json.loads(done.output[done.output.index("\n{") :])
    assert (found["ranks"], found["steps"], found["profiled_ranks"]) == (4, 1, [0, 1, 2, 3])
    assert found["communication"]["p2p"]["under_way_ms"] > 0
    metrics = found["metrics"]
    parts = ("compute", "recompute", "optimizer", "data", "bubble", "exposed", "other")
    assert sum(metrics[part] for part in parts) == pytest.approx(100)
    assert metrics["exposed_tp"] > 0 and metrics["bubble"] > 0 and 0 < metrics["gemm"] <= 100
    assert metrics["ideal_bubble"] == pytest.approx(20)  # (p - 1) / (m + p - 1)
    model = DATA["model"]
    hidden, head_dim = model["hidden_size"], model["hidden_size"] // model["num_attention_heads"]
    wide = (2 * model["num_attention_heads"] + 2 * model["num_key_value_heads"]) * head_dim  # q, o, k, v
    matrices = LAYERS * hidden * (wide + 3 * model["intermediate_size"])
    matrices += model["vocab_size"] * hidden
    forward_and_backward = 3 * 2 * matrices * GLOBAL_BATCH * SEQ_LEN
    assert sum(products["flops"] for products in found["products"].values()) == forward_and_backward

    events = merged_events(Path(found["trace"]))
    check_chrome_format(events)
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {r: f"rank {r}: pp {r // 2} dp 0 tp {r % 2}, node{r // 2 + 1}" for r in range(4)}
    for rank in range(4):
        computations = slices(events, rank, "F", "BW")
        assert len(computations) == 2 * 2 * MICRO_BATCHES  # one recorded and one profiled step
        products = [e for e in events if e["pid"] == rank and e["name"] in ("aten::mm", "aten::addmm_")]
        assert products
        for event in products:
            begin, end = event["ts"], event["ts"] + event["dur"]
            assert any(a <= begin and end <= b for a, b in computations), (rank, event)
        assert slices(events, rank, "tp") and slices(events, rank, "wait tp")
    ways = arrows(events)
    assert len(ways) == 2 * 2 * 2 * MICRO_BATCHES  # steps, tp ranks, there and back
    assert all(sent <= came for sent, came in ways)


@pytest.mark.slow
@pytest.mark.skipif(time_namespaces.missing() is not None, reason=str(time_namespaces.missing()))
def test_clocks_of_hosts_are_aligned(make_run: MakeRun) -> None:
    """Two stages on hosts whose clocks are 4960 seconds apart: messages come after they were sent, and soon."""
    made = make_run("two_clocks", {"parallel.pp": 2, "logging.trace_step": 2, "logging.profile_ranks": [1]})
    own = environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [["env", f"RANK={r}", f"LOCAL_RANK={r}", sys.executable, TRAIN, str(made.file)] for r in range(2)]
    output, _ = time_namespaces.run_hosts({5000: ranks[:1], 40: ranks[1:]}, own, 240)
    folder = made.dir / "trace"
    first, last = (json.loads((folder / f"rank0000{r}.json").read_text()) for r in range(2))
    assert [point[1:] for point in first["clock"]] == [[0, 0], [0, 0]]
    for _, offset, error in last["clock"]:
        assert abs(offset - 4960e6) <= error < 1e5
    found = analyse_folder(made.dir)
    assert found.clock_error_us == max(point[2] for point in last["clock"])
    events = merged_events(merge(folder))
    check_chrome_format(events)
    ways = arrows(events)
    assert len(ways) == 2 * 2 * MICRO_BATCHES
    for sent, came in ways:
        assert -found.clock_error_us <= came - sent < 60e6
    computations = slices(events, 1, "F", "BW")
    products = [e for e in events if e["pid"] == 1 and e["name"] == "aten::mm"]
    assert products and all(any(a <= e["ts"] <= b for a, b in computations) for e in products)
    assert "recorded steps from step 2 on" in output


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_one_stage_is_recorded(zero: int, make_run: MakeRun) -> None:
    """pp = 1: micro-batches by forward, backward and data, and DeepSpeed's collectives by kind, waited for or not.

    The second run ends before the last step that it should record.
    """
    steps = 2 if zero == 1 else 3
    changes = {"deepspeed.zero_optimization.stage": zero, "logging.trace_step": 2}
    changes["logging.trace_steps"] = 2 if zero == 1 else 9
    if zero == 3:
        changes["deepspeed.zero_optimization.stage3_param_persistence_threshold"] = 0  # gather what is small too
    made = make_run(f"one_stage_{zero}", {**changes, "checkpoint.stop_at": 4, "parallel.recompute": "full"})
    succeed(forked(2, TRAIN, made.file), made.log)
    recorded = [json.loads((made.dir / "trace" / f"rank0000{r}.json").read_text())["events"] for r in range(2)]
    micro_batches = GLOBAL_BATCH // 2 // 2
    for events in recorded:
        counts = {what: sum(e[0] == what for e in events) for what in ("step", "F", "BW", "wait data", "recompute")}
        per_step = {"step": 1, "F": micro_batches, "BW": micro_batches, "wait data": micro_batches}
        per_step["recompute"] = micro_batches * DATA["model"]["num_hidden_layers"]
        assert counts == {what: steps * count for what, count in per_step.items()}
    found = analyse_folder(made.dir)
    parts = ("compute", "recompute", "optimizer", "data", "bubble", "exposed", "other")
    assert sum(found.metrics[part] or 0.0 for part in parts) == pytest.approx(100)
    assert found.metrics["bubble"] == found.metrics["ideal_bubble"] == 0 and (found.metrics["recompute"] or 0) > 0
    for kind in ("reduction", "weights", "agreement"):
        assert found.communication[kind]["under_way_ms"] > 0, kind
    forwards = [(begin, end) for what, begin, end, *_ in recorded[0] if what == "F"]
    gathers = [begin for what, begin, *_ in recorded[0] if what == "gather"]
    assert any(a <= g <= b for g in gathers for a, b in forwards) == (zero == 3)


def test_mistakes_are_told_before_anything_starts(make_run: MakeRun, tmp_path: Path) -> None:
    made = make_run("not_profiled", {"parallel.pp": 2})
    for arguments, message in (
        (("--ranks", "0,2"), "--ranks 2: the layout has 2 ranks, pp 2 x dp 1 x tp 1; use 0 to 1"),
        (("--ranks", "frist"), "did you mean 'first'?"),
        (("--num-ranks", 3), "world size 3 is not a multiple of parallel.pp 2"),
        (("--steps", 0), "--steps: '0' is not a whole number of 1 or more"),
        (
            ("--steps", 3),
            "fewer than the 9 of --warmup 3, --steps 3 and as many for the profiler",
        ),
        (("--fail-if", "bubble"), "--fail-if 'bubble': write METRIC"),
        (("--hostfile", tmp_path / "none"), str(tmp_path / "none")),
    ):
        done = record(made, "--out", tmp_path / "out", *arguments)
        assert done.code == 2 and len(done.errors) == 1 and message in done.errors[0], done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_failing_job_says_why_once(make_run: MakeRun, tmp_path: Path) -> None:
    made = make_run("failing", {"data.tokenizer": str(tmp_path / "absent.model")})
    done = record(made, "--out", tmp_path / "out", "--steps", 1, "--warmup", 1, "--num-ranks", 1)
    assert done.code == 2 and done.output.count("absent.model") == 1, done.output
    assert "Traceback" not in done.output
