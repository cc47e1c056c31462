#!/usr/bin/env python3
"""Measure the load that a job of a hostfile's size puts on the machine that supervises it, without any host.

Ranks are loopback connections that send heartbeats as real ranks do. --preflight measures the preflight on as many
hosts instead: loopback addresses of one sshd (needs root and openssh-server) that replay this machine's answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds import shipped
from llama_ds.command_line import Answer, add_results, new_parser, run, seconds, whole
from llama_ds.launch.hostfile import parse_hostfile
from llama_ds.launch.scale import fan_out, measure, setting
from llama_ds.layout.axes import Axes

EXAMPLES = """examples:
  tools/cluster_scale.py hostfiles/256x8 --pp 8 --tp 8 --out measured.json
  tools/cluster_scale.py hostfiles/256x8 --preflight
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(scale, __doc__, EXAMPLES)
    parser.add_argument(
        "hostfile", nargs="?", default=str(shipped.folder("hostfiles") / "256x8"), help="(default: %(default)s)"
    )
    parser.add_argument("--pp", type=whole(), default=8)
    parser.add_argument("--tp", type=whole(), default=8)
    parser.add_argument("--beat-s", type=seconds, default=5.0, help="heartbeat interval (default: %(default)s)")
    parser.add_argument("--seconds", type=seconds, default=60.0, help="time to measure (default: %(default)s)")
    parser.add_argument("--preflight", action="store_true", help="measure the preflight instead")
    parser.add_argument("--timeout-s", type=seconds, default=20.0, help="preflight timeout (default: %(default)s)")
    add_results(parser)
    return parser


def scale(args: argparse.Namespace) -> Answer:
    """Run the measurement."""
    begin = setting()
    hosts = parse_hostfile(args.hostfile)
    if args.preflight:
        slots = max(hosts.values())
        found = fan_out(shipped.command("preflight"), len(hosts), slots, args.timeout_s)
    else:
        found = measure(hosts, Axes(pp=args.pp, tp=args.tp), args.beat_s, args.seconds)
    return Answer(begin | found, json.dumps(begin | found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
