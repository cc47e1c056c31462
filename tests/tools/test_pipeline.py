"""tools/pipeline.py on simulated hosts with slow links: messages and gradient reductions overlap with compute."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from llama_ds.benchmarks.pipeline.contest import Contest
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.launch.namespaces import missing
from llama_ds.perf.trace.read import Event, RankRecord, read
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.num_hidden_layers=4", "model.vocab_size=512", "data.seq_len=64"]


def pipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.run(ROOT / "tools" / "pipeline.py", *arguments)


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_shaped_links_show_the_overlap(tmp_path: Path) -> None:
    """All hosts share one clock, so the order of events on different ranks can be compared."""
    schedules = ["deepspeed", "zb_h1+1"]
    done = pipeline(
        *("--pp", "2", "--dp", "2", "--rate-mbit", "50", "--delay-ms", "10", "--micro-batches", "4"),
        *("--repeats", "1", "--json", "--svg", str(tmp_path), "--keep", str(tmp_path / "traces"), *SMALL),
        *("--schedules", *schedules),
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]
    steps = json.loads(done.stdout)["steps"]
    assert list(steps) == schedules
    parts = ("compute", "recompute", "optimizer", "data", "bubble", "exposed", "other")
    for step in steps.values():
        assert sum(step[part] for part in parts) == pytest.approx(100)
    for name in schedules:
        assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")
    ranks = list(read(tmp_path / "traces" / "zb_h1+1"))
    first, last = ranks[0], ranks[2]  # both stages belong to one pipeline
    assert (first.coords.pp, last.coords.pp, first.coords.dp, last.coords.dp) == (0, 1, 0, 0)
    # The first stage computes its second micro-batch before the first one has arrived at the last stage.
    assert one(first, "F", 1).begin < one(last, "wait activation", 0).end
    # The last stage computes while a gradient is in flight.
    assert one(last, "F", 1).begin < one(first, "wait grad", 0).end
    for rank in ranks:
        begun = min(e.begin for e in rank.events if e.what == "reduce")
        backwards = max(e.end for e in rank.events if e.what in ("B", "BW", "W"))
        assert begun < backwards, "the first bucket is reduced during the backward of other layers"


def one(rank: RankRecord, what: str, micro_batch: int) -> Event:
    (found,) = [e for e in rank.events if e.what == what and e.micro_batch == micro_batch]
    return found


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--pp", "5", "--schedules", "zb"], "parallel.schedule = 'zb' is not"),
        (
            ["--pp", "3", "--schedules", "dualpipe_v", "--micro-batches", "5"],
            "5 micro-batches are fewer than 2 * pp = 6",
        ),
        (["--schedules", "zb_v+2:late"], "'zb_v+2:late' is not a schedule's name, +N for extra_warmup and :early"),
        (["--pace", "5", "3"], "--pace: 2 numbers; give 3, of forward, input and weight backward"),
        (["--pp", "7"], "parallel.pp = 7 is more than model.num_hidden_layers = 6"),
        (
            ["parallel.schedule=zb_v"],
            "parallel.schedule=zb_v would not hold: each schedule sets parallel.schedule; use",
        ),
        (["parallel={pp: 2}"], "each schedule sets parallel; override single keys, as parallel.KEY=VALUE"),
        (["--pp", "2", "--schedules", "1f1b", "--delay-ms", "5"], "--delay-ms 5 is of simulated links"),
        (["--pp", "2", "--schedules", "1f1b", "--pass-times", "1", "1", "1", "0"], "--pass-times 1 1 1 0: orders zb_v"),
        (["--pp", "2", "--schedules", "1f1b", "--keep", "setup.py"], "--keep setup.py: cannot be written"),
        (["--pp", "2", "--schedules", "1f1b", "--svg", "setup.py"], "--svg setup.py: cannot be written"),
        (["parallel.pass_times.0=3"], "each schedule sets parallel.pass_times.0; use --pass-times"),
        (["parallel.cp=2"], "leave it out, because ranks share no rows here"),
        (["deepspeed.bf16.enabled=true"], "each schedule sets deepspeed.bf16.enabled; use --dtype"),
        (["parallel.tp_chunk=2"], "parallel.tp_chunk is not a known key (did you mean 'tp_chunks'?)"),
    ],
)
def test_what_cannot_be_is_told_before_ranks_start(arguments: list[str], message: str) -> None:
    done = pipeline(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_other_overrides_of_the_layout_hold_for_every_schedule() -> None:
    overrides = ["parallel.joint_weight_gradients=2", "deepspeed.communication_data_type=bf16", SMALL[0]]
    contest = Contest("ds_configs/quickstart.yaml", overrides, ["zb_h1"], 2, 1, 2, 8, 1, "fp32", "none", None, 0.0, 1)
    for name in ("zb_h1+1", "zb_v:early"):
        run, layout = contest.contestant(name)
        assert (run.parallel.joint_weight_gradients, run.parallel.sequence_parallel, layout.dp) == (2, False, 2)
        assert deepspeed_config(run, layout, bf16_native=True)["communication_data_type"] == "bf16"
