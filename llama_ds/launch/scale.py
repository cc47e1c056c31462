"""Measures the cost of checking hundreds of hosts and supervising thousands of ranks, simulated on loopback."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import socket
import statistics
import subprocess
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from llama_ds.errors import UserError
from llama_ds.job.folder import Job
from llama_ds.job.wire import Beat, Kind, Phase, frame, frames, hello, new_nonce, pack_beat
from llama_ds.launch.command import build
from llama_ds.launch.hostfile import parse_hostfile, write_hostfile
from llama_ds.launch.preflight.examine import PreflightSettings
from llama_ds.launch.preflight.stubs import StubHosts
from llama_ds.launch.supervise import hang
from llama_ds.launch.supervise.attempt import TICK_S
from llama_ds.launch.supervise.events import Events
from llama_ds.launch.supervise.hang_detector import HangDetector, HangLimits
from llama_ds.launch.supervise.processes import HostProcesses
from llama_ds.launch.supervise.server import Server
from llama_ds.layout import placement, rank_map
from llama_ds.layout.axes import Axes
from llama_ds.machine import machine

TOKEN = bytes(32)
REPEATS = 7


def setting() -> dict[str, Any]:
    """Return the date and the machine of a measurement."""
    here = machine()
    here["load_1_min"] = round(here["load_1_min"], 2)
    return {"date": time.strftime("%Y-%m-%d"), "machine": here}


def measure(hosts: Mapping[str, int], axes: Axes, beat_s: float, seconds: float) -> dict[str, Any]:
    """Return the cost of a job on `hosts` for the launching machine: seconds, MiB, and the share of a core."""
    world = sum(hosts.values())
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "hostfile")
        write_hostfile(path, hosts)
        ranks = placement.place_ranks(hosts, axes)
        steps: dict[str, Callable[[], Any]] = {
            "parse the hostfile": lambda: parse_hostfile(path),
            "build the command": lambda: _command(path, hosts),
            "place the ranks": lambda: placement.place_ranks(hosts, axes),
            "check the placement": lambda: placement.findings(ranks),
            "rank map, table": lambda: rank_map.table(ranks),
            "rank map, SVG": lambda: rank_map.svg(ranks, "ranks"),
        }
        parts = {name: _cost(step) for name, step in steps.items()}
        watching = watch(world, beat_s, seconds, folder)
    return {"hosts": len(hosts), "ranks": world, "parts": parts, "supervisor": watching}


def fan_out(preflight: Sequence[str], count: int, slots: int, timeout_s: float) -> dict[str, Any]:
    """Return the cost of the command `preflight` on `count` stub hosts, and the hosts it reports.

    Three cases: all hosts answer; the middle one hangs and the last one answers garbage; all hang. Needs root.
    """
    _allow_files(20 * count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with StubHosts(count, folder, PreflightSettings(output_dir=str(folder / "runs"), timeout_s=timeout_s)) as hosts:
            write_hostfile(str(folder / "hostfile"), dict.fromkeys(hosts.names, slots))
            argv = [*preflight, "--hostfile", str(folder / "hostfile"), "--json", "--no-measure"]
            argv += ["--timeout-s", str(timeout_s)]
            well = _look(argv, hosts)
            hosts.spoil(hangs=hosts.names[count // 2], garbage=hosts.names[-1])
            spoilt = _look(argv, hosts)
            hosts.spoil(hangs=" ".join(hosts.names))
            hanging = _look(argv, hosts)
    cases = {"all well": well, "one hangs, one answers garbage": spoilt, "all hang": hanging}
    return {"hosts": count, "timeout_s": timeout_s, **cases}


def _look(argv: list[str], hosts: StubHosts) -> dict[str, Any]:
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=hosts.folder, env=os.environ | hosts.environment
    )
    peaks: Counter[str] = Counter()
    watcher = threading.Thread(target=_watch_processes, args=(process, hosts.daemon, peaks), daemon=True)
    watcher.start()
    out, err = process.communicate()
    seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    watcher.join()
    if not out:
        raise UserError(f"{' '.join(argv)}: {err.decode(errors='replace').strip()}")
    report = json.loads(out)
    named = [f"{f['host']}: {f['severity']}: {f['check']}: {f['text']}" for f in report["findings"]]
    return {
        "seconds": round(seconds, 2),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "exit_code": process.returncode,
        "good": len(report["good"]),
        "named": len(named),
        "first_named": named[:4],
        **peaks,
    }


def _watch_processes(process: subprocess.Popen[bytes], daemon: psutil.Process, peaks: Counter[str]) -> None:
    """Record the peaks: processes, threads and memory of the tool with its ssh processes, and processes of hosts."""
    tool = psutil.Process(process.pid)
    while process.returncode is None:
        with suppress(psutil.Error):
            own, theirs = tool.children(recursive=True), daemon.children(recursive=True)
            now = {
                "peak_processes": 1 + len(own),
                "peak_threads": tool.num_threads(),
                "peak_rss_mib": tool.memory_info().rss >> 20,
                "peak_processes_of_hosts": len(theirs),
            }
            with suppress(psutil.Error):
                now["peak_rss_mib_with_ssh"] = sum(one.memory_info().rss for one in [tool, *own]) >> 20
            for name, value in now.items():
                peaks[name] = max(peaks[name], value)
        time.sleep(0.25)


def watch(world: int, beat_s: float, seconds: float, folder: str) -> dict[str, Any]:
    """Return the cost of supervising `world` ranks with a heartbeat every `beat_s`, and of a hang report of all."""
    _allow_files(2 * world + 100)
    server = Server("127.0.0.1")
    server.expect(TOKEN, world)
    fork = multiprocessing.get_context("fork")
    begin = time.monotonic()
    ranks = fork.Process(target=_ranks, args=(server.address, world, beat_s), daemon=True)
    ranks.start()
    try:
        while len(server.members) < world:
            server.poll()
            time.sleep(0.01)
        joined_s = time.monotonic() - begin
        while any(member.beat.step == 0 for member in server.members.values()):
            server.poll()
            time.sleep(0.01)
        detector = HangDetector(HangLimits())
        busy, until = _busy(), time.monotonic() + seconds
        first = {rank: member.beat.step for rank, member in server.members.items()}
        while time.monotonic() < until:
            time.sleep(TICK_S)
            server.poll()
            detector.update(server.members.values())
            (time.monotonic() - server.last_beat > 15).nonzero()
        heard = sum(member.beat.step - first[rank] for rank, member in server.members.items())
        share = (_busy() - busy) / seconds
    finally:
        ranks.kill()
        ranks.join()
    report_s = _report(server, world, folder)
    server.close()
    return {
        "beat_s": beat_s,
        "seconds": seconds,
        "joined_s": round(joined_s, 3),
        "beats": heard,
        "share_of_a_core": round(share, 5),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "hang_report_s": round(report_s, 4),
    }


def _ranks(address: tuple[str, int], world: int, beat_s: float) -> None:
    """Simulate all ranks: handshake, then heartbeats spread over the interval. A beat's step is the beat's number."""
    connections = [socket.create_connection(address) for _ in range(world)]
    for rank, connection in enumerate(connections):
        buffer = bytearray()
        while not (got := list(frames(buffer))):
            buffer += connection.recv(4096)
        about = {"rank": rank, "host": f"node{rank // 8}", "pid": rank}
        connection.sendall(frame(Kind.HELLO, hello(TOKEN, got[0][1], new_nonce(), about)))
    begin, number = time.monotonic(), 0
    while True:
        number += 1
        data = frame(Kind.BEAT, pack_beat(Beat(number, Phase.TRAINING, False, "FORWARD of micro-batch 3")))
        for rank, connection in enumerate(connections):
            early = begin + (number + rank / world) * beat_s - time.monotonic()
            if early > 0.002:
                time.sleep(early)
            connection.sendall(data)


def _report(server: Server, world: int, folder: str) -> float:
    """Return the duration of a hang report of all ranks and an event, in seconds."""
    job = Job(folder, {f"node{i}": 8 for i in range(world // 8)}, "pdsh", ("", 0), 5, 60)
    command = "python llama_ds/train.py"
    processes = {str(rank): {"rank": str(rank), "state": "S", "command": command} for rank in range(world)}
    hosts = {host: HostProcesses(host, None, {"processes": processes}) for host in job.hosts}
    for member in server.members.values():
        member.stacks = 'MainThread:\n  File "/x/train.py", line 1, in main\n  File "/x/wait.py", line 9, in wait\n'
    events = Events(Path(folder, "events.jsonl"), lambda text: None)
    begin = time.monotonic()
    report = hang.HangReport(60, 50)
    beats = {rank: float(server.last_beat[rank]) for rank in server.members}
    report.ranks = hang.examine(job, server.members, hosts, beats, 15)
    text = json.dumps(report.as_json())
    events.add("hang", "", ranks=list(range(world)), report=len(text))
    events.close()
    return time.monotonic() - begin


def _command(path: str, hosts: Mapping[str, int]) -> Any:
    return build(
        launcher="pdsh", hostfile=path, hosts=hosts, script="/opt/llama_ds/train.py", arguments_file="/runs/arguments",
        master_addr="10.0.0.1", master_port=29500, exports={"DS_ACCELERATOR": "cuda"}, env_file="/runs/environment",
        python="/opt/venv/bin/python", working_folder="/opt",
    )  # fmt: skip


def _cost(step: Callable[[], Any]) -> dict[str, float]:
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    tracemalloc.start()
    step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"median_s": round(statistics.median(times), 6), "peak_mib": round(peak / 2**20, 3)}


def _busy() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard) if hard > 0 else count, hard))
