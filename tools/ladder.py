#!/usr/bin/env python3
"""Train several sizes from one dial, fit the loss law to them, and predict sizes that were not trained."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds.command_line import Answer, add_json, new_parser, real, run, subcommands, whole
from llama_ds.config.run_file import load_run
from llama_ds.config.text import save_text
from llama_ds.experiments.ladder.spec import Ladder, read_ladder

EXAMPLES = """examples:
  tools/ladder.py plan examples/ladder.yaml
  tools/ladder.py plan examples/ladder.yaml --depth 4,6,8,12
  tools/ladder.py run examples/ladder.yaml
  tools/ladder.py fit examples/ladder.yaml --target-loss 4.5 --inference-tokens 1e9
  tools/ladder.py report examples/ladder.yaml
  tools/ladder.py coordinate-check ds_configs/quickstart.yaml --widths 64,128,256,512 --out runs/coordinates
  tools/ladder.py rate-sweep ds_configs/quickstart.yaml training.steps=100 --widths 64,128,256 --rates 2e-3,4e-3,8e-3
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
    for name, work, words in (
        ("coordinate-check", check_coordinates, "draw the size of activations over the width, with muP and without"),
        ("rate-sweep", sweep_rates, "draw the loss over the learning rate for several widths, with muP and without"),
    ):
        command = add(name, work, words, f"{words.capitalize()}. It trains on this process, with the run's data.")
        command.add_argument("run", metavar="RUN.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the run file")
        command.add_argument("--widths", type=sizes, required=True, metavar="64,128,256", help="hidden sizes")
        if name == "coordinate-check":
            command.add_argument("--steps", type=whole(1, 1000), default=8, help="(default: %(default)s)")
        else:
            command.add_argument("--rates", type=rates, required=True, metavar="1e-3,2e-3", help="learning rates")
        command.add_argument("--out", metavar="FOLDER", help="for JSON and SVG (default: runs/COMMAND)")
        add_json(command)
    return parser


def sizes(text: str) -> tuple[int, ...]:
    """Return the widths of a list such as 64,128,256."""
    words = text.split(",")
    if not all(word.isdecimal() and 0 < int(word) <= 10**6 for word in words) or not 1 < len(words) == len(set(words)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different widths such as 64,128,256")
    return tuple(sorted(map(int, words)))


def rates(text: str) -> tuple[float, ...]:
    """Return the learning rates of a list such as 1e-3,2e-3."""
    return tuple(sorted({real(above=True)(word) for word in text.split(",")}))


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
    with ChildGroup() as children:

        def start(words: list[str], log: str, variables: Mapping[str, str]) -> int:
            environment = {**os.environ, **variables}
            if not log:
                return children.run(words, env=environment, stdout=sys.stderr)
            Path(log).parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a") as file:
                return children.run(words, env=environment, stdout=file, stderr=file)

        for predicted in (False, True):
            part = [rung for rung in rungs if rung.predicted is predicted]
            if predicted and part:
                _say(predict_first(ladder, rungs))
            execute(ladder, part, [paths[rung.name] for rung in part], start, _say)
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


def check_coordinates(args: argparse.Namespace) -> Answer:
    """Train every width for a few steps, and draw the size of activations."""
    from llama_ds.benchmarks.width_transfer import coordinate_check
    from llama_ds.experiments.ladder.width_figures import coordinates_figure, coordinates_text

    found = coordinate_check(load_run(args.run, args.overrides), args.widths, args.steps, _say)
    return _written(args, found, coordinates_figure, coordinates_text(found))


def sweep_rates(args: argparse.Namespace) -> Answer:
    """Train every width with every learning rate, and draw the losses."""
    from llama_ds.benchmarks.width_transfer import rate_sweep
    from llama_ds.experiments.ladder.width_figures import sweep_figure, sweep_text

    found = rate_sweep(load_run(args.run, args.overrides), args.widths, args.rates, _say)
    return _written(args, found, sweep_figure, sweep_text(found))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _written(
    args: argparse.Namespace, found: dict[str, Any], draw: Callable[[dict[str, Any]], str], text: str
) -> Answer:
    folder = args.out or f"runs/{args.command}"
    save_text(f"{folder}/{args.command}.json", json.dumps(found, indent=1) + "\n")
    save_text(f"{folder}/{args.command}.svg", draw(found))
    return Answer(found, f"{text}\n{folder}/{args.command}.svg")


if __name__ == "__main__":
    sys.exit(main())
