#!/usr/bin/env python3
"""Compute a checkpoint's loss on the validation rows of its training run, or with --tasks its results in benchmarks.

"tools/evaluate.py fetch TASKS --data DIR" downloads the data sets of benchmarks; evaluation itself uses no network.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds.checkpoint.choices import DTYPE_NAMES
from llama_ds.command_line import Answer, add_json, new_parser, real, run, whole

EXAMPLES = """examples:
  tools/evaluate.py runs/quickstart
  tools/evaluate.py runs/quickstart/checkpoints/step_00000100 --rows 256 --json
  tools/evaluate.py runs/quickstart --hf runs/quickstart/hf
  tools/evaluate.py runs/old --tokenizer moved/tokenizer.model --source code=moved/shards/code
  tools/evaluate.py runs/quickstart --tasks miniature
  tools/evaluate.py fetch common_sense,mmlu --data benchmarks
  tools/evaluate.py exported/hf --tasks common_sense --data benchmarks --limit 500 --results results.jsonl
  tools/evaluate.py runs/7b --tasks humaneval --data benchmarks --samples 100 --pass-at 10 --run-code
  tools/evaluate.py runs/7b --beside runs/13b --figure tasks.svg --references paper.json
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(evaluate, __doc__, EXAMPLES)
    parser.add_argument(
        "checkpoint", help="a checkpoint, or a run folder or its checkpoints folder (newest checkpoint); or: fetch"
    )
    parser.add_argument("names", metavar="TASKS", nargs="?", help="after the word fetch: whose data to download")
    parser.add_argument("--hf", metavar="DIR", help="evaluate this export with transformers instead, on the same rows")
    parser.add_argument("--rows", type=whole(), help="validation rows (default: the run's evaluation.rows)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="compute dtype (default: that of training)")
    parser.add_argument("--tokenizer", metavar="FILE", help="new path of the run's tokenizer, if it was moved")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=DIR", help="new path of a moved source")
    tasks = parser.add_argument_group("benchmarks")
    tasks.add_argument("--tasks", metavar="NAMES", help="tasks or groups, with commas; CHECKPOINT may be of any format")
    tasks.add_argument("--shots", type=whole(0, 1000), help="examples before each question (default: as in the paper)")
    tasks.add_argument("--limit", type=whole(), help="evaluate only the first examples of each task")
    tasks.add_argument("--data", metavar="DIR", default="benchmarks", help="data of tasks (default: %(default)s)")
    tasks.add_argument("--results", metavar="FILE", help="file of outcomes, from which a killed evaluation goes on")
    tasks.add_argument("--batch", type=whole(), default=8, help="rows of a forward pass (default: %(default)s)")
    tasks.add_argument("--samples", type=whole(1, 10_000), default=1, help="continuations of a question (default: 1)")
    tasks.add_argument("--pass-at", type=whole(1, 10_000), default=1, metavar="K", help="code: pass@K (default: 1)")
    tasks.add_argument("--temperature", type=real(), help="of continuations; 0: greedy (default: that of the task)")
    tasks.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of sampled continuations (default: 0)")
    tasks.add_argument("--run-code", action="store_true", help="let generated programs run, in limited processes")
    tasks.add_argument("--figure", metavar="FILE", help="draw the tasks of a run over its tokens to this SVG, no more")
    tasks.add_argument("--beside", action="append", default=[], metavar="RUN", help="another run in the figure")
    tasks.add_argument("--references", metavar="FILE", help='lines in it, JSON: {"TASK": {"NAME": PERCENT}}')
    add_json(parser, "loss, perplexity, rows, step and dtype, or the results of tasks,")
    return parser


def evaluate(args: argparse.Namespace) -> Answer:
    """Return the results of tasks, or loss and perplexity; or fetch data."""
    from llama_ds.errors import UserError

    if args.checkpoint == "fetch":
        if not args.names:
            raise UserError("command line: fetch needs the names of tasks, with commas, such as fetch common_sense")
        return fetch_data(args)
    if args.names:
        raise UserError(f"command line: {args.names!r} is one word too many; name tasks with --tasks {args.names}")
    if args.figure:
        return draw(args)
    return evaluate_tasks(args) if args.tasks else evaluate_loss(args)


def draw(args: argparse.Namespace) -> Answer:
    """Write the figure of tasks over tokens."""
    from llama_ds.evaluation.figure import figure, read_curves, read_references

    curves = read_curves([args.checkpoint, *args.beside])
    Path(args.figure).write_text(figure(curves, read_references(args.references) if args.references else {}))
    return Answer({"figure": args.figure, "tasks": list(curves)}, args.figure)


def fetch_data(args: argparse.Namespace) -> Answer:
    """Download what the folder of data lacks."""
    from llama_ds.evaluation.fetch import fetch
    from llama_ds.evaluation.suite import find_tasks

    written = [path for task in find_tasks(args.names.split(",")) for path in fetch(task, args.data)]
    return Answer({"written": written}, "\n".join(written) or f"{args.data}: has all of it already")


def evaluate_tasks(args: argparse.Namespace) -> Answer:
    """Return the results of tasks."""
    from tqdm import tqdm

    from llama_ds.errors import UserError
    from llama_ds.evaluation.evaluate import TaskResult, prepare, table
    from llama_ds.evaluation.generated_outcomes import check_leave
    from llama_ds.evaluation.generation_tasks import Samples
    from llama_ds.evaluation.one_process import evaluate_folder
    from llama_ds.evaluation.suite import find_tasks

    if args.hf or args.rows or args.source:
        raise UserError("command line: --hf, --rows and --source belong to the validation loss; give --tasks alone")
    samples = Samples(args.samples, args.pass_at, args.temperature, args.seed, args.run_code)
    tasks = find_tasks(args.tasks.split(","))
    check_leave(tasks, samples)
    works = prepare(tasks, args.data, args.shots, args.limit, samples)
    with tqdm(total=len(works), unit="task", desc="evaluate", disable=None) as bar:
        found = evaluate_folder(
            args.checkpoint, works, args.results, args.dtype, args.batch, args.tokenizer, lambda result: bar.update()
        )
    remarks = []
    if done := found["examples_done_before"]:
        remarks.append(f"{args.results}: {done} examples were done already")
    if cut := found["truncated_requests"]:
        remarks.append(f"{cut} requests are longer than the model's rows: their contexts lost tokens on the left")
    text = f"{found['model']}\n{table([TaskResult(**one) for one in found['tasks']])}"
    return Answer(found, text, remarks=remarks)


def evaluate_loss(args: argparse.Namespace) -> Answer:
    """Return loss and perplexity."""
    import torch
    from tqdm import tqdm

    from llama_ds.benchmarks.evaluation import mean_loss, moved, transformers_loss, validation_rows
    from llama_ds.checkpoint.load_model import load_model, locate, run_of
    from llama_ds.checkpoint.manifest import describe
    from llama_ds.checkpoint.weights import DTYPES, open_checkpoint

    folder = locate(args.checkpoint)
    description = describe(folder)
    trained = run_of(folder, description)
    trained = replace(trained, data=moved(trained.data, args.tokenizer, args.source))
    rows = validation_rows(trained, args.rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or description.dtype
    if args.hf:
        loss_of = transformers_loss(args.hf, trained, open_checkpoint(folder).marks, device, DTYPES[dtype])
    else:
        loss_of = load_model(open_checkpoint(folder), device, DTYPES[dtype])
    with tqdm(total=len(rows), unit="row", desc="evaluate", disable=None) as bar:
        loss = mean_loss(loss_of, rows, trained.parallel.micro_batch, device, bar.update)
    found = {"loss": loss, "perplexity": math.exp(loss), "rows": len(rows), "step": description.step, "dtype": dtype}
    text = f"step {description.step} | {len(rows)} rows | loss {loss:.4f} | perplexity {math.exp(loss):.2f}"
    return Answer(found, f"{args.hf or folder}: {text}")


if __name__ == "__main__":
    sys.exit(main())
