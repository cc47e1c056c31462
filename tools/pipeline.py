#!/usr/bin/env python3
"""Time pipeline schedules against each other and against DeepSpeed's own engine, on links of a given bandwidth.

Every rank is a host of its own: a network namespace with its address and a link of the bandwidth and latency asked for
(Linux, root, iproute2). Without --rate-mbit all ranks are processes of this host.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.rules import check
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import ParallelConfig, RunConfig
from llama_ds.errors import UserError
from llama_ds.launch.namespaces import INTERFACE, Hosts
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.perf.trace.files import analyse_folder
from llama_ds.perf.trace.picture import picture
from llama_ds.perf.trace.read import read
from llama_ds.perf.trace.report import table

EXAMPLES = """examples:
  tools/pipeline.py --pp 4 --rate-mbit 50 --delay-ms 5 --schedules deepspeed 1f1b zb_h1
  tools/pipeline.py --pp 2 --dp 2 --rate-mbit 50 --delay-ms 5 --out measured.json --svg pictures/
  tools/pipeline.py model.num_hidden_layers=8 --pp 4 --schedules deepspeed zb_h1 dualpipe_v
"""
VIRTUAL_STAGES = {"interleaved": 2, "dualpipe_v": 2}
PORT = 29507
SETTINGS = ("pp", "tp", "dp", "micro_batches", "micro_batch", "dtype", "recompute", "rate_mbit", "delay_ms", "repeats")


def main(argv: list[str] | None = None) -> int:
    """Start the ranks, wait for them, print what they measured."""
    args = parse(argv)
    try:
        if args.rank is not None:
            measure(args)
            return 0
        for schedule in args.schedules:
            contestant(args, schedule)  # refuses before any rank starts
        with tempfile.TemporaryDirectory() as folder:
            launch(args, Path(folder))
            publish(args, Path(folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=formatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run file: another shape")
    parser.add_argument("--run", default="ds_configs/quickstart.yaml", help="run file (default: %(default)s)")
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument(
        "--schedules",
        nargs="+",
        default=["deepspeed", "1f1b", "zb_h1", "zb_h1+1"],
        metavar="NAME",
        help="zb_h1+2: with extra_warmup 2 (default: %(default)s)",
    )
    parser.add_argument("--micro-batches", type=int, default=8, help="of each rank (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=1, help="rows (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--recompute", default="none", help="save policy (default: %(default)s)")
    parser.add_argument("--rate-mbit", type=float, help="bandwidth of a link, each way")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="latency of a link, each way")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--out", metavar="FILE", help="write the results as JSON to FILE too")
    parser.add_argument("--svg", metavar="FOLDER", help="draw one step of each schedule into FOLDER")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the records of these steps, for throughput.py analyse")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def contestant(args: argparse.Namespace, schedule: str) -> tuple[RunConfig, Layout]:
    """Return the run and layout that time one schedule."""
    run = load_run(args.run, args.overrides)
    name, _, extra = schedule.partition("+")
    parallel = ParallelConfig(
        pp=args.pp,
        tp=args.tp,
        micro_batch=args.micro_batch,
        recompute=args.recompute,
        schedule=name,
        extra_warmup=int(extra or 0),
        virtual_stages=VIRTUAL_STAGES.get(name, 1),
    )
    rows = args.dp * args.micro_batches * args.micro_batch
    run = replace(
        run,
        training=replace(run.training, global_batch=rows),
        parallel=parallel,
        deepspeed={"zero_optimization": {"stage": 1}, "bf16": {"enabled": args.dtype == "bf16"}},
        path="command line",
    )
    check(run)
    return run, resolve_layout(run, args.pp * args.tp * args.dp)


def launch(args: argparse.Namespace, folder: Path) -> None:
    """Run all ranks; when one fails, end the others and show its error."""
    world = args.pp * args.tp * args.dp
    with ExitStack() as stack:
        hosts = None
        if args.rate_mbit:
            hosts = stack.enter_context(Hosts(world, args.rate_mbit, args.delay_ms))
        environment = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT))
        environment |= {"WORLD_SIZE": str(world), "MASTER_PORT": str(PORT if hosts else free_port())}
        environment |= {"MASTER_ADDR": hosts.address(0) if hosts else "127.0.0.1"}
        if hosts:
            environment |= {"GLOO_SOCKET_IFNAME": INTERFACE}
        processes = []
        for rank in range(world):
            command = [sys.executable, *sys.argv, "--rank", str(rank), "--folder", str(folder)]
            own = environment | {"RANK": str(rank), "LOCAL_RANK": "0" if hosts else str(rank)}
            log = stack.enter_context(open(folder / f"rank{rank}.log", "w"))
            command = hosts.command(rank, command) if hosts else command
            processes.append(subprocess.Popen(command, env=own, stdout=log, stderr=log, cwd=ROOT))
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            time.sleep(0.1)
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        for process in processes:
            if failed:
                process.kill()
            process.wait()
    if failed:
        raise UserError(f"rank {failed[0]} failed:\n{(folder / f'rank{failed[0]}.log').read_text()[-3000:]}")


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(args: argparse.Namespace) -> None:
    """Be one rank: time the schedules in turns, and record one step of each."""
    import numpy as np
    import torch

    from llama_ds import log
    from llama_ds.layout.pipeline_schedule import describe_trace
    from llama_ds.parallel import world
    from llama_ds.training.engines.build import build_engine

    log.setup(quiet=True)
    place = world.find_place()
    with world.failing_together():
        world.join(place)
        steps: dict[str, Callable[[], float]] = {}
        engines = {}
        for schedule in args.schedules:
            run, layout = contestant(args, schedule)
            config = deepspeed_config(run, layout, bf16_native=True)
            engine = engines[schedule] = build_engine(run, layout, config, torch.device("cpu"))
            rows = np.random.default_rng(engine.dp_rank).integers(
                0, run.model.vocab_size, (args.micro_batches, args.micro_batch, run.data.seq_len + 1)
            )

            steps[schedule] = partial(take_step, engine, rows)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        losses: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(2 + args.repeats):
            for name, step in steps.items():
                world.barrier()
                start = time.perf_counter()
                losses[name].append(step())
                world.barrier()
                if repeat >= 2:
                    seconds[name].append(time.perf_counter() - start)
        for name, engine in engines.items():
            run, layout = contestant(args, name)
            world.barrier()
            engine.trace.start()
            steps[name]()
            about = {**describe_trace(run, layout, place.rank), "host": f"host{place.rank}", "device": "cpu"}
            about |= {"first_step": 1, "measured_steps": 1, "clock": [(0, 0, 0)]}  # network namespaces share the clock
            engine.trace.write(str(Path(args.folder, name)), place.rank, **about)
            engine.deepspeed.destroy()
        if place.rank == 0:
            Path(args.folder, "times.json").write_text(json.dumps({"seconds": seconds, "losses": losses}))


def take_step(engine: Any, rows: Any) -> float:
    """Take one optimizer step over the micro-batches `rows`; return its loss."""
    return engine.read(engine.train_step(iter(rows), 1e-4))[0]


def publish(args: argparse.Namespace, folder: Path) -> None:
    """Print, and write where asked, what the ranks left in `folder`."""
    found = json.loads((folder / "times.json").read_text())
    first = {name: losses[0] for name, losses in found["losses"].items()}
    if max(first.values()) - min(first.values()) > 1e-5 * max(first.values()) * (1 if args.dtype == "fp32" else 1e3):
        raise AssertionError(f"the schedules compute different losses: {first}")
    analyses = {name: analyse_folder(folder / name) for name in args.schedules}
    median = {name: statistics.median(times) for name, times in found["seconds"].items()}
    run, _ = contestant(args, args.schedules[0])
    results = {
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "model": asdict(run.model),
        "seq_len": run.data.seq_len,
        "cores": os.cpu_count(),
        "steps": {
            name: {
                "median_s": median[name],
                "min_s": min(found["seconds"][name]),
                "max_s": max(found["seconds"][name]),
                "over_first": median[name] / median[args.schedules[0]],
                "step_ms": analyses[name].step_ms,
                **analyses[name].metrics,
            }
            for name in args.schedules
        },
    }
    text = json.dumps(results, indent=1)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text + "\n")
    if args.keep:
        shutil.copytree(folder, args.keep, ignore=shutil.ignore_patterns("*.log"), dirs_exist_ok=True)
    if args.svg:
        Path(args.svg).mkdir(parents=True, exist_ok=True)
        for name in args.schedules:
            Path(args.svg, f"{name}.svg").write_text(picture(read(folder / name), name))
    links = f"links of {args.rate_mbit:g} Mbit/s and {args.delay_ms:g} ms" if args.rate_mbit else "loopback"
    lines = [
        f"pp {args.pp} tp {args.tp} dp {args.dp}, {args.micro_batches} micro-batches of {args.micro_batch} x "
        f"{run.data.seq_len}, hidden {run.model.hidden_size}, {run.model.num_hidden_layers} layers, {args.dtype}, "
        f"{links}, {os.cpu_count()} cores, median of {args.repeats}",
        *(
            f"{name:14} {median[name] * 1e3:8.1f} ms a step, {median[name] / median[args.schedules[0]]:.3f} x "
            f"{args.schedules[0]}; bubble simulated with the measured times {analyses[name].ideal.bubble:.1%}"
            for name in args.schedules
        ),
        "one step of each, as shares of all ranks' time:",
        table(analyses),
    ]
    print(text if args.json else "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
