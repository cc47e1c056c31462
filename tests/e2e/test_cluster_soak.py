"""Random faults in one job on real hosts, one after another: its result equals that of an undisturbed run.

SOAK_FAULTS and SOAK_SEED set the number and choice of faults, SOAK_RECORD a file for the measurements:

    SOAK_FAULTS=30 SOAK_RECORD=soak.json python -m pytest tests/e2e/test_cluster_soak.py
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster import Job, send, slow_links, start
from launching import TRAIN, forked, succeed
from tiny_run import Run

from tests.hosts import Hosts, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

FAULTS = int(os.environ.get("SOAK_FAULTS", "3"))
SEED = int(os.environ.get("SOAK_SEED", "447"))  # its first three are the kinds that test_cluster_faults.py lacks
RECORD = os.environ.get("SOAK_RECORD", "")
KINDS = {  # fault -> outcome that the supervisor must report
    "killed": "death",
    "killed while saving": "death",
    "stopped": "hang",
    "cut off": "host lost",
    "powered off": "host lost",
    "pdsh": "launcher",
    "launcher of a host": None,  # its ranks do not need it and continue
    "warm process": None,
}
WARM = {"pdsh": "warm process", "launcher of a host": "warm process"}  # what stands for them after a warm restart
ENDS = ("death", "failure", "hang", "host lost", "launcher", "done", "gave up", "mistake")
NAMES = ("node1", "node2", "node3")  # the last is a spare
LAYOUT = {
    "model.num_hidden_layers": 2,
    "training.steps": 25 * FAULTS + 100,  # faults come by progress: enough for all
    "checkpoint.interval": 5,
    "checkpoint.keep_last": 3,
    "evaluation.interval": 0,
}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(len(NAMES), tmp_path_factory.mktemp("hosts"), subnet=94, before=slow_links(16)) as those:
        yield those


@pytest.fixture(scope="module")
def whole(make_run: Callable[..., Run]) -> Run:
    """The undisturbed run: two ranks on this machine."""
    run = make_run("whole", LAYOUT)
    succeed(forked(2, TRAIN, run.file), run.log)
    return run


def test_the_losses_are_those_of_a_run_without_faults(hosts: Hosts, whole: Run, make_run: Callable[..., Run]) -> None:
    """Losses are equal to the bit, the exit code is 0, no process is left, and each fault is blamed on its rank."""
    run = make_run("soak", LAYOUT)
    spares = hosts.write_hostfile(run.file.with_suffix(".spares"), 1, NAMES[2:])
    began = time.monotonic()
    job = start(run, hosts, NAMES[:2], 1, "--supervise", "--spares", str(spares), orphan_s=12)
    chance = random.Random(SEED)
    kinds = [kind for _ in range(-(-FAULTS // len(KINDS))) for kind in chance.sample([*KINDS], len(KINDS))][:FAULTS]
    faults: list[dict[str, Any]] = []
    try:
        for kind in kinds:
            faults.append(inject(kind, job, hosts, chance))
        code = job.finish()
    finally:
        job.kill()
        print(*faults, sep="\n")
    seconds = time.monotonic() - began
    equal = run.losses == whole.losses and run.validation_loss == whole.validation_loss
    if RECORD:
        record(Path(RECORD), job, faults, seconds, equal)
    assert code == 0, job.output[-4000:]
    assert len(run.losses) == LAYOUT["training.steps"]
    assert equal
    assert not job.left_running()
    for fault in faults:
        assert fault["found"] == KINDS[fault["kind"]], fault
        assert fault["restarts"] == (fault["found"] is not None), fault
        assert fault["ranks"] == ([fault["rank"]] if fault["found"] in ("death", "hang", "host lost") else []), fault


def inject(kind: str, job: Job, hosts: Hosts, chance: random.Random) -> dict[str, Any]:
    """Let the job make progress, put a fault into it and wait until it makes progress again; return a record."""
    goal = job.step + chance.randint(2, 12) + (60 if kind == "stopped" else 0)  # a hang needs a known step time
    job.wait_for(lambda: job.step >= goal)
    attempt = job.named("attempt started")[-1]
    kind = WARM.get(kind, kind) if attempt.get("warm") else kind
    rank_hosts = list(attempt["hosts"])
    rank = chance.randrange(len(rank_hosts))
    host = rank_hosts[rank]
    seen, step = len(job.events), job.step
    repair = put(kind, job, hosts, host, rank)
    began, wall, cut_short = time.monotonic(), time.time(), job.saves
    if KINDS[kind]:
        job.wait_for(lambda: any(event["event"] in ENDS for event in job.events[seen:]))
        job.wait_for(lambda: any(event["event"] == "ranks joined" for event in job.events[seen:]))
    job.wait_for(lambda: job.step > step)
    recovered_s = time.monotonic() - began
    repair()
    new = job.events[seen:]
    first = next((event for event in new if event["event"] in ("detected", *ENDS)), None)
    ended = next((event for event in new if event["event"] in ENDS), {})
    return {
        "kind": kind,
        "step": step,
        **({"save_cut_short": cut_short} if kind == "killed while saving" else {}),
        "rank": rank,
        "host": host,
        "detected_s": round(first["time"] - wall, 2) if first else None,
        "went_on_s": round(recovered_s, 2),
        "found": ended.get("event"),
        "ranks": ended.get("ranks", []),
        "hosts": ended.get("hosts", []),
        "restarts": sum(event["event"] == "restart" for event in new),
    }


def put(kind: str, job: Job, hosts: Hosts, host: str, rank: int) -> Callable[[], object]:
    """Put a fault into a job; return a function that repairs the host."""
    if kind == "cut off":
        hosts.unplug(host)
        return lambda: hosts.plug(host)
    if kind == "powered off":
        hosts.power_off(host)
        return lambda: hosts.start(host)
    if kind == "pdsh":
        every = psutil.Process(job.process.pid).children(recursive=True)
        send(next(process for process in every if process.name() == "pdsh.bin"), signal.SIGKILL)
        return lambda: None
    if kind == "launcher of a host":
        send(hosts.processes(host, "deepspeed.launcher.launch")[-1], signal.SIGKILL)
        return lambda: None
    if kind == "warm process":
        found = hosts.processes(host, "llama_ds/standby.py")
        if found:  # before an attempt's first step there is none
            send(found[0], signal.SIGKILL)
        return lambda: None
    (victim,) = job.ranks(host)
    if kind == "killed while saving":
        job.wait_for_save()
    send(victim, signal.SIGSTOP if kind == "stopped" else signal.SIGKILL)
    return lambda: None


def record(path: Path, job: Job, faults: list[dict[str, Any]], seconds: float, equal: bool) -> None:
    """Write the measurements of the job to `path`."""
    losses = json.dumps(job.run.losses).encode()
    path.write_text(
        json.dumps(
            {
                "date": date.today().isoformat(),
                "machine": "2-core AMD EPYC VM, CPU only",
                "load_1_min": round(os.getloadavg()[0], 2),
                "seed": SEED,
                "steps": LAYOUT["training.steps"],
                "seconds": round(seconds, 1),
                "restarts": len(job.named("restart")),
                "losses_equal": equal,
                "losses_sha256": hashlib.sha256(losses).hexdigest(),
                "faults": faults,
            },
            indent=1,
        )
        + "\n"
    )
