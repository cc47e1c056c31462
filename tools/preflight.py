#!/usr/bin/env python3
"""Check all hosts of a hostfile before a job uses them, and write a hostfile with spares in place of bad hosts.

Exit code: 0 all hosts are good, 1 some are bad but enough are left, 2 too few are left or a mistake in the command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds.checkpoint.model_shape import read_models
from llama_ds.command_line import Answer, add_json, new_parser, port, real, run, seconds, whole
from llama_ds.config.run_file import load_run
from llama_ds.errors import UserError
from llama_ds.launch.hostfile import parse_hostfile, write_hostfile
from llama_ds.launch.preflight import PreflightSettings, Report, examine, promote

EXAMPLES = """examples:
  tools/preflight.py --hostfile hostfiles/256x8 --run ds_configs/llama_65b.yaml
  tools/preflight.py --hostfile hostfiles/256x8 --spares hostfiles/spares --out hostfiles/today
  tools/preflight.py --hostfile hostfiles/local --no-measure --json
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    read_models()
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(preflight, __doc__, EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of --run")
    parser.add_argument("--hostfile", required=True)
    parser.add_argument("--run", help="run file whose folders and tokenizer are checked")
    parser.add_argument("--spares", help="hostfile of spare hosts that replace bad ones")
    parser.add_argument("--world", type=whole(), help="required number of ranks (default: all slots of the hostfile)")
    parser.add_argument("--out", metavar="FILE", help="write the hostfile of the good hosts to FILE")
    add_json(parser, "the report")
    parser.add_argument("--no-measure", action="store_true", help="do not time devices and links")
    parser.add_argument("--slow", choices=("warning", "error"), default="warning", help="severity of a slow host")
    parser.add_argument("--burn-s", type=seconds, default=2.0, help="time of the device test (default: %(default)s)")
    parser.add_argument(
        "--timeout-s", type=seconds, default=20.0, help="time for a host to answer (default: %(default)s)"
    )
    parser.add_argument(
        "--min-free-gib", type=real(0, 1e9), default=1.0, help="free space on each disk (default: %(default)s)"
    )
    parser.add_argument("--nic", default="", help="network interface that every host must have")
    parser.add_argument("--ssh-port", type=port)
    return parser


def preflight(args: argparse.Namespace) -> Answer:
    """Check the hosts and write the hostfile; return the report."""
    hosts = parse_hostfile(args.hostfile)
    spares = parse_hostfile(args.spares) if args.spares else {}
    if both := hosts.keys() & spares.keys():
        raise UserError(f"{args.spares}: {', '.join(sorted(both))} is also in {args.hostfile}; remove it from one")
    wanted = load_run(args.run, args.overrides) if args.run else None
    settings = PreflightSettings(
        output_dir=wanted.output_dir if wanted else "runs",
        cache_dir=wanted.data.cache_dir if wanted else "",
        files=[wanted.data.tokenizer] if wanted else [],
        min_free_gib=args.min_free_gib,
        timeout_s=args.timeout_s,
        nic=args.nic,
        ssh_port=args.ssh_port,
        fp8=wanted is not None and wanted.compute.fp8 != "off",
        measure=not args.no_measure,
        burn_s=args.burn_s,
        slow=args.slow,
    )
    report = examine(hosts | spares, settings, print_line)
    chosen = promote(hosts, report.good, spares, args.world)
    found = report.as_json() | {"hosts": chosen}
    if chosen is None:
        slots = sum((hosts | spares)[host] for host in report.good)
        few = f"error: {args.hostfile}: the good hosts have {slots} slots, too few; repair hosts, or add --spares"
        return Answer(found, table(report), UserError.EXIT_CODE, [few])
    if args.out:
        write_hostfile(args.out, chosen, f"{len(chosen)} hosts found good")
    return Answer(found, table(report), 1 if len(report.good) < len(report.hosts) else 0)


def table(report: Report) -> str:
    """Return the report as text: findings, speeds and the number of good hosts."""
    width = max(map(len, report.hosts))
    lines = [f"{f.host:{width}}  {f.severity:7}  {f.check}: {f.text}" for f in report.findings]
    lines += report.speed_lines()
    return "\n".join([*lines, f"{len(report.good)} of {len(report.hosts)} hosts are good"])


def print_line(text: str) -> None:
    """Print progress on stderr."""
    print(text, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
