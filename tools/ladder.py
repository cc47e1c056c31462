#!/usr/bin/env python3
"""Train several sizes from one dial, fit the loss law to them, and predict sizes that were not trained."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds.command_line import Answer, add_json, new_parser, real, run, subcommands
from llama_ds.experiments.ladder.spec import Ladder, read_ladder

EXAMPLES = """examples:
  tools/ladder.py plan examples/ladder.yaml
  tools/ladder.py plan examples/ladder.yaml --depth 4,6,8,12
  tools/ladder.py run examples/ladder.yaml
  tools/ladder.py fit examples/ladder.yaml --target-loss 4.5 --inference-tokens 1e9
  tools/ladder.py report examples/ladder.yaml
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(None, __doc__, EXAMPLES)
    add = subcommands(parser)
    for name, work, words in (
        ("plan", plan_ladder, "derive the run files and print them"),
        ("run", run_ladder, "train what is not finished; predicted sizes come last, after their prediction"),
        ("fit", fit_ladder, "fit the loss law to the finished runs"),
        ("report", report_ladder, "write the figures as SVG and one HTML page"),
    ):
        command = add(name, work, words)
        command.add_argument("ladder", metavar="LADDER.yaml")
        command.add_argument("--depth", type=depths, default=(), metavar="4,6,8", help="instead of the ladder's depths")
        add_json(command)
        if name == "fit":
            command.add_argument("--target-loss", type=real(above=True), help="find the cheapest size for this loss")
            command.add_argument(
                "--inference-tokens", type=real(), default=0.0, help="over the model's life (default: %(default)s)"
            )
            command.add_argument("--gpu", default="a100-80gb", help="for GPU-hours (default: %(default)s)")
            command.add_argument("--training-mfu", type=real(0, 1, above=True), default=0.45)
            command.add_argument("--inference-mfu", type=real(0, 1, above=True), default=0.25)
    return parser


def depths(text: str) -> tuple[int, ...]:
    """Return the depths of a list such as 4,6,8."""
    words = text.split(",")
    if not all(word.isdecimal() and 0 < int(word) <= 1000 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of depths such as 4,6,8")
    return tuple(map(int, words))


def _ladder(args: argparse.Namespace) -> Ladder:
    return read_ladder(args.ladder, args.depth)


def plan_ladder(args: argparse.Namespace) -> Answer:
    """Write the run files."""
    from llama_ds.experiments.ladder.plan import plan, write_plan
    from llama_ds.experiments.ladder.results import plan_data, plan_text

    ladder = _ladder(args)
    rungs = plan(ladder)
    paths = write_plan(ladder, rungs)
    return Answer(plan_data(rungs, paths), plan_text(rungs))


def run_ladder(args: argparse.Namespace) -> Answer:
    """Train what is not finished, and return the losses."""
    from llama_ds.child_processes import ChildGroup
    from llama_ds.experiments.ladder.execute import execute
    from llama_ds.experiments.ladder.plan import plan, write_plan
    from llama_ds.experiments.ladder.results import losses_text, predict_first, results

    ladder = _ladder(args)
    rungs = plan(ladder)
    paths = dict(zip((rung.name for rung in rungs), write_plan(ladder, rungs), strict=True))
    say = partial(print, file=sys.stderr, flush=True)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ladder.ranks)), **os.environ}
    with ChildGroup() as children:

        def start(words: list[str], log: str) -> int:
            if not log:
                return children.run(words, env=environment, stdout=sys.stderr)
            Path(log).parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a") as file:
                return children.run(words, env=environment, stdout=file, stderr=file)

        for predicted in (False, True):
            part = [rung for rung in rungs if rung.predicted is predicted]
            if predicted and part:
                say(predict_first(ladder, rungs))
            execute(ladder, part, [paths[rung.name] for rung in part], start, say)
    return Answer(results(rungs), losses_text(ladder, rungs))


def fit_ladder(args: argparse.Namespace) -> Answer:
    """Return the law, its intervals, and the choices that follow from it."""
    from llama_ds.experiments.ladder.plan import plan, write_plan
    from llama_ds.experiments.ladder.results import choice, fit_data, fit_text, fitted
    from llama_ds.perf.plan import hardware
    from llama_ds.perf.plan.cost import Rates

    ladder = _ladder(args)
    rungs = plan(ladder)
    write_plan(ladder, rungs)
    found = fitted(rungs)
    data, text = fit_data(found, rungs), fit_text(found, rungs)
    if args.target_loss is not None:
        gpu = hardware.load(args.gpu)
        rates = Rates(gpu.peak * args.training_mfu, gpu.peak * args.inference_mfu)
        data["cheapest"], words = choice(found.law, args.target_loss, args.inference_tokens, rates)
        text += f"\n{words}"
    return Answer(data, text)


def report_ladder(args: argparse.Namespace) -> Answer:
    """Write the figures and the page into the ladder's folder."""
    from llama_ds.experiments.ladder.page import write_report
    from llama_ds.experiments.ladder.plan import plan, write_plan

    ladder = _ladder(args)
    rungs = plan(ladder)
    write_plan(ladder, rungs)
    paths, remarks = write_report(ladder, rungs)
    return Answer({"files": paths, "remarks": remarks}, "\n".join(paths), remarks=remarks)


if __name__ == "__main__":
    sys.exit(main())
