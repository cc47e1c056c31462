#!/usr/bin/env python3
"""Plan a training run: cost of a layout, best layouts, cost of the run, and accuracy of the planner."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds import shipped
from llama_ds.checkpoint.model_shape import read_models
from llama_ds.command_line import (
    Answer,
    add_json,
    check_file,
    check_folder,
    delay,
    given,
    new_parser,
    real,
    run,
    seconds,
    subcommands,
)
from llama_ds.config.declare import MOST_TOKENS
from llama_ds.config.reader import integer
from llama_ds.config.row_stages import stage_runs
from llama_ds.config.run_file import load_run
from llama_ds.config.text import save_text
from llama_ds.errors import UserError
from llama_ds.perf.plan import cost as costs
from llama_ds.perf.plan import hardware, tables
from llama_ds.perf.plan.estimate import as_data, estimate, report
from llama_ds.perf.plan.explain import explain
from llama_ds.perf.plan.fit import BOUNDS, cross_validate, fit, usable
from llama_ds.perf.plan.goodput import Tier
from llama_ds.perf.plan.goodput_published import DISK, LLAMA3_RATE, MEMORY
from llama_ds.perf.plan.goodput_tables import GoodputRequest, plan_goodput_of, published
from llama_ds.perf.plan.models import base_run, stages_of
from llama_ds.perf.plan.page import page
from llama_ds.perf.plan.rows import Row, read_rows
from llama_ds.perf.plan.search import search
from llama_ds.perf.plan.validate import assumptions, check, fits
from llama_ds.perf.plan.write import new_files, write

EXAMPLES = """examples:
  tools/plan.py estimate ds_configs/llama_65b.yaml --gpus 2048 --gpu a100-80gb parallel.schedule=zb_h1 --explain
  tools/plan.py search --model 65b --gpus 2048 --gpu a100-80gb --seq-len 2048 --global-batch-tokens 4M --html plan.html
  tools/plan.py search --model 13b --gpus 256 --gpu h100-80gb --write planned/
  tools/plan.py cost --model 65b --gpus 2048 --gpu a100-80gb
  tools/plan.py cost --table15
  tools/plan.py cost --target-loss 2.0 --inference-tokens 2T
  tools/plan.py goodput --model 65b --gpus 2048 --gpu a100-80gb --disk-save-s 10 --memory-save-s 0.04
  tools/plan.py goodput --published
  tools/plan.py validate --data docs/calibration/published_runs.csv --rows
  tools/plan.py fit --data docs/calibration/published_runs.csv docs/calibration/a100_single_node_runs.csv \\
      --gpu a100-80gb a100-40gb --cross-validate
"""
MOST = 10**6  # GPUs, and other counts
RATE = real(1e-3, 1e9)  # tokens/s of a GPU
# Options of the commands cost and goodput that only some of their questions use.
_OF_A_RUN = ("model", "gpus", "tokens", "tokens_per_second")
_OF_A_LOSS = ("inference_tokens", "training_mfu", "inference_mfu")
_NOT_OF_A_JOB = ("published", "json", "command", "work", "default_of")
CALIBRATION = shipped.folder("docs/calibration") / "published_runs.csv"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    read_models()
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(None, __doc__, EXAMPLES)
    add = subcommands(parser)
    _add_estimate_options(add("estimate", plan_estimate, "memory and time of a run file on a number of GPUs"))
    _add_search_options(add("search", plan_search, "rank all valid layouts of a model on a number of GPUs"))
    words = "GPU-hours, days, energy and carbon of a run, or the cheapest model size for a loss"
    _add_cost_options(add("cost", plan_cost, words))
    words = "effective training time under failures, checkpoint intervals, spares, end date"
    _add_goodput_options(add("goodput", plan_goodput, words))
    command = add("validate", plan_validate, "compare the planner with measured runs of CSV files")
    command.add_argument("--data", nargs="+", default=[str(CALIBRATION)], metavar="CSV", help="default: %(default)s")
    command.add_argument("--rows", action="store_true", help="print every row")
    add_json(command)
    words = "fit the physical constants of machines to measured runs and write them"
    _add_fit_options(add("fit", plan_fit, words))
    return parser


def _add_estimate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", help="run file, or the size of one in ds_configs/, such as 65b")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the run file")
    _add_machine_options(command)
    command.add_argument("--explain", action="store_true", help="explain the origin of each number")
    add_json(command)


def _add_search_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="size such as 65b, or a run file")
    _add_machine_options(command)
    command.add_argument("--seq-len", help="tokens of a row (default: the run file's)")
    command.add_argument(
        "--global-batch-tokens", metavar="N", help="tokens of a step, such as 4M (default: the run file's)"
    )
    command.add_argument("--top", type=_positive, default=10, help="layouts to list (default: %(default)s)")
    command.add_argument("--html", metavar="FILE", help="write a page with pictures")
    command.add_argument("--write", metavar="FOLDER", help="write run YAML and DeepSpeed JSON of the best layout")
    add_json(command)


def _add_cost_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help="size such as 65b, or a run file")
    command.add_argument("--gpus", type=_positive, help="GPUs of the run")
    command.add_argument("--gpu", default="a100-80gb", help=f"{', '.join(hardware.names())} (default: %(default)s)")
    command.add_argument("--tokens", help="tokens of the run, such as 1.4T (default: the run file's)")
    command.add_argument("--tokens-per-second", type=RATE, help="rate of one GPU (default: of the best layout found)")
    command.add_argument(
        "--table15", action="store_true", help="table 15 of the LLaMA paper beside the planner's costs"
    )
    command.add_argument(
        "--target-loss", type=real(0, above=True), help="find the cheapest size for this loss (Chinchilla's law)"
    )
    command.add_argument("--inference-tokens", default="0", help="tokens generated after training, such as 2T")
    command.add_argument("--training-mfu", type=real(0, 1, above=True), default=0.45, help="default: %(default)s")
    command.add_argument("--inference-mfu", type=real(0, 1, above=True), default=0.25, help="default: %(default)s")
    command.set_defaults(default_of=command.get_default)
    add_json(command)


def _add_goodput_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help="size such as 65b, or a run file")
    command.add_argument("--gpus", type=_positive, help="GPUs of the run")
    command.add_argument("--gpu", default="a100-80gb", help=f"{', '.join(hardware.names())} (default: %(default)s)")
    command.add_argument(
        "--training-days",
        type=real(0, 1e5, above=True),
        help="days without interruptions (default: of the best layout)",
    )
    command.add_argument("--step-s", type=seconds, help="time of a step (default: of the best layout)")
    command.add_argument(
        "--failures-per-gpu-day",
        type=real(1e-9, 100),
        default=round(LLAMA3_RATE, 7),
        help="default: %(default)s, Llama 3's; `tools/launch.py report` prints that of a run",
    )
    command.add_argument("--disk-save-s", type=delay, default=DISK.save_s, help="time blocked by a save (%(default)s)")
    command.add_argument(
        "--disk-write-s", type=delay, default=DISK.write_s, help="then, until the save is complete (%(default)s)"
    )
    command.add_argument(
        "--restart-s", type=delay, default=DISK.restart_s, help="from a failure to the first step (%(default)s)"
    )
    command.add_argument("--memory-save-s", type=delay, help="time blocked by a save to peers' memory (default: none)")
    command.add_argument(
        "--memory-restart-s", type=delay, default=MEMORY.restart_s, help="the same, from memory (%(default)s)"
    )
    command.add_argument(
        "--memory-share", type=real(0, 1, above=True), default=MEMORY.share, help="failures it survives (%(default)s)"
    )
    command.add_argument("--gpus-per-host", type=_positive, default=8, help="default: %(default)s")
    command.add_argument(
        "--host-share", type=real(0, 1), default=0.78, help="failures after which a host needs repair (%(default)s)"
    )
    command.add_argument("--repair-h", type=real(0, 1e5), default=24.0, help="duration of a repair (%(default)s h)")
    command.add_argument("--start", type=_date, metavar="YYYY-MM-DD", help="first day of the run (default: today)")
    command.add_argument("--published", action="store_true", help="compare with published runs")
    command.set_defaults(default_of=command.get_default)
    add_json(command)


def _add_fit_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", nargs="+", default=[str(CALIBRATION)], metavar="CSV", help="default: %(default)s")
    command.add_argument("--gpu", nargs="+", required=True, help="machines that share one calibration")
    command.add_argument("--every", type=_positive, default=16, help="use every n-th row of sources with over 500 rows")
    command.add_argument("--rounds", type=_positive, default=4)
    command.add_argument("--cross-validate", action="store_true", help="also fit without each source and test on it")
    command.add_argument("--dry-run", action="store_true", help="do not write the YAML files")
    add_json(command)


def plan_estimate(args: argparse.Namespace) -> Answer:
    """Return the estimate of one layout."""
    run, gpu = load_run(args.run, args.overrides), hardware.load(args.gpu)
    stages = [estimate(stage, args.gpus, gpu) for stage in stage_runs(run)]
    texts = [report(found) + (f"\n\n{explain(found)}" if args.explain else "") for found in stages]
    data = as_data(stages[0]) if len(stages) == 1 else {"stages": [as_data(found) for found in stages]}
    return Answer(data, "\n\n".join(texts))


def plan_search(args: argparse.Namespace) -> Answer:
    """Return the ranking and write the requested files."""
    gpu = hardware.load(args.gpu)
    wanted = None
    if args.global_batch_tokens is not None:
        wanted = _tokens("--global-batch-tokens", args.global_batch_tokens)
    if args.write is not None and (key := stages_of(args.model)):
        raise UserError(
            f"--write {args.write}: {args.model} has {key}, of which the last one is planned, and a written file would "
            "train without the others; leave --write out, and take the layout of the answer into that run file"
        )
    base = base_run(args.model, args.seq_len, wanted)
    if wanted and wanted != base.training.global_batch * base.data.seq_len:
        rows = base.training.global_batch
        print(
            f"{args.global_batch_tokens} tokens are {wanted / base.data.seq_len:,.1f} rows: rounded to {rows:,} rows, "
            f"{rows * base.data.seq_len:,} tokens, which are divisible in more layouts",
            file=sys.stderr,
        )
    name = re.sub("[^A-Za-z0-9_.]", "_", f"{base.name}_{args.gpus}x{gpu.name}")
    if args.html is not None:
        check_file("--html", args.html)
    if args.write is not None:
        check_folder("--write", args.write)
        new_files(name, args.write)
    found = search(base, args.gpus, gpu, args.top)
    best = found.best[0]
    cost = costs.run_cost(base.training.tokens, best.step.tokens_per_second, args.gpus, gpu.power_w)
    if args.html:
        save_text(args.html, page(f"{base.name} on {args.gpus:,} x {gpu.name}", found, cost))
    if args.write:
        for path in write(replace(best.run, name=name), args.write):
            print(f"wrote {path}", file=sys.stderr)
    return Answer(tables.search_data(found, cost), tables.search_table(found, cost))


def plan_cost(args: argparse.Namespace) -> Answer:
    """Return the cost of a run, or the cheapest model size for a loss."""
    gpu = hardware.load(args.gpu)
    if args.table15:
        _refuse(args, (*_OF_A_RUN, "target_loss", *_OF_A_LOSS), "with --table15")
    if args.target_loss is not None:
        _refuse(args, _OF_A_RUN, "with --target-loss")
        return _trade(args, gpu)
    _refuse(args, _OF_A_LOSS, "without --target-loss")
    if args.table15:
        found = {size: search(base_run(size, "2048", 4194304), 2048, gpu, 1) for size in costs.TABLE_15}
        return Answer(*tables.table_15(found))
    if args.model is None or args.gpus is None:
        raise UserError("cost: needs --model and --gpus, or --table15, or --target-loss; see --help")
    base = base_run(args.model)
    tokens = base.training.tokens if args.tokens is None else _tokens("--tokens", args.tokens)
    speed, layout = args.tokens_per_second, None
    if speed is None:
        layout = search(base, args.gpus, gpu, 1).best[0]
        speed = layout.step.tokens_per_second
    cost = costs.run_cost(tokens, speed, args.gpus, gpu.power_w)
    data = {**tables.cost_data(cost), "tokens": tokens, "tokens_per_s_per_gpu": speed}
    return Answer(data, tables.cost_text(base.name, cost, tokens, speed, layout))


def _trade(args: argparse.Namespace, gpu: hardware.Hardware) -> Answer:
    """Return the model sizes that reach a loss, and their costs."""
    shares = (args.training_mfu, args.inference_mfu)
    rates = costs.Rates(gpu.peak * shares[0], gpu.peak * shares[1])
    return Answer(*tables.trade(args.target_loss, _tokens("--inference-tokens", args.inference_tokens, 0), rates))


def plan_goodput(args: argparse.Namespace) -> Answer:
    """Return the effective training time of a run, or the comparison with published runs."""
    gpu = hardware.load(args.gpu)
    if args.published:
        _refuse(args, [name for name in vars(args) if name not in _NOT_OF_A_JOB], "with --published")
        return Answer(*published())
    if args.memory_save_s is None:
        _refuse(args, ("memory_restart_s", "memory_share"), "without --memory-save-s")
    if args.gpus is None or (args.model is None and None in (args.training_days, args.step_s)):
        raise UserError(
            "goodput: needs --gpus and --model (or --training-days and --step-s), or --published; see --help"
        )
    name, days, step_s = args.model or "run", args.training_days, args.step_s
    if days is None or step_s is None:
        best = search(base_run(args.model), args.gpus, gpu, 1).best[0]
        days, step_s = days or best.days, step_s or best.step.seconds
    memory_share = args.memory_share if args.memory_save_s is not None else 0.0
    tiers = [Tier("disk", args.disk_save_s, args.restart_s, args.disk_write_s, 1 - memory_share)]
    if memory_share:
        tiers.insert(0, Tier("memory", args.memory_save_s, args.memory_restart_s, 0.0, memory_share))
    wanted = GoodputRequest(
        name=name,
        gpus=args.gpus,
        gpus_per_host=args.gpus_per_host,
        failures_per_gpu_day=args.failures_per_gpu_day,
        host_share=args.host_share,
        repair_s=3600 * args.repair_h,
        training_s=86400 * days,
        step_s=step_s,
        tiers=[tier for tier in tiers if tier.share],
        start=args.start or datetime.now(),
    )
    return Answer(*plan_goodput_of(wanted))


def plan_validate(args: argparse.Namespace) -> Answer:
    """Return the errors by source."""
    machines = {name: hardware.load(name) for name in hardware.names()}
    rows = _rows(args.data)
    checked, skipped = check(rows, machines)
    memory = fits(rows, machines)
    if not (checked or memory):
        reasons = "; ".join(f"{count} {why}" for why, count in skipped.items()) or "the files hold no rows"
        raise UserError(f"{', '.join(args.data)}: no row can be compared: {reasons}; fill in the layout columns")
    return Answer(*tables.errors(checked, skipped, assumptions(rows, machines), memory, args.rows))


def plan_fit(args: argparse.Namespace) -> Answer:
    """Fit, report on held-out sources, and write the YAML files."""
    # A row names a machine by its gpu_type: the name of a description, or that in a file of one's own.
    files = {(path := hardware.path_of(name)): hardware.load(str(path)) for name in args.gpu}
    machines = {machine.name: machine for machine in files.values()}
    if not args.dry_run:
        for path in files:
            check_file("--gpu", str(path))
    rows = usable(_rows(args.data), machines, args.every)
    if not rows:
        raise UserError(f"{', '.join(args.data)}: no row of {', '.join(machines)} states a layout; give other files")
    start = next(iter(machines.values())).calibration
    print_line = partial(print, file=sys.stderr, flush=True)
    print_line(f"{len(rows)} rows, {len(BOUNDS)} constants")
    found = fit(rows, machines, start, rounds=args.rounds, print_line=print_line)
    found = replace(found, sources=f"fitted by tools/plan.py fit to {', '.join(Path(path).name for path in args.data)}")
    left_out = cross_validate(rows, machines, found) if args.cross_validate else {}
    if not args.dry_run:
        for path, machine in files.items():
            save_text(str(path), hardware.text(replace(machine, calibration=found)))
            print(f"wrote {path}", file=sys.stderr)
    constants = "\n".join(f"  {name:16} {getattr(found, name):.4g}" for name in BOUNDS)
    data = {"calibration": asdict(found), "left_out": left_out}
    return Answer(data, constants + (f"\n{tables.left_out(left_out)}" if left_out else ""))


def _refuse(args: argparse.Namespace, names: Iterable[str], where: str) -> None:
    """Raise UserError for the first of these options that is given, because it has no effect."""
    for option in given(args, names):
        fix = "add that or leave it out" if where.startswith("without") else "leave one of them out"
        raise UserError(f"command line: {option} has no effect {where}; {fix}")


def _add_machine_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--gpus", type=_positive, required=True, help="number of GPUs")
    command.add_argument("--gpu", default="a100-80gb", help=f"{', '.join(hardware.names())}, or a YAML file")


def _date(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a date; write YYYY-MM-DD") from None


def _positive(text: str) -> int:
    number = integer(text)
    if number is None or number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    if number > MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is above {MOST:,}, the largest that is accepted")
    return number


def _tokens(flag: str, text: str, least: int = 1) -> int:
    number = integer(text)
    if number is None or not least <= number <= MOST_TOKENS:
        raise UserError(
            f"{flag} = {text!r} is not a number of tokens from {least} to {MOST_TOKENS:.0e}; write 4M, 1.4T or 4194304"
        )
    return number


def _rows(paths: Sequence[str]) -> list[Row]:
    return [row for path in paths for row in read_rows(path)]


if __name__ == "__main__":
    sys.exit(main())
