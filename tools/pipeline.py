#!/usr/bin/env python3
"""Time pipeline schedules against each other and against DeepSpeed's own engine, on links of a given bandwidth.

Every rank is a simulated host: a network namespace with its own address and a link of the requested bandwidth and
latency (needs Linux, root and iproute2). Without --rate-mbit all ranks are processes on this host.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds.benchmarks.pipeline.contest import Contest
from llama_ds.benchmarks.pipeline.report import report
from llama_ds.benchmarks.pipeline.run import run_contest
from llama_ds.checkpoint.model_shape import read_models
from llama_ds.command_line import Answer, add_results, check_folder, delay, from_options, new_parser, run, size, whole
from llama_ds.config.text import save_text
from llama_ds.perf.trace.picture import picture
from llama_ds.perf.trace.read import read

EXAMPLES = """examples:
  tools/pipeline.py --pp 4 --rate-mbit 50 --delay-ms 5 --schedules deepspeed 1f1b zb_h1
  tools/pipeline.py --pp 2 --dp 2 --rate-mbit 50 --delay-ms 5 --out measured.json --svg pictures/
  tools/pipeline.py model.num_hidden_layers=8 --pp 4 --schedules deepspeed zb_h1 dualpipe_v
"""
SCHEDULES = ["deepspeed", "1f1b", "zb_h1", "zb_h1+1"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    read_models()
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(race, __doc__, EXAMPLES)
    words = "run file overrides, for another shape; also parallel.KEY and deepspeed.KEY that no option here sets"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=words)
    words = "run file, without its parallel and deepspeed (default: %(default)s)"
    parser.add_argument("--run", dest="run_file", default="ds_configs/quickstart.yaml", help=words)
    parser.add_argument("--pp", type=whole(), default=4)
    parser.add_argument("--tp", type=whole(), default=1)
    parser.add_argument("--dp", type=whole(), default=1)
    words = "zb_v+2:early: with extra_warmup 2 and post_validation (default: %(default)s)"
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, metavar="NAME", help=words)
    parser.add_argument(
        "--micro-batches", type=whole(), default=8, help="micro-batches per rank (default: %(default)s)"
    )
    parser.add_argument("--micro-batch", type=whole(), default=1, help="rows of a micro-batch (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--recompute", default="none", help="save policy (default: %(default)s)")
    parser.add_argument("--rate-mbit", type=size, help="bandwidth of a link in each direction")
    parser.add_argument("--delay-ms", type=delay, default=0.0, help="latency of a link in each direction")
    parser.add_argument("--repeats", type=whole(), default=7, help="timed steps per schedule (default: %(default)s)")
    parser.add_argument("--steps", type=whole(), default=1, help="steps of a turn, between barriers (default: 1)")
    words = "milliseconds of a rank's forward, input and weight backward of a micro-batch; ranks sleep the rest"
    parser.add_argument("--pace", nargs="+", type=delay, metavar="MS", help=words)
    words = "parallel.pass_times of zb_v, v_half and v_min, as tools/profile_run.py analyse prints them"
    parser.add_argument("--pass-times", nargs="+", type=whole(0), metavar="N", help=words)
    add_results(parser)
    parser.add_argument("--svg", metavar="FOLDER", help="draw one step of each schedule into FOLDER")
    words = "copy the traces of these steps to FOLDER, for tools/profile_run.py analyse"
    parser.add_argument("--keep", metavar="FOLDER", help=words)
    return parser


def race(args: argparse.Namespace) -> Answer:
    """Run the ranks; return their measurements."""
    contest = from_options(Contest, args)
    for schedule in contest.schedules:
        contest.contestant(schedule)  # raises errors before any rank starts
    for option, path in (("--svg", args.svg), ("--keep", args.keep)):
        if path is not None:
            check_folder(option, path)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_contest(contest, folder)
        answer = Answer(*report(contest, folder))
        if args.keep:
            shutil.copytree(folder, args.keep, ignore=shutil.ignore_patterns("*.log"), dirs_exist_ok=True)
        if args.svg:
            for schedule in contest.schedules:
                save_text(f"{args.svg}/{schedule}.svg", picture(read(folder / schedule), schedule))
    return answer


if __name__ == "__main__":
    sys.exit(main())
