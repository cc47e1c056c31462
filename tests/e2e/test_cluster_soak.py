"""Random faults in one job on real hosts, one after another: its result equals that of an undisturbed run.

Variables change what is done: SOAK_EVERY_S (seconds between faults), SOAK_FAULTS (their number), SOAK_KINDS (all, or
names separated by commas), SOAK_SEED (shuffles them), SOAK_RECORD (a file for the measurements), SOAK_COLD (anything:
without warm processes and checkpoints in memory), SOAK_KEEP (anything: with --keep-ranks), SOAK_SUBNET (another run may
use the usual one). One hour:

    SOAK_EVERY_S=120 SOAK_FAULTS=29 SOAK_KINDS=all SOAK_SEED=1 SOAK_RECORD=soak.json \
        python -m pytest tests/e2e/test_cluster_soak.py
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from cluster import Job, slow_links, start
from faults import DISK_BYTES, FLIPS, KINDS, LINK_MBIT, WARM, Injected, Site, inject, request_flip
from launching import TRAIN, forked, succeed
from tiny_run import Run

from llama_ds.experiments.attempts import ENDS
from llama_ds.experiments.goodput import goodput
from llama_ds.experiments.goodput_report import as_data
from llama_ds.experiments.records import read_run
from llama_ds.machine import cpu_name
from tests.hosts import Hosts, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

EVERY_S = float(os.environ.get("SOAK_EVERY_S", "5"))
QUICK = "launcher of a host,pdsh,state in memory,weights,disk full,two hosts at once"  # test_cluster_faults.py: more
NAMED = os.environ.get("SOAK_KINDS", QUICK)
FAULTS = int(os.environ.get("SOAK_FAULTS", "6"))
SEED = os.environ.get("SOAK_SEED", "")
RECORD = os.environ.get("SOAK_RECORD", "")
COLD, KEEP = bool(os.environ.get("SOAK_COLD")), bool(os.environ.get("SOAK_KEEP"))
SUBNET = int(os.environ.get("SOAK_SUBNET", "84"))
NAMES = ("node1", "node2", "node3", "node4", "node5")  # the last two are spares
# A busy machine takes longer to hear of a rank, and for a step; measurements need one that is not.
PATIENCE = {"orphan_s": 6, "hang_min_s": 8} if RECORD else {"orphan_s": 12}
RANKS = 3
LAYOUT: dict[str, Any] = {
    "model.num_hidden_layers": 2,
    "training.global_batch": 6,
    "training.steps": 20_000,  # more than there will be: the job is asked to end
    "optimizer.lr": 1e-3,
    "evaluation.rows": 0,
    "deepspeed.bf16.enabled": True,
}
GUARDED: dict[str, Any] = {
    "checkpoint.interval": 10,
    "checkpoint.keep_last": 3,
    "checkpoint.memory_interval": 0 if COLD else 1,
    "checkpoint.compare_replicas": 1,
    "checkpoint.compare_repeats": 1,
    "checkpoint.compare_norms": True,
    "checkpoint.compare_states": True,
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system for the run, which the hosts share."""
    folder = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True)
    yield folder
    if RECORD:  # the runs, to look at
        shutil.copytree(folder, f"{RECORD}.runs", dirs_exist_ok=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    with Hosts(len(NAMES), folder, subnet=SUBNET, before=slow_links(LINK_MBIT)) as those:
        yield those


def test_the_losses_are_those_of_a_run_without_faults(
    hosts: Hosts, disk: Path, make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are equal to the bit, the exit code is 0, no process is left, and each fault is blamed on its rank."""
    patches = shutil.copytree(Path(__file__).parent / "flipping", tmp_path / "flipping")
    monkeypatch.setenv("PYTHONPATH", f"{patches}:{os.environ.get('PYTHONPATH', '')}")
    memory = tmp_path / "memory"
    memory.mkdir()
    changes = {"checkpoint.memory_folder": str(memory), "output_dir": str(disk)}
    run = Run(make_run("soak", LAYOUT | GUARDED | changes).file, disk / "soak")
    spares = hosts.write_hostfile(run.file.with_suffix(".spares"), 1, NAMES[RANKS:])
    options = ("--supervise", "--spares", str(spares), *(["--no-warm-processes"] if COLD else []))
    options = (*options, "--keep-ranks", "--leave-s", "60") if KEEP else options
    job = start(run, hosts, NAMES[:RANKS], 1, *options, **PATIENCE)
    chance = random.Random(int(SEED or 0))
    site = Site(job, hosts, memory, disk, patches, chance)
    every = list(KINDS) if NAMED == "all" else NAMED.split(",")
    rounds = [chance.sample(every, len(every)) if SEED else every for _ in range(-(-FAULTS // len(every)))]
    kinds = list(itertools.chain(*rounds))[:FAULTS]
    faults: list[dict[str, Any]] = []
    try:
        job.wait_for_attempt(1)
        began = time.monotonic()
        for number, kind in enumerate(kinds, 1):
            pause(began + number * EVERY_S, job)
            faults.append(disturb(kind, site))
            print(faults[-1], flush=True)
            record(job, faults)
        pause(began + (FAULTS + 1) * EVERY_S, job)
        job.process.send_signal(signal.SIGTERM)
        code = job.finish()
    finally:
        job.kill()
    assert code == 0, job.output[-4000:]
    assert not job.left_running()
    whole = make_run("whole", LAYOUT | {"checkpoint.stop_at": len(run.losses)})
    succeed(forked(RANKS, TRAIN, whole.file), whole.log)
    record(job, faults, run.losses, whole.losses)
    assert run.losses == whole.losses
    accounts = [line for line in run.metrics if "effective_share" in line]
    assert accounts[-1]["failures"] == sum(fault["restarts"] for fault in faults)
    assert 0 < accounts[-1]["effective_share"] < 1 and accounts[-1]["mtbf_s"] > 0
    for fault in faults:
        assert fault["found"] == KINDS[fault["kind"]], fault
        assert fault["restarts"] == (fault["found"] is not None), fault
        if fault["found"] in ("death", "hang", "host lost", "corruption"):
            assert fault["ranks"] and set(fault["ranks"]) <= set(fault["of_ranks"]), fault
        if KEEP and fault["found"] in ("death", "host lost"):
            assert fault["kept"] == [rank for rank in range(RANKS) if rank not in fault["of_ranks"]], fault


def pause(until: float, job: Job) -> None:
    """Wait until a monotonic time, while the job runs."""
    while (left := until - time.monotonic()) > 0:
        assert job.process.poll() is None, job.output[-4000:]
        time.sleep(min(left, 0.5))


def disturb(kind: str, site: Site) -> dict[str, Any]:
    """Let the job make progress, put a fault into it and wait until it makes progress again; return a record."""
    job = site.job
    job.wait_for_steps(12 if kind == "stopped" else 3)  # a hang needs a known step time
    attempt = job.named("attempt started")[-1]
    kind = WARM.get(kind, kind) if attempt.get("warm") else kind
    seen, step, attempts = len(job.events), job.step, len(job.named("attempt started"))
    injected = inject(kind, site)
    began, wall = time.monotonic(), time.time()
    if injected.lasts_s:
        pause(began + injected.lasts_s, job)
        injected.repair()
    if kind in FLIPS and KINDS[kind]:
        flip_again(kind, site, injected, seen)
    if KINDS[kind]:
        job.wait_for(lambda: any(event["event"] in ENDS for event in job.events[seen:]))
        job.wait_for(lambda: any(event["event"] == "ranks joined" for event in job.events[seen:]))
    ended = next((event for event in job.events[seen:] if event["event"] in ENDS), {})
    now = len(job.named("attempt started"))
    if now > attempts:
        job.wait_for(lambda: job.has_begun(now))
    job.wait_for(lambda: job.step > max(step, ended.get("step", 0)))
    went_on_s = time.monotonic() - began
    if not injected.lasts_s:
        injected.repair()
    stays = injected.hosts and injected.hosts[0] in job.named("attempt started")[-1]["hosts"]
    damaged = injected.about.get("damaged")
    resumed = job.resumed_at(now) if damaged else 0
    # Nobody reads the memory then.
    on_disk = damaged and resumed >= max(damaged) and resumed % GUARDED["checkpoint.interval"] == 0
    if kind.startswith("state") and stays and not on_disk:  # its sender refuses it, or the first rank at a restart
        refused = f"MEMORY CHECKPOINT: the state of rank {injected.ranks[0]} "
        log = job.folder / f"attempt_{now:02d}" / "logs" / f"rank_{0 if now > attempts else injected.ranks[0]:05d}.log"
        lines = job.wait_for(lambda: [line for line in log.read_text().splitlines() if refused in line])
        injected.about["refused"] = [line.partition(refused)[2] for line in lines]
    new = job.events[seen:]
    first = next((event for event in new if event["event"] in ("detected", *ENDS)), None)
    return {
        "kind": kind,
        "at_s": round(wall - job.events[0]["time"], 1),
        "of_ranks": injected.ranks,
        "of_hosts": injected.hosts,
        **injected.about,
        "detected_s": round(first["time"] - wall, 2) if first else None,
        "went_on_s": round(went_on_s, 2),
        "lost_steps": max(ended["step"] - job.resumed_at(now), 0) if ended and now > attempts else 0,
        "found": ended.get("event"),
        "ranks": ended.get("ranks", []),
        "hosts": ended.get("hosts", []),
        "kept": job.named("attempt started")[-1].get("kept", []),
        "restarts": sum(event["event"] == "restart" for event in new),
    }


def flip_again(kind: str, site: Site, injected: Injected, seen: int) -> None:
    """Flip other bits until one ends the attempt: a low bit of an activation may change no gradient."""
    job = site.job
    for number in range(5):
        at = job.step
        job.wait_for(lambda at=at: job.step > at + 5 or any(event["event"] in ENDS for event in job.events[seen:]))
        if any(event["event"] in ENDS for event in job.events[seen:]):
            return
        request_flip(kind, injected.ranks[0], site)
        injected.about["flips_without_effect"] = number + 1


def record(
    job: Job, faults: list[dict[str, Any]], losses: list[float] | None = None, whole: list[float] | None = None
) -> None:
    """Write the measurements to the file that is asked for, as far as they are known."""
    if not RECORD:
        return
    known: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores of {cpu_name()}, CPU only",
        "load_1_min": round(os.getloadavg()[0], 2),
        "seed": SEED,
        "every_s": EVERY_S,
        "cold": COLD,
        "keeps_ranks": KEEP,
        "ranks": RANKS,
        "hosts": len(NAMES),
    }
    if losses is not None:
        sums = [hashlib.sha256(json.dumps(one).encode()).hexdigest() for one in (losses, whole)]
        known |= {"steps": len(losses), "losses_equal": losses == whole}
        known |= {"losses_sha256": sums[0], "undisturbed_sha256": sums[1]}
    known["report"] = as_data(goodput(read_run(str(job.run.dir)), 7 * 86400), 86400)
    Path(RECORD).write_text(json.dumps({**known, "faults": faults}, indent=1) + "\n")
