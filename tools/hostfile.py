#!/usr/bin/env python3
"""Generate a hostfile, check the placement of a run's ranks on its hosts, print the rank map, and select hosts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds.checkpoint.model_shape import read_models
from llama_ds.command_line import Answer, add_json, check_file, new_parser, run, subcommands, whole
from llama_ds.config.run_file import load_run
from llama_ds.config.text import save_text
from llama_ds.errors import UserError
from llama_ds.launch.hostfile import hostfile_text, parse_hostfile, select, write_hostfile
from llama_ds.layout import rank_map
from llama_ds.layout.axes import Axes
from llama_ds.layout.layout import resolve_layout
from llama_ds.layout.nodelist import SYSTEMS, expand, from_scheduler
from llama_ds.layout.placement import PlacedRank, findings, place_ranks

EXAMPLES = """examples:
  tools/hostfile.py generate --hosts 'node[001-256]' --slots 8 --out hostfiles/mine
  tools/hostfile.py generate --slurm --slots 8 --out hostfile              # within a Slurm job
  tools/hostfile.py generate --slurm 'gpu[01-04,07]' --slots 8
  tools/hostfile.py generate --lsf --out hostfile                          # within an LSF job
  tools/hostfile.py generate --pbs "$PBS_NODEFILE" --slots 8
  tools/hostfile.py check hostfiles/256x8 --run ds_configs/llama_65b.yaml parallel.pp=4
  tools/hostfile.py map hostfiles/256x8 --run ds_configs/llama_65b.yaml --svg ranks.svg
  tools/hostfile.py map hostfiles/2x8 --pp 2 --tp 4 --every-host
  tools/hostfile.py select hostfiles/256x8 --exclude 'node[017-018]@node200' --out hostfile
"""

CHECK = """Check a hostfile's syntax and the placement of a run's ranks on it; exit with 2 if there is an error.

With --run, also check that the run's batch is divisible over the ranks.
"""

SELECT = """Select hosts and slots with DeepSpeed's --include or --exclude: NODE[:SLOT,SLOT...][@NODE...].

A NODE may be a range, as in node[001-004]. A hostfile has only the number of slots, not their indices: if the selection
is not the first slots of a host, use --json.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    read_models()
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(None, __doc__, EXAMPLES)
    add = subcommands(parser)
    command = add("generate", generate, "generate a hostfile")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--hosts", metavar="LIST", help="such as 'node[001-256]' or 'a[1-4,7]-ib0,b', in quotes")
    source.add_argument("--slurm", nargs="?", const="", metavar="NODELIST", help="(default: this job's)")
    source.add_argument("--lsf", nargs="?", const="", metavar="FILE", help="LSB_DJOB_HOSTFILE (default: this job's)")
    source.add_argument("--pbs", nargs="?", const="", metavar="FILE", help="PBS_NODEFILE (default: this job's)")
    command.add_argument("--slots", type=whole(), help="ranks per host (default: from the batch system)")
    command.add_argument("--comment", default="", metavar="TEXT", help="comment at the top of the file")
    command.add_argument("--out", metavar="FILE", help="(default: print it)")
    command = add("check", check, "check the placement of ranks", CHECK)
    _add_parallel(command)
    add_json(command, "the findings")
    command = add("map", show_map, "print the rank map; hosts with the same pattern share a line")
    _add_parallel(command)
    command.add_argument("--every-host", action="store_true", help="print a line for each host")
    command.add_argument("--svg", metavar="FILE", help="also draw the map")
    add_json(command, "a list of all ranks")
    command = add("select", select_hosts, "select some of the hosts", SELECT)
    command.add_argument("file", metavar="FILE")
    command.add_argument("--include", default="", metavar="FILTER", help="use only these")
    command.add_argument("--exclude", default="", metavar="FILTER", help="use all but these")
    command.add_argument("--out", metavar="FILE", help="(default: print it)")
    add_json(command, "the slots of each host")
    return parser


def generate(args: argparse.Namespace) -> None:
    """Generate a hostfile."""
    if args.hosts is not None:
        if args.slots is None:
            raise UserError("command line: --hosts does not say how many slots a host has; add --slots 8")
        hosts = dict.fromkeys(expand(args.hosts, "--hosts"), args.slots)
    else:
        system = next(name for name in SYSTEMS if getattr(args, name) is not None)
        hosts = from_scheduler(system, getattr(args, system), args.slots, os.environ)
    _write(hosts, args.out, args.comment)


def check(args: argparse.Namespace) -> Answer:
    """Return the findings; the exit code is 2 if one of them is an error."""
    neighbours = load_run(args.run[0], args.run[1:]).parallel.gradient_neighbours if args.run else 1
    found = findings(_ranks(args), neighbours)
    code = UserError.EXIT_CODE if any(finding.severity == "error" for finding in found) else 0
    text = "\n".join(f"{finding.severity:7}  {finding.text}" for finding in found)
    return Answer([asdict(finding) for finding in found], text, code)


def show_map(args: argparse.Namespace) -> Answer:
    """Return the rank map and draw it if requested."""
    ranks = _ranks(args)
    if args.svg is not None:
        check_file("--svg", args.svg)
        save_text(args.svg, rank_map.svg(ranks, f"Ranks on {args.file}"))
    return Answer([rank.as_data() for rank in ranks], rank_map.table(ranks, args.every_host))


def select_hosts(args: argparse.Namespace) -> Answer | None:
    """Write a hostfile of the selected hosts."""
    left = select(parse_hostfile(args.file), args.include, args.exclude)
    if args.json:
        return Answer(left, "")
    for host, slots in left.items():
        if slots != list(range(len(slots))):
            raise UserError(
                f"{args.file}: slots {','.join(map(str, slots))} of {host} are not its first {len(slots)}, and a "
                "hostfile has only the number of slots; exclude its last slots, or pass the filter to deepspeed itself"
            )
    _write({host: len(slots) for host, slots in left.items()}, args.out, "")
    return None


def _add_parallel(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE")
    command.add_argument(
        "--run", nargs="+", metavar=("RUN.yaml", "key=value"), help="take pp and tp from it; FILE first"
    )
    command.add_argument("--pp", type=whole(), help="pipeline stages (default: 1)")
    command.add_argument("--tp", type=whole(), help="tensor-parallel size (default: 1)")


def _ranks(args: argparse.Namespace) -> list[PlacedRank]:
    hosts = parse_hostfile(args.file)
    if not args.run:
        pp, tp = (1 if size is None else size for size in (args.pp, args.tp))
        return place_ranks(hosts, Axes(pp=pp, tp=tp), args.file)
    if args.pp is not None or args.tp is not None:
        raise UserError(
            "command line: --pp and --tp conflict with --run, which sets them; write parallel.pp=N after --run RUN.yaml"
        )
    layout = resolve_layout(load_run(args.run[0], args.run[1:]), sum(hosts.values()))
    return place_ranks(hosts, layout, args.file)


def _write(hosts: Mapping[str, int], out: str | None, comment: str) -> None:
    if out is None:
        print(hostfile_text(hosts, comment, "command line"), end="")
    else:
        write_hostfile(out, hosts, comment)


if __name__ == "__main__":
    sys.exit(main())
