#!/usr/bin/env python3
"""Plan a training run: what a layout costs, which is best, what the run costs, and how far the planner is off."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_ds.config.reader import integer
from llama_ds.config.run_file import find_run_file, load_run
from llama_ds.config.schema import RunConfig
from llama_ds.config.text import save_text
from llama_ds.errors import UserError
from llama_ds.perf.plan import cost as costs
from llama_ds.perf.plan import hardware, tables
from llama_ds.perf.plan.estimate import as_data, estimate, report
from llama_ds.perf.plan.explain import explain
from llama_ds.perf.plan.fit import BOUNDS, cross_validate, fit, usable
from llama_ds.perf.plan.page import page
from llama_ds.perf.plan.rows import Row, read_rows
from llama_ds.perf.plan.search import Found, search
from llama_ds.perf.plan.sizes import rows_of
from llama_ds.perf.plan.validate import check
from llama_ds.perf.plan.write import write

EXAMPLES = """examples:
  tools/plan.py estimate ds_configs/llama_65b.yaml --gpus 2048 --gpu a100-80gb parallel.schedule=zb_h1 --explain
  tools/plan.py search --model 65b --gpus 2048 --gpu a100-80gb --seq-len 2048 --global-batch-tokens 4M --html plan.html
  tools/plan.py search --model 13b --gpus 256 --gpu h100-80gb --write planned/
  tools/plan.py cost --model 65b --gpus 2048 --gpu a100-80gb
  tools/plan.py cost --table15
  tools/plan.py cost --target-loss 2.0 --inference-tokens 2T
  tools/plan.py validate --data docs/calibration/published_runs.csv --rows
  tools/plan.py fit --data docs/calibration/published_runs.csv docs/calibration/a100_single_node_runs.csv \\
      --gpu a100-80gb a100-40gb --cross-validate
"""
CALIBRATION = ROOT / "docs" / "calibration" / "published_runs.csv"


def main(argv: list[str] | None = None) -> int:
    """Do what the command asks; a user's mistake is one line and exit code 2."""
    args = parse(argv)
    try:
        args.run_command(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE
    except BrokenPipeError:
        sys.stderr.close()
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], words: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=words, description=words, epilog=EXAMPLES, formatter_class=formatter)
        found.set_defaults(run_command=run)
        found.add_argument("--json", action="store_true", help="print JSON")
        return found

    one = command("estimate", run_estimate, "memory and time of one run file on so many GPUs")
    one.add_argument("run", help="run file, or the size of one in ds_configs/, such as 65b")
    one.add_argument("overrides", nargs="*", metavar="key=value", help="of the run file")
    _machine(one)
    one.add_argument("--explain", action="store_true", help="say where each number comes from")

    best = command("search", run_search, "rank all legal layouts of a model on so many GPUs")
    best.add_argument("--model", required=True, help="size such as 65b, or a run file")
    _machine(best)
    best.add_argument("--seq-len", help="tokens of a row (default: the run file's)")
    best.add_argument(
        "--global-batch-tokens", metavar="N", help="tokens of a step, such as 4M (default: the run file's)"
    )
    best.add_argument("--top", type=_positive, default=10, help="layouts to list (default: %(default)s)")
    best.add_argument("--html", metavar="FILE", help="write a page with pictures")
    best.add_argument("--write", metavar="FOLDER", help="write run YAML and DeepSpeed JSON of the best layout")

    price = command("cost", run_cost, "GPU-hours, days, energy and carbon of a run; or the cheapest size for a loss")
    price.add_argument("--model", help="size such as 65b, or a run file")
    price.add_argument("--gpus", type=_positive, help="GPUs of the run")
    price.add_argument("--gpu", default="a100-80gb", help=f"{', '.join(hardware.names())} (default: %(default)s)")
    price.add_argument("--tokens", help="tokens of the run, such as 1.4T (default: the run file's)")
    price.add_argument("--tokens-per-second", type=float, help="of one GPU (default: of the best layout found)")
    price.add_argument("--table15", action="store_true", help="the LLaMA paper's table 15 and its sizes as planned")
    price.add_argument("--target-loss", type=float, help="the cheapest size that reaches it (Chinchilla's law)")
    price.add_argument("--inference-tokens", default="0", help="tokens that the model will answer, such as 2T")
    price.add_argument("--training-mfu", type=float, default=0.45, help="default: %(default)s")
    price.add_argument("--inference-mfu", type=float, default=0.25, help="default: %(default)s")

    judge = command("validate", run_validate, "compare the planner with measured runs of CSV files")
    judge.add_argument("--data", nargs="+", default=[str(CALIBRATION)], metavar="CSV", help="default: %(default)s")
    judge.add_argument("--rows", action="store_true", help="print every row")

    adjust = command("fit", run_fit, "fit the physical constants of machines to measured runs, and write them")
    adjust.add_argument("--data", nargs="+", default=[str(CALIBRATION)], metavar="CSV", help="default: %(default)s")
    adjust.add_argument("--gpu", nargs="+", required=True, help="machines that share one calibration")
    adjust.add_argument("--every", type=_positive, default=16, help="of sources with over 500 rows, take every n-th")
    adjust.add_argument("--rounds", type=_positive, default=4)
    adjust.add_argument("--cross-validate", action="store_true", help="also fit without each source, and judge on it")
    adjust.add_argument("--dry-run", action="store_true", help="do not write the YAML files")
    args, rest = parser.parse_known_args(argv)
    overrides = args.command == "estimate" and all("=" in word and not word.startswith("-") for word in rest)
    if rest and not overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides may stand after options
        args.overrides += rest
    return args


def run_estimate(args: argparse.Namespace) -> None:
    """Print the estimate of one layout."""
    found = estimate(load_run(find_run_file(args.run), args.overrides), args.gpus, hardware.load(args.gpu))
    if args.json:
        print(json.dumps(as_data(found), indent=1))
        return
    print(report(found))
    if args.explain:
        print("\n" + explain(found))


def run_search(args: argparse.Namespace) -> None:
    """Print the ranking, and write what was asked for."""
    gpu = hardware.load(args.gpu)
    base = _base(args.model, args.seq_len, args.global_batch_tokens, quiet=args.json)
    found = search(base, args.gpus, gpu, args.top)
    best = found.best[0]
    cost = costs.run_cost(base.training.tokens, best.step.tokens_per_second, args.gpus, gpu.power_w)
    if args.json:
        print(json.dumps(tables.search_data(found, cost), indent=1))
    else:
        print(tables.search_table(found, cost))
    if args.html:
        save_text(args.html, page(f"{base.name} on {args.gpus:,} x {gpu.name}", found, cost))
    if args.write:
        run = replace(best.run, name=f"{base.name}_{args.gpus}x{gpu.name}".replace("-", "_"))
        for path in write(run, args.write):
            print(f"wrote {path}", file=sys.stderr)


def run_cost(args: argparse.Namespace) -> None:
    """Print what a run costs, or which size is cheapest."""
    gpu = hardware.load(args.gpu)
    if args.target_loss is not None:
        shares = (args.training_mfu, args.inference_mfu)
        for name, share in zip(("--training-mfu", "--inference-mfu"), shares, strict=True):
            if not 0 < share <= 1:
                raise UserError(f"{name} = {share:g} is not above 0 and at most 1; it is a share of the GPU's peak")
        rates = costs.Rates(gpu.peak * shares[0], gpu.peak * shares[1])
        inference = _tokens("--inference-tokens", args.inference_tokens)
        print(tables.trade(args.target_loss, inference, rates, args.json))
    elif args.table15:
        print(tables.table_15({size: _search_for_paper(size, gpu) for size in costs.TABLE_15}, args.json))
    elif args.model is None or args.gpus is None:
        raise UserError("cost: wants --model and --gpus, or --table15, or --target-loss; see --help")
    else:
        base = load_run(find_run_file(args.model), ["parallel={}"])
        tokens = _tokens("--tokens", args.tokens) if args.tokens else base.training.tokens
        speed, layout = args.tokens_per_second, None
        if speed is None:
            layout = search(base, args.gpus, gpu, 1).best[0]
            speed = layout.step.tokens_per_second
        cost = costs.run_cost(tokens, speed, args.gpus, gpu.power_w)
        print(tables.cost_text(base.name, cost, tokens, speed, layout, args.json))


def run_validate(args: argparse.Namespace) -> None:
    """Print the errors by source."""
    machines = {name: hardware.load(name) for name in hardware.names()}
    checked, skipped = check(_rows(args.data), machines)
    if not checked:
        reasons = "; ".join(f"{count} {why}" for why, count in skipped.items()) or "the files hold no rows"
        raise UserError(f"{', '.join(args.data)}: no row can be compared: {reasons}; state layouts as the columns ask")
    print(tables.errors(checked, skipped, args.rows, args.json))


def run_fit(args: argparse.Namespace) -> None:
    """Fit, report on sources left out, and write the YAML files."""
    machines = {name: hardware.load(name) for name in args.gpu}
    rows = usable(_rows(args.data), machines, args.every)
    if not rows:
        raise UserError(f"{', '.join(args.data)}: no row of {', '.join(machines)} has a stated layout; give others")
    start = machines[args.gpu[0]].calibration
    say = (lambda line: None) if args.json else (lambda line: print(line, flush=True))
    say(f"{len(rows)} rows, {len(BOUNDS)} constants")
    found = fit(rows, machines, start, rounds=args.rounds, say=say)
    found = replace(found, sources=f"fitted by tools/plan.py fit to {', '.join(Path(path).name for path in args.data)}")
    left_out = cross_validate(rows, machines, found) if args.cross_validate else {}
    if args.json:
        print(json.dumps({"calibration": asdict(found), "left_out": left_out}, indent=1))
    else:
        print("\n".join(f"  {name:16} {getattr(found, name):.4g}" for name in BOUNDS))
        print(tables.left_out(left_out) if left_out else "")
    if not args.dry_run:
        for name, machine in machines.items():
            path = hardware.FOLDER / f"{name}.yaml"
            save_text(str(path), hardware.text(replace(machine, calibration=found)))
            print(f"wrote {path}", file=sys.stderr)


def _machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=_positive, required=True, help="number of GPUs")
    parser.add_argument("--gpu", default="a100-80gb", help=f"{', '.join(hardware.names())}, or a YAML file")


def _positive(text: str) -> int:
    number = integer(text)
    if number is None or number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def _tokens(flag: str, text: str) -> int:
    number = integer(text)
    if number is None or number < 0:
        raise UserError(f"{flag} {text}: is not a number of tokens; write 4M, 1.4T or 4194304")
    return number


def _base(model: str, seq_len: str | None, batch_tokens: str | None, quiet: bool = False) -> RunConfig:
    """Return the model's run with another sequence length and batch; its own layout is left out."""
    path, overrides = find_run_file(model), ["parallel={}"]
    if seq_len:
        overrides.append(f"data.seq_len={seq_len}")
    base = load_run(path, overrides)
    if batch_tokens:
        wanted = _tokens("--global-batch-tokens", batch_tokens)
        rows = rows_of(wanted, base.data.seq_len)
        if rows * base.data.seq_len != wanted and not quiet:
            print(
                f"{batch_tokens} tokens are {wanted / base.data.seq_len:,.1f} rows: taken as {rows:,} rows, "
                f"{rows * base.data.seq_len:,} tokens, which more layouts divide",
                file=sys.stderr,
            )
        base = load_run(path, [*overrides, f"training.global_batch={rows}"])
    return base


def _search_for_paper(size: str, gpu: hardware.Hardware) -> Found:
    return search(_base(size, "2048", "4194304"), 2048, gpu, 1)


def _rows(paths: Sequence[str]) -> list[Row]:
    return [row for path in paths for row in read_rows(path)]


if __name__ == "__main__":
    sys.exit(main())
