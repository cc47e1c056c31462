"""Noise in a region of the data causes a loss spike: the supervisor goes back and skips the region."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cluster import Job, start_here
from launching import TRAIN, forked, succeed
from tiny_run import SEQ_LEN, Corpus, Run

from llama_ds.config.run_file import load_run
from llama_ds.data.building.build import build_source
from llama_ds.data.source import tar_rows
from llama_ds.data.source.manifest import checksums_name, parse_manifest, shard_name
from llama_ds.data.stream import open_data

pytestmark = pytest.mark.slow

STEPS, INTERVAL = 110, 20
BAD = range(80, 88)  # steps with noise, counted from 0
REWIND, SKIP = 10, 20  # the 20 skipped steps of data begin 10 steps before the spike and include the noise
SPIKE = BAD.start + 1  # the first step with a high loss, counted from 1
BACK = SPIKE - REWIND
NOISE = np.dtype("<u2")
UNTIMED = ("killed", "progress", "waiting", "warm processes")  # events at no certain place among the others


@pytest.fixture(scope="module")
def spoilt(corpus: Corpus, make_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Changes to the tiny run: one source, with noise in the rows that the steps of BAD read."""
    root, text = tmp_path_factory.mktemp("spoilt"), Path(sysconfig.get_paths()["stdlib"], "asyncio")
    build_source("code", str(text), str(corpus.tokenizer), str(root), SEQ_LEN, 0.02, rows_per_shard=64)
    folder = root / "code"
    changes = {
        "data.sources": [{"name": "code", "path": str(folder), "weight": 1.0}],
        "model.num_hidden_layers": 2,
        "training.global_batch": 4,
        "training.steps": STEPS,
        "checkpoint.interval": INTERVAL,
        "logging.norms": 1,
    }
    order = open_data(load_run(str(make_run("order", changes).file), [])).order
    rows = np.concatenate([order.at(step).row for step in BAD])
    spoil(folder, rows)
    return changes


def spoil(folder: Path, rows: np.ndarray) -> None:
    """Overwrite training rows of a source with random rare ids, and update its checksums."""
    split = parse_manifest((folder / "manifest.json").read_bytes(), str(folder)).splits["train"]
    draw = np.random.default_rng(0)
    sums = folder / checksums_name("train", 0)
    lines = sums.read_text().splitlines()
    for shard in range(split.shards):
        first, last = split.shard_rows(shard).start, split.shard_rows(shard).stop
        path = folder / shard_name("train", shard)
        content = bytearray(path.read_bytes())
        for row in rows[(rows >= first) & (rows < last)] - first:
            offset = int(row) * tar_rows.stride(SEQ_LEN, NOISE) + tar_rows.BLOCK
            noise = draw.integers(140, 256, SEQ_LEN + 1).astype(NOISE).tobytes()  # ids of bytes above ASCII
            content[offset : offset + len(noise)] = noise
        path.write_bytes(content)
        lines[shard] = f"{hashlib.sha256(content).hexdigest()}  {path.name}"
    sums.write_text("".join(f"{line}\n" for line in lines))


def skipping(at: int) -> str:
    return f"data.skip=[{{at_step: {at}, steps: {SKIP}}}]"


def supervise(run: Run, ranks: int, rewind: int) -> tuple[int, Job]:
    """Run on this machine under a supervisor with rewinds; return the exit code and the job."""
    job = start_here(run, ranks, "--supervise", "--rewind-steps", str(rewind), "--skip-steps", str(SKIP))
    return job.finish(), job


def test_the_job_goes_back_before_the_spike_and_leaves_its_data_out(
    spoilt: dict[str, object], make_run: Callable[..., Run]
) -> None:
    """The result equals that of a run whose run file skips the region from the start."""
    run, told = make_run("spoilt", spoilt), make_run("told", spoilt)
    code, job = supervise(run, 2, REWIND)
    assert code == 0, job.output[-4000:]
    succeed(forked(2, TRAIN, told.file, skipping(BACK)), told.log)
    assert run.losses == told.losses
    assert run.validation_loss == told.validation_loss

    (spike,) = job.named("spike")
    assert (spike["step"], spike["hosts"]) == (SPIKE, [])
    assert "LOSS SPIKE: " in job.output and f" at step {SPIKE}, after " in job.output
    (norms,) = job.named("norms")
    rise = re.fullmatch(r"the gradient of .+ rose first, at step (\d+), to .+ times its median", norms["text"])
    assert rise and SPIKE - 8 < int(rise[1]) <= SPIKE, norms["text"]
    (rewind,) = job.named("rewind")
    assert rewind["to"] == BACK
    assert f"going back to step {BACK}, and skipping {SKIP} steps of data" in job.output
    assert [e["event"] for e in job.events if e["event"] not in UNTIMED] == [
        *("job started", "attempt started", "ranks joined", "spike", "norms", "rewind", "restart"),
        *("attempt started", "ranks joined", "done", "job ended"),
    ]
    assert f"resumed at step {BACK // INTERVAL * INTERVAL} of {STEPS}" in job.output
    assert not job.left_running()


def test_without_a_checkpoint_so_far_back_it_ends_and_says_why(
    spoilt: dict[str, object], make_run: Callable[..., Run]
) -> None:
    """The job must not continue after the spike or start from scratch; existing checkpoints stay unchanged."""
    run = make_run("too_early", spoilt)
    code, job = supervise(run, 1, SPIKE + 100)  # before the first step
    assert code == 2, job.output[-4000:]
    (error,) = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert f"no checkpoint at or before checkpoint.rewind_to = 1, the first is step_{INTERVAL:08d}" in error
    assert [len(job.named(name)) for name in ("spike", "rewind", "attempt started", "mistake")] == [1, 1, 2, 1]
    assert not list(run.checkpoints.glob("*.rewound"))
    assert run.newest.name >= f"step_{BAD.start // INTERVAL * INTERVAL:08d}"
    assert not job.left_running()
