#!/usr/bin/env python3
"""Compute a checkpoint's loss on the validation rows of its training run, or with --tasks its results in benchmarks.

"tools/evaluate.py fetch TASKS --data DIR" downloads the data sets of benchmarks; evaluation itself uses no network.
"tools/evaluate.py harness TASKS --data DIR --out DIR" writes the tasks as files for lm-eval's --include_path.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds.checkpoint.choices import DTYPE_NAMES
from llama_ds.command_line import Answer, add_json, new_parser, real, run, whole

if TYPE_CHECKING:
    from llama_ds.evaluation.evaluate import Work
    from llama_ds.evaluation.validation import ValidationLoss

EXAMPLES = """examples:
  tools/evaluate.py runs/quickstart
  tools/evaluate.py runs/quickstart/checkpoints/step_00000100 --rows 256 --json
  tools/evaluate.py runs/quickstart --hf runs/quickstart/hf
  tools/evaluate.py runs/old --tokenizer moved/tokenizer.model --source code=moved/shards/code
  tools/evaluate.py runs/quickstart --tasks miniature
  tools/evaluate.py fetch common_sense,mmlu --data benchmarks
  tools/evaluate.py harness common_sense,mmlu --data benchmarks --out harness_tasks
  tools/evaluate.py exported/hf --tasks common_sense --data benchmarks --limit 500 --results results.jsonl
  tools/evaluate.py runs/7b --tasks humaneval --data benchmarks --samples 100 --pass-at 10 --run-code
  deepspeed --num_gpus 8 tools/evaluate.py runs/65b --tasks paper --data benchmarks --pp 2 --tp 4
  tools/evaluate.py runs/7b --tasks common_sense --data benchmarks --follow
  tools/evaluate.py runs/7b --beside runs/13b --figure tasks.svg --references paper
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(evaluate, __doc__, EXAMPLES)
    parser.add_argument(
        "checkpoint",
        help="a checkpoint, or a run folder or its checkpoints folder (newest checkpoint); or: fetch, harness",
    )
    parser.add_argument(
        "names", metavar="TASKS", nargs="?", help="after fetch: whose data to download; after harness: what to write"
    )
    parser.add_argument("--hf", metavar="DIR", help="evaluate this export with transformers instead, on the same rows")
    parser.add_argument("--rows", type=whole(), help="validation rows (default: the run's evaluation.rows)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="compute dtype (default: that of training)")
    parser.add_argument("--tokenizer", metavar="FILE", help="new path of the run's tokenizer, if it was moved")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=DIR", help="new path of a moved source")
    tasks = parser.add_argument_group("benchmarks")
    tasks.add_argument("--tasks", metavar="NAMES", help="tasks or groups, with commas; CHECKPOINT may be of any format")
    tasks.add_argument("--shots", type=whole(0, 1000), help="examples before each question (default: as in the paper)")
    tasks.add_argument("--limit", type=whole(), help="evaluate only the first examples of each task, of all subjects")
    tasks.add_argument("--data", metavar="DIR", default="benchmarks", help="data of tasks (default: %(default)s)")
    tasks.add_argument("--out", metavar="DIR", help="after harness: folder of the files for lm-eval's --include_path")
    tasks.add_argument("--results", metavar="FILE", help="file of outcomes, from which a killed evaluation goes on")
    tasks.add_argument("--batch", type=whole(), default=8, help="rows of a forward pass (default: %(default)s)")
    tasks.add_argument("--samples", type=whole(1, 10_000), default=1, help="continuations of a question (default: 1)")
    tasks.add_argument("--pass-at", type=whole(1, 10_000), default=1, metavar="K", help="code: pass@K (default: 1)")
    tasks.add_argument("--temperature", type=real(), help="of continuations; 0: greedy (default: that of the task)")
    tasks.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of sampled continuations (default: 0)")
    tasks.add_argument("--run-code", action="store_true", help="let generated programs run, in limited processes")
    tasks.add_argument("--follow", action="store_true", help="every new checkpoint of a run, until the run has ended")
    tasks.add_argument(
        "--pp", type=whole(1, 10_000), help="pipeline-parallel size, under a launcher (default: the run's)"
    )
    tasks.add_argument(
        "--tp", type=whole(1, 10_000), help="tensor-parallel size, under a launcher (default: the run's)"
    )
    tasks.add_argument(
        "--cp", type=whole(1, 10_000), help="context-parallel size, for rows too long for one rank (default: 1)"
    )
    tasks.add_argument("--figure", metavar="FILE", help="draw the tasks of a run over its tokens to this SVG, no more")
    tasks.add_argument("--beside", action="append", default=[], metavar="RUN", help="another run in the figure")
    tasks.add_argument("--references", metavar="FILE", help='lines in it, JSON: {"TASK": {"NAME": PERCENT}}; or: paper')
    parser.add_argument("--local_rank", type=whole(0), help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    add_json(parser, "losses, perplexities and bits per byte, or the results of tasks,")
    return parser


def evaluate(args: argparse.Namespace) -> Answer | int:
    """Return the results of tasks, or losses; or fetch data."""
    from llama_ds.errors import UserError

    word = args.checkpoint
    if args.out and word != "harness":
        raise UserError("command line: --out is the folder that the word harness writes to")
    if word in ("fetch", "harness"):
        if not args.names:
            raise UserError(f"command line: {word} needs the names of tasks, with commas, such as {word} common_sense")
        return fetch_data(args) if word == "fetch" else write_harness_tasks(args)
    if args.names:
        raise UserError(f"command line: {args.names!r} is one word too many; name tasks with --tasks {args.names}")
    if args.figure:
        return draw(args)
    if args.follow and not args.tasks:
        raise UserError("command line: --follow evaluates tasks; name them with --tasks")
    return evaluate_tasks(args) if args.tasks else evaluate_loss(args)


def draw(args: argparse.Namespace) -> Answer:
    """Write the figure of tasks over tokens."""
    from llama_ds.config.text import save_text
    from llama_ds.evaluation.figure import figure, read_curves, read_references

    curves = read_curves([args.checkpoint, *args.beside])
    save_text(args.figure, figure(curves, read_references(args.references) if args.references else {}))
    return Answer({"figure": args.figure, "tasks": list(curves)}, args.figure)


def fetch_data(args: argparse.Namespace) -> Answer:
    """Download what the folder of data lacks."""
    from llama_ds.evaluation.fetch import fetch
    from llama_ds.evaluation.suite import find_tasks

    written = [path for task in find_tasks(args.names.split(",")) for path in fetch(task, args.data)]
    return Answer({"written": written}, "\n".join(written) or f"{args.data}: has all of it already")


def write_harness_tasks(args: argparse.Namespace) -> Answer:
    """Write tasks as files for lm-eval."""
    from llama_ds.errors import UserError
    from llama_ds.evaluation.evaluate import prepare
    from llama_ds.evaluation.harness_tasks import check_writable, write_tasks
    from llama_ds.evaluation.suite import find_tasks

    if not args.out:
        raise UserError("command line: harness needs a folder to write to: --out DIR")
    names = args.names.split(",")
    tasks = find_tasks(names)
    check_writable(tasks)
    written = write_tasks(prepare(tasks, args.data, args.shots, args.limit), names, args.out)
    return Answer(
        {"folder": args.out, "names": written},
        f"lm_eval --include_path {args.out} --tasks {written[0]} (it has {', '.join(written)})",
    )


def evaluate_tasks(args: argparse.Namespace) -> Answer | int:
    """Return the results of tasks, on all ranks of a launcher together; only the first one answers."""
    from llama_ds.errors import UserError
    from llama_ds.parallel import world

    if args.hf or args.rows or args.source:
        raise UserError("command line: --hf, --rows and --source belong to the validation loss; give --tasks alone")
    if args.follow and args.results:
        raise UserError("command line: --follow keeps the outcomes of each checkpoint in RUN/tasks; omit --results")
    if world.launched_ranks() > 1:
        return evaluate_on_ranks(args)
    if args.pp or args.tp or args.cp:
        raise UserError(
            "command line: --pp, --tp and --cp divide a model over the ranks of a launcher; start with torchrun"
        )
    return answered(args, Alone(args), read_works(args))


def evaluate_on_ranks(args: argparse.Namespace) -> Answer | int:
    """Return the answer on the first rank, 0 on the others."""
    from llama_ds import log
    from llama_ds.parallel import world
    from llama_ds.training.evaluation_job import EvaluationJob, EvaluationSettings

    with world.failing_together():
        rank_info = world.find_rank_info()
        log.setup(quiet=rank_info.rank != 0)
        world.join(rank_info)
        settings = EvaluationSettings(args.dtype, args.batch, args.tokenizer, args.pp, args.tp, args.cp or 1)
        works = world.together(lambda: read_works(args))
        answer = answered(args, EvaluationJob(settings, rank_info), works, rank_info.rank == 0)
        return answer if rank_info.rank == 0 else 0


def read_works(args: argparse.Namespace) -> list[Work]:
    """Return the tasks with their examples."""
    from llama_ds.evaluation.evaluate import prepare
    from llama_ds.evaluation.generated_outcomes import check_leave
    from llama_ds.evaluation.generation_tasks import Samples
    from llama_ds.evaluation.suite import find_tasks

    samples = Samples(args.samples, args.pass_at, args.temperature, args.seed, args.run_code)
    tasks = find_tasks(args.tasks.split(","))
    check_leave(tasks, samples)
    return prepare(tasks, args.data, args.shots, args.limit, samples)


class Alone:
    """An evaluation in this process."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    def evaluate(
        self, path: str, works: list[Work], journal: str | None, tick: Callable[[int], object] = lambda requests: None
    ) -> dict[str, Any]:
        """Return the results of tasks on a model."""
        from llama_ds.evaluation.one_process import evaluate_folder

        args = self._args
        return evaluate_folder(path, works, journal, args.dtype, args.batch, args.tokenizer, tick)

    def once(self, work: Callable[[], Any]) -> Any:
        """Do the work."""
        return work()


def answered(args: argparse.Namespace, job: Any, works: list[Work], first: bool = True) -> Answer:
    """Return the answer of a job: the results of one model, or of every checkpoint of a run that it follows."""
    from tqdm import tqdm

    from llama_ds.evaluation.evaluate import TaskResult, table
    from llama_ds.evaluation.requests import TRUNCATED

    if args.follow:
        return followed(args, job, works, first)
    requests = sum(work.requests for work in works)
    with tqdm(total=requests, unit="request", desc="evaluate", disable=None if first else True) as bar:
        found = job.evaluate(args.checkpoint, works, args.results, bar.update)
    remarks = []
    if done := found["examples_done_before"]:
        remarks.append(f"{args.results}: {done} examples were done already")
    if cut := found["truncated_requests"]:
        remarks.append(f"{cut} requests {TRUNCATED}")
    if cache := found["cache_bytes"]:
        remarks.append(f"the cache of generated texts took {cache / 2**20:.1f} MiB")
    text = f"{found['model']}\n{table([TaskResult(**one) for one in found['tasks']])}"
    return Answer(found, text, remarks=remarks)


def followed(args: argparse.Namespace, job: Any, works: list[Work], first: bool) -> Answer:
    """Evaluate every checkpoint of a run until it has ended; each line is printed at once."""
    from llama_ds.evaluation.evaluate import TaskResult, digest_of, in_words
    from llama_ds.evaluation.follow import Follower, follow

    follower = job.once(lambda: Follower(args.checkpoint, f"{digest_of(works)} {args.dtype or 'as trained'}"))
    results: list[TaskResult] = []

    def evaluate(path: str, journal: str) -> dict[str, Any]:
        found: dict[str, Any] = job.evaluate(path, works, journal)
        results[:] = [TaskResult(**one) for one in found["tasks"]]
        return found

    def tell(line: dict[str, Any]) -> None:
        if first and not args.json:
            print(f"step {line['step']} | {in_words(results)}", flush=True)

    lines = follow(follower, evaluate, job.once, tell)
    return Answer(lines, f"{args.checkpoint}: the run has ended; {len(lines)} checkpoints were evaluated")


def evaluate_loss(args: argparse.Namespace) -> Answer:
    """Return loss, perplexity and bits per byte, of all rows and of each source."""
    import torch
    from tqdm import tqdm

    from llama_ds.benchmarks.evaluation import moved, transformers_loss, validation_loss, validation_rows
    from llama_ds.checkpoint.load_model import load_model, locate, run_of
    from llama_ds.checkpoint.manifest import describe
    from llama_ds.checkpoint.weights import DTYPES, open_checkpoint
    from llama_ds.evaluation.validation import total

    folder = locate(args.checkpoint)
    description = describe(folder)
    trained = run_of(folder, description)
    trained = replace(trained, data=moved(trained.data, args.tokenizer, args.source))
    parts = validation_rows(trained, args.rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or description.dtype
    if args.hf:
        loss_of = transformers_loss(args.hf, trained, open_checkpoint(folder).marks, device, DTYPES[dtype])
    else:
        loss_of = load_model(open_checkpoint(folder), device, DTYPES[dtype])
    with tqdm(total=sum(len(part.rows) for part in parts), unit="row", desc="evaluate", disable=None) as bar:
        losses = {
            part.source: validation_loss(loss_of, part, trained.parallel.micro_batch, device, bar.update)
            for part in parts
        }
    every = total(losses.values())
    lines = [f"{args.hf or folder}: step {description.step} | {_line(every)}"]
    lines += [f"  {name}: {_line(one)}" for name, one in losses.items() if len(losses) > 1]
    by_source = {name: loss.values for name, loss in losses.items()}
    found = {**every.values, "step": description.step, "dtype": dtype, "sources": by_source}
    return Answer(found, "\n".join(lines))


def _line(loss: ValidationLoss) -> str:
    return (
        f"{loss.rows} rows | {loss.labels:,} tokens | loss {loss.loss:.4f} | perplexity {loss.perplexity:.2f} | "
        f"{loss.bits_per_byte:.4f} bits per byte"
    )


if __name__ == "__main__":
    sys.exit(main())
