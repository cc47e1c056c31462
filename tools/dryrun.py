#!/usr/bin/env python3
"""Simulate selected ranks of a job of any size on this machine: one step of the trainer's engine, without data or GPUs.

Reports the memory and communication of each rank and checks that the ranks are consistent.
Exit code: 0 all checks hold, 1 a check fails, 2 a mistake in the command.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

# torch and DeepSpeed read these variables once, when they are imported.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

from llama_ds.command_line import Answer, add_json, check_folder, new_parser, processes, run, size, whole
from llama_ds.config.text import save_text
from llama_ds.launch.hostfile import parse_hostfile
from llama_ds.training.dry_run.run import dry_run
from llama_ds.training.dry_run.text import as_json, calls_as_json, table

EXAMPLES = """examples:
  tools/dryrun.py ds_configs/llama_65b.yaml --hostfile hostfiles/256x8 --rank all-distinct
  tools/dryrun.py ds_configs/llama_65b.yaml --hostfile hostfiles/256x8 --rank first,777,last --device-gib 80
  tools/dryrun.py ds_configs/quickstart.yaml parallel.pp=2 --world 4 --rank all-distinct --backend gloo --json
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(report, __doc__, EXAMPLES)
    parser.add_argument("run_file", help="YAML run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, e.g. parallel.pp=2")
    ranks = parser.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--hostfile", help="the job's hosts")
    ranks.add_argument("--world", type=whole(1, 1_000_000), help="number of ranks, in place of a hostfile")
    parser.add_argument(
        "--rank",
        default="first,middle,last",
        metavar="R",
        help="comma-separated numbers, first, middle, last, or all-distinct (default: %(default)s)",
    )
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl", help="(default: %(default)s)")
    parser.add_argument("--device-gib", type=size, help="memory of a rank's device, for recompute auto and a check")
    parser.add_argument("--jobs", type=processes, default=2, help="ranks that run concurrently (default: %(default)s)")
    add_json(parser, "the report")
    parser.add_argument("--calls", metavar="FOLDER", help="write each rank's collectives and messages to FOLDER")
    return parser


def report(args: argparse.Namespace) -> Answer:
    """Simulate the ranks; return the results."""
    if args.calls is not None:
        check_folder("--calls", args.calls)
    slots = parse_hostfile(args.hostfile) if args.hostfile is not None else {"this": args.world}
    found = dry_run(args.run_file, args.overrides, slots, args.rank, args.backend, args.device_gib, args.jobs)
    if args.calls is not None:
        for rank in found.ranks:
            text = json.dumps(calls_as_json(found, rank)) + "\n"
            save_text(os.path.join(args.calls, f"rank{rank.rank:05d}.json"), text)
    return Answer(as_json(found), table(found), 0 if found.ok else 1)


if __name__ == "__main__":
    sys.exit(main())
