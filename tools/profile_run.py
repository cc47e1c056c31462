#!/usr/bin/env python3
"""Profile a training run: record some of its steps on all ranks and attribute their time."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds import shipped
from llama_ds.checkpoint.model_shape import read_models
from llama_ds.child_processes import run_child
from llama_ds.command_line import (
    Answer,
    add_json,
    add_results,
    check_file,
    check_folder,
    new_parser,
    port,
    run,
    subcommands,
    whole,
)
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.config.text import save_text
from llama_ds.launch.command import LAUNCHERS
from llama_ds.launch.hostfile import parse_hostfile, write_hostfile
from llama_ds.layout.layout import model_axes, resolve_layout
from llama_ds.layout.ranks import choose_ranks
from llama_ds.perf.trace.job import DEFAULT_RANKS, recording_overrides
from llama_ds.perf.trace.kinds import METRICS
from llama_ds.perf.trace.limits import Limit, parse_limit

if TYPE_CHECKING:
    from llama_ds.perf.trace.analyse import Analysis

EXAMPLES = """examples:
  tools/profile_run.py record ds_configs/quickstart.yaml parallel.micro_batch=2 --ranks first,last --steps 3
  tools/profile_run.py record ds_configs/llama_65b.yaml --hostfile hostfiles/256x8 --ranks first,last --svg step.svg
  tools/profile_run.py analyse runs/quickstart-profile/trace --svg step.svg --fail-if 'bubble>20' --fail-if 'gemm<40'
"""
GRACE_S = 120.0  # time for the job to stop on all of its hosts


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    read_models()
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(None, __doc__, EXAMPLES)
    add = subcommands(parser)
    words = "record and profile steps of the real job in a separate folder, and attribute their time"
    command = add("record", record, words)
    _add_record_options(command)
    _add_analysis_options(command)
    add_json(command)
    words = "attribute the time of recorded steps, from the files of logging.trace_step or record"
    metrics = "\n".join(f"  {name:20} {text}" for name, text in METRICS.items())
    command = add("analyse", analyse, words, examples=f"metrics, in percent:\n{metrics}\n\n{EXAMPLES}")
    command.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of rank*.json, such as runs/NAME/trace")
    command.add_argument("--merge", action="store_true", help="also write a trace of all ranks for ui.perfetto.dev")
    _add_analysis_options(command)
    add_results(command)
    return parser


def _add_record_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", help="run file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the run file")
    words = (
        "ranks that run torch's profiler: numbers, all, none, or first, middle, last, which name the rank with dp 0 "
        "and tp 0 of that stage (default: %(default)s)"
    )
    command.add_argument("--ranks", default=DEFAULT_RANKS, metavar="R", help=words)
    words = "steps to record, and then as many with the profiler (default: %(default)s)"
    command.add_argument("--steps", type=whole(), default=3, help=words)
    command.add_argument("--warmup", type=whole(0), default=3, help="warm-up steps before them (default: %(default)s)")
    command.add_argument("--out", metavar="FOLDER", help="output folder (default: the run's folder plus -profile)")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--hostfile", help="the job's hosts, as for tools/launch.py")
    where.add_argument("--num-ranks", type=whole(), help="ranks on this machine (default: GPUs, or pp * cp * tp)")
    command.add_argument("--launcher", choices=LAUNCHERS, default="pdsh", help="(default: %(default)s)")
    command.add_argument("--nic", default="", help="network interface of the ranks (default: the one to rank 0)")
    command.add_argument("--ssh-port", type=port)


def _add_analysis_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--svg", metavar="FILE", help="draw the first folder's first step")
    words = (
        "exit with 1 if the condition holds: a metric, one of > < >= <=, percent, as in 'bubble>20'; may be repeated"
    )
    command.add_argument("--fail-if", action="append", default=[], metavar="LIMIT", help=words)


def record(args: argparse.Namespace) -> Answer | int:
    """Record and profile steps of the real job; if the job fails, return its exit code."""
    from llama_ds.perf.trace.files import analyse_folder
    from llama_ds.perf.trace.merge import merge
    from llama_ds.perf.trace.report import as_json, report

    limits = [parse_limit(text, METRICS) for text in args.fail_if]
    wanted = load_run(args.run, args.overrides)
    environment = dict(os.environ)
    if args.hostfile is not None:
        hosts = parse_hostfile(args.hostfile)
    else:
        hosts = {"localhost": _local_ranks(args, wanted, environment)}
    layout = resolve_layout(wanted, sum(hosts.values()))
    out = Path(args.out or f"{wanted.run_dir}-profile").absolute()
    ranks = choose_ranks(args.ranks, layout, "--ranks")
    overrides = [*args.overrides, *recording_overrides(wanted, str(out), args.warmup, args.steps, ranks)]
    load_run(args.run, overrides)
    check_folder("--out", str(out))
    if args.svg is not None:
        check_file("--svg", args.svg)
    command = _launch_command(args, overrides, _hostfile_in(out, args.hostfile, hosts))
    done = run_child(command, GRACE_S, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    if done.returncode:
        return done.returncode if done.returncode > 0 else 128 - done.returncode
    folder = str(out / "trace")
    merged, analysis = merge(folder), analyse_folder(folder)
    _draw(args.svg, folder)
    results = {**as_json(analysis), "profiled_ranks": ranks, "folder": folder, "trace": str(merged)}
    paths = f"records: {folder}\ntrace of all ranks, for ui.perfetto.dev: {merged}"
    return _judged(results, f"\n{report(analysis)}\n\n{paths}", {folder: analysis}, limits)


def _local_ranks(args: argparse.Namespace, wanted: RunConfig, environment: dict[str, str]) -> int:
    """Return the number of ranks on this machine; without a GPU for each they share its CPU cores."""
    import torch

    gpus, model_ranks = torch.cuda.device_count(), model_axes(wanted.parallel).replica
    ranks = args.num_ranks or max(model_ranks, gpus // model_ranks * model_ranks)
    if gpus < ranks:
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    return ranks


def _hostfile_in(out: Path, given: str | None, hosts: dict[str, int]) -> str:
    """Return the job's hostfile: the one given, or a new one in the output folder."""
    if not given:
        write_hostfile(str(out / "hostfile"), hosts)
    return given or str(out / "hostfile")


def _launch_command(args: argparse.Namespace, overrides: list[str], hostfile: str) -> list[str]:
    command = [*shipped.command("launch"), args.run, *overrides, "--hostfile", hostfile]
    command += ["--launcher", args.launcher, *(["--nic", args.nic] if args.nic else [])]
    return command + (["--ssh-port", str(args.ssh_port)] if args.ssh_port else [])


def analyse(args: argparse.Namespace) -> Answer:
    """Attribute the time of recorded steps."""
    from llama_ds.perf.trace.files import analyse_folder
    from llama_ds.perf.trace.merge import merge
    from llama_ds.perf.trace.report import as_json, report, table

    limits = [parse_limit(text, METRICS) for text in args.fail_if]
    if args.svg is not None:
        check_file("--svg", args.svg)
    found = {folder: analyse_folder(folder) for folder in args.folders}
    paths = [f"trace of all ranks, for ui.perfetto.dev: {merge(folder)}" for folder in args.folders if args.merge]
    _draw(args.svg, args.folders[0])
    reports = [f"{folder}: {report(analysis)}" for folder, analysis in found.items()]
    text = "\n\n".join([*reports, *([table(found)] if len(found) > 1 else []), *paths])
    return _judged({folder: as_json(analysis) for folder, analysis in found.items()}, text, found, limits)


def _draw(path: str | None, folder: str) -> None:
    from llama_ds.perf.trace.picture import picture
    from llama_ds.perf.trace.read import read, shown

    if path is not None:
        save_text(path, picture(read(folder, shown(folder)), folder))


def _judged(results: object, text: str, found: dict[str, Analysis], limits: list[Limit]) -> Answer:
    """Return the answer, which ends with the violated limits."""
    broken = [
        f"failed: {folder}: {why}"
        for folder, analysis in found.items()
        for limit in limits
        if (why := limit.broken(analysis.metrics))
    ]
    return Answer(results, text, 1 if broken else 0, broken)


if __name__ == "__main__":
    sys.exit(main())
