#!/usr/bin/env python3
"""Start a run on the hosts of a hostfile with DeepSpeed's launcher, monitor it, and report the root error first.

With --supervise, a failed job is stopped on all hosts and restarted from its newest complete checkpoint: on the same
hosts, with spares in place of bad ones, or on fewer ranks with the same global batch.

On SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR2 or SIGXCPU, whenever it comes, the ranks save and end (a second SIGINT or
SIGTERM ends them at once); on SIGUSR1 they save.

"tools/launch.py report RUN" says how much of a run's time was effective training time, and what took the rest.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds import shipped
from llama_ds.checkpoint.model_shape import read_models
from llama_ds.command_line import (
    INTERRUPTED,
    Answer,
    add_json,
    delay,
    given,
    new_parser,
    port,
    real,
    run,
    seconds,
    whole,
)
from llama_ds.config.boards import check_packages
from llama_ds.config.run_file import load_run, path_variables
from llama_ds.config.schema import RunConfig
from llama_ds.config.text import save_text
from llama_ds.errors import UserError
from llama_ds.experiments import goodput
from llama_ds.experiments.goodput import PHASES
from llama_ds.experiments.goodput_report import as_data, as_metrics, as_text, remarks, timeline
from llama_ds.experiments.records import read_run
from llama_ds.job.devices import visible_devices
from llama_ds.job.folder import VARIABLE, Job
from llama_ds.job.requests import warnings_heard
from llama_ds.launch.command import LAUNCHERS, exported_to_ranks, runner_command
from llama_ds.launch.deepspeed_env import read_deepspeed_env
from llama_ds.launch.hostfile import parse_hostfile, select
from llama_ds.launch.job_files import lock_run, new_folder
from llama_ds.launch.mpirun import find_mpirun
from llama_ds.launch.preflight import PreflightSettings, Report, examine
from llama_ds.launch.remote import local_host
from llama_ds.launch.rendezvous import Rendezvous
from llama_ds.launch.supervise.attempt import Watch
from llama_ds.launch.supervise.hang_detector import HangLimits
from llama_ds.launch.supervise.host_pool import HALF_LIFE_D, HostPool
from llama_ds.launch.supervise.supervisor import LaunchSettings, ListedHosts, RestartLimits, Supervisor, command_of
from llama_ds.layout.layout import resolve_layout
from llama_ds.layout.placement import findings, place_ranks
from llama_ds.log import console_is_gone

LEAVE_S = 10.0  # time for ranks that are kept to leave a broken attempt
WINDOW_H = 24.0  # hours of the sliding share of effective training time
EXAMPLES = """examples:
  tools/launch.py ds_configs/llama_65b.yaml --hostfile hostfiles/256x8 --dry-run
  tools/launch.py ds_configs/llama_65b.yaml --hostfile hostfiles/256x8 --supervise --spares hostfiles/spares
  tools/launch.py ds_configs/quickstart.yaml training.steps=20 --hostfile hostfiles/local parallel.pp=1
  tools/launch.py report runs/llama_65b --svg timeline.svg
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done or ended, 1 failed, 2 a mistake, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["report"]:
        return run(report_parser(), words[1:])
    read_models()
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(launch, __doc__, EXAMPLES)
    parser.add_argument("run_file", help="YAML run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as for llama_ds/train.py")
    parser.add_argument("--hostfile", required=True, help="HOST slots=N, one per line, in the order of the ranks")
    parser.add_argument("--include", default="", help="use only these hosts and devices: node1@node2:0,1")
    parser.add_argument("--exclude", default="", help="use all hosts but these")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="pdsh", help="default: %(default)s")
    parser.add_argument("--launcher-args", default="", help="additional arguments for pdsh, mpirun or srun")
    parser.add_argument("--mpirun", default="", metavar="PATH", help="the mpirun to use (default: first on PATH)")
    parser.add_argument("--dry-run", action="store_true", help="print the command and the placement; start nothing")
    network = parser.add_argument_group("network")
    network.add_argument("--nic", default="", help="network interface of the ranks (default: the one to rank 0)")
    network.add_argument("--master-addr", default="", help="address of the first host for the other hosts")
    network.add_argument("--master-port", type=whole(0, 65535), default=0, help="default: a free port")
    network.add_argument("--listen", default="", help="address of this machine for the hosts")
    network.add_argument("--ssh-port", type=port)
    network.add_argument("--export", action="append", default=[], metavar="NAME=VALUE", help="a variable for the ranks")
    watch = parser.add_argument_group("supervision")
    watch.add_argument("--supervise", action="store_true", help="restart after failures")
    watch.add_argument("--spares", default="", help="hostfile of spare hosts that replace bad ones")
    watch.add_argument(
        "--warm-processes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep a process with all imports on every host and spare, from which restarts start (default: on)",
    )
    watch.add_argument(
        "--keep-ranks",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="ranks without a fault take part in the next attempt as the same processes, on CPUs (default: off)",
    )
    watch.add_argument(
        "--leave-s",
        type=seconds,
        help=f"with --keep-ranks: time for them to leave the broken attempt (default: {LEAVE_S:g})",
    )
    watch.add_argument(
        "--max-restarts", type=whole(0), default=5, help="consecutive restarts without progress (default: %(default)s)"
    )
    watch.add_argument(
        "--backoff-s",
        type=delay,
        default=5.0,
        help="delay before the second restart without progress, then doubled (default: %(default)s)",
    )
    watch.add_argument("--beat-s", type=seconds, default=5.0, help="heartbeat interval (default: %(default)s)")
    watch.add_argument(
        "--silent-s", type=seconds, default=15.0, help="time without heartbeats before a host is checked (%(default)s)"
    )
    watch.add_argument(
        "--orphan-s", type=seconds, default=60.0, help="time after which ranks without a launcher exit (%(default)s)"
    )
    watch.add_argument(
        "--hang-factor",
        type=real(0, above=True),
        default=10.0,
        help="hang limit in median step times (default: %(default)s)",
    )
    watch.add_argument("--hang-min-s", type=delay, default=60.0, help="minimum hang limit (default: %(default)s)")
    watch.add_argument(
        "--start-s", type=seconds, default=1800.0, help="limit for start and load (default: %(default)s)"
    )
    watch.add_argument(
        "--rewind-steps",
        type=whole(0),
        default=0,
        help="after a loss spike, rewind to this many steps before it; 0: never",
    )
    watch.add_argument(
        "--skip-steps", type=whole(0), default=0, help="then skip the data of this many steps (default: rewind + 200)"
    )
    parser.set_defaults(default_of=parser.get_default)
    return parser


def report_parser() -> argparse.ArgumentParser:
    """Return the parser of "report RUN"."""
    meanings = "\n".join(f"  {name:12} {meaning}" for name, meaning in PHASES.items())
    parser = new_parser(report, f"{goodput.__doc__}\nPhases:\n{meanings}", EXAMPLES)
    parser.prog = f"{parser.prog} report"
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run, such as runs/NAME")
    parser.add_argument(
        "--window-h",
        type=real(0, 1e5, above=True),
        default=WINDOW_H,
        help="window of the sliding share (%(default)s h)",
    )
    parser.add_argument(
        "--half-life-d",
        type=real(0, 1e5, above=True),
        default=HALF_LIFE_D,
        help="days after which a host's strike counts half (default: %(default)s)",
    )
    parser.add_argument("--svg", metavar="FILE", help="write the timeline as a picture")
    add_json(parser)
    return parser


def report(args: argparse.Namespace) -> Answer:
    """Return the accounts of a run's time."""
    found = goodput.goodput(read_run(args.run_folder), 86400 * args.half_life_d)
    window_s = 3600 * args.window_h
    if not found.jobs:
        raise UserError(f"{args.run_folder}/jobs: has no events.jsonl; give a run that tools/launch.py has started")
    if args.svg:
        save_text(args.svg, timeline(found, window_s))
    return Answer(as_data(found, window_s), as_text(found, window_s), remarks=remarks(found))


def launch(args: argparse.Namespace) -> int:
    """Start the job and supervise it to its end."""
    check_supervision(args)
    os.environ.pop(VARIABLE, None)  # this job must not join the job that started it
    wanted = load_run(args.run_file, args.overrides)
    check_packages(wanted.path, wanted.logging.boards)
    found = hosts_of(args)
    hosts = dict(found.hosts)
    layout = resolve_layout(wanted, sum(hosts.values()))
    ranks = place_ranks(hosts, layout)
    for finding in findings(ranks, wanted.parallel.gradient_neighbours):
        if finding.severity == "error":
            raise UserError(f"{args.hostfile}: {finding.text}")
        if finding.severity == "warning" or args.dry_run:
            print_line(f"{finding.severity}: {finding.text}")
    for host, chosen in found.devices.items():
        print_line(
            f"{host}: the ranks use the CUDA devices {chosen}" if chosen else f"{host}: no CUDA device is visible"
        )
    start = start_of(args, wanted, found.devices)
    if args.dry_run:
        show(args, wanted, start, hosts)
        return 0
    folder = new_folder(wanted.run_dir)
    lock = lock_run(wanted.run_dir, folder, args.orphan_s, print_line)
    supervisor = Supervisor(
        run=wanted,
        start=start,
        host_pool=HostPool(wanted, hosts, dict(found.spares)),
        watch=Watch(
            HangLimits(args.hang_factor, args.hang_min_s, args.start_s), args.silent_s, spikes=args.rewind_steps > 0
        ),
        limits=RestartLimits(
            restarts=args.max_restarts if args.supervise else 0,
            backoff_s=args.backoff_s,
            rewind_steps=args.rewind_steps,
            skip_steps=args.skip_steps or args.rewind_steps + 200,
        ),
        folder=folder,
        examine=lambda hosts: preflight(args, wanted, hosts),
        print_line=print_line,
        read_hosts=lambda: hosts_of(args),
        accounts=lambda: accounts_of(wanted.run_dir),
    )
    print_line(f"job folder: {supervisor.folder}")
    received = handle_signals(supervisor)
    try:
        code = supervisor.supervise()
        return INTERRUPTED if not code and signal.SIGINT in received else code
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped at once: nothing was saved") from None
    finally:
        lock.release()


def check_supervision(args: argparse.Namespace) -> None:
    """Refuse options of a supervision that the others leave without effect.

    Raises:
        UserError: the message names the option that is missing.
    """
    if args.keep_ranks and not (args.supervise and args.warm_processes and args.launcher == "pdsh"):
        raise UserError(
            "--keep-ranks: keeps ranks that a restart would fork from warm processes; it needs --supervise and "
            "--launcher pdsh, without --no-warm-processes"
        )
    if args.leave_s is not None and not args.keep_ranks:
        raise UserError(
            f"--leave-s {args.leave_s:g}: bounds how long ranks that are kept take to leave; add --keep-ranks"
        )
    of_restarts = "spares", "max_restarts", "rewind_steps", "skip_steps"
    if not args.supervise and (option := next(given(args, of_restarts), None)):
        raise UserError(
            f"{option}: is of restarts, and without --supervise there are none; add it, or leave {option} out"
        )
    if args.skip_steps and not args.rewind_steps:
        raise UserError(
            f"--skip-steps {args.skip_steps}: is what a rewind skips, and --rewind-steps is 0; add it, such as "
            "--rewind-steps 100"
        )


def accounts_of(run_dir: str) -> dict[str, float]:
    """Return metrics of a run's time, none before its first step."""
    with suppress(Exception):  # no account of the past is worth the job
        return as_metrics(goodput.goodput(read_run(run_dir), 86400 * HALF_LIFE_D), 3600 * WINDOW_H)
    return {}


def hosts_of(args: argparse.Namespace) -> ListedHosts:
    """Return the selected slots of the hosts in the hostfiles."""
    slots = select(parse_hostfile(args.hostfile), args.include, args.exclude)
    return ListedHosts(
        hosts={host: len(chosen) for host, chosen in slots.items()},
        spares=parse_hostfile(args.spares) if args.spares else {},
        devices=visible_devices(slots, local_host(slots), os.environ),
    )


def start_of(args: argparse.Namespace, wanted: RunConfig, devices: Mapping[str, str]) -> LaunchSettings:
    """Return the settings with which ranks are started."""
    from_files = read_deepspeed_env(os.environ)
    if remark := from_files.remark():
        print_line(remark)
    exports = exported_to_ranks(os.environ) | from_files.exports
    exports |= {name: os.environ[name] for name in path_variables(wanted.path, args.overrides)}
    for pair in args.export:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--export {pair}: write NAME=VALUE")
        exports[name] = value
    return LaunchSettings(
        run_file=os.path.abspath(wanted.path),
        overrides=args.overrides,
        train=shipped.TRAIN,
        launcher=args.launcher,
        launcher_args=args.launcher_args.split(),
        mpirun="" if args.dry_run else find_mpirun(args.launcher, args.mpirun, os.environ),
        exports=exports,
        secrets={name: value for name, value in from_files.secrets.items() if name not in exports},
        devices=devices,
        nic=args.nic,
        master=args.master_addr,
        master_port=args.master_port,
        listen=args.listen,
        ssh_port=args.ssh_port,
        beat_s=args.beat_s,
        orphan_s=args.orphan_s,
        warm=args.warm_processes,
        leave_s=(args.leave_s or LEAVE_S) if args.keep_ranks else 0.0,
    )


def show(args: argparse.Namespace, run: RunConfig, start: LaunchSettings, hosts: Mapping[str, int]) -> None:
    """Print the launcher command. No host is contacted, so the values that hosts would report have placeholders."""
    folder = os.path.join(os.path.abspath(run.run_dir), "jobs", "NNNN", "attempt_01")
    job = Job(folder, dict(hosts), start.launcher, ("", 0), start.beat_s, start.orphan_s, start.nic)
    rendezvous = Rendezvous(start.master or next(iter(hosts)), start.master_port or 29500, "")
    print(runner_command(command_of(job, start, rendezvous)))


def preflight(args: argparse.Namespace, run: RunConfig, hosts: Mapping[str, int]) -> Report:
    """Check hosts before they are used again."""
    settings = PreflightSettings(
        output_dir=run.output_dir,
        fp8=run.compute.fp8 != "off",
        measure=False,
        nic=args.nic,
        ssh_port=args.ssh_port,
    )
    return examine(hosts, settings)


def handle_signals(supervisor: Supervisor) -> list[int]:
    """Forward signals from a person or a scheduler to the supervisor; a second SIGINT or SIGTERM interrupts at once.

    The returned list gets the signal that asked for the end.
    """
    received = []

    def end(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        supervisor.ask("end")

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    for number in warnings_heard():
        signal.signal(number, end)
    signal.signal(signal.SIGUSR1, lambda *_: supervisor.ask("save"))
    return received


def print_line(text: str) -> None:
    """Print a line at once. A console that is gone does not end the job: its events are in a file, too."""
    try:
        print(text, flush=True)
    except OSError as error:
        if not console_is_gone(error):
            raise


if __name__ == "__main__":
    sys.exit(main())
