#!/usr/bin/env python3
"""The full workflow at small scale on this machine: text, tokenizer, shards, training, export, generated text.

Every stage is a command that a user would type; training runs four ranks under DeepSpeed's own launcher. Ctrl-C stops
everything, and the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds import command_line, shipped
from llama_ds.child_processes import PIPE, run_child
from llama_ds.config.run_file import load_run
from llama_ds.config.run_files import METRICS
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.job.run_lock import check_unused
from llama_ds.layout.layout import resolve_layout
from llama_ds.machine import free_port

EXAMPLES = """examples:
  tools/quickstart.py                      # as `make quickstart`; reuses finished stages
  tools/quickstart.py --fresh              # start from scratch
  tools/quickstart.py training.steps=60
"""
RUN_FILE = "ds_configs/quickstart.yaml"
RANKS = 4
PROMPTS = ('def main():\n    """', "The function returns ")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return command_line.run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.new_parser(begin, __doc__, EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the run file")
    words = "text to gather on this machine (default: %(default)s)"
    parser.add_argument("--corpus-mb", type=command_line.size, default=32.0, metavar="MB", help=words)
    parser.add_argument("--data-only", action="store_true", help="end after the shards are built")
    parser.add_argument("--fresh", action="store_true", help="remove the run's folder first")
    return parser


def begin(args: argparse.Namespace) -> None:
    """Run the stages in the checkout, or without one in this folder; all paths are relative to it."""
    if not shipped.INSTALLED:
        os.chdir(shipped.PACKAGE.parent)
    if args.data_only and args.fresh:
        raise UserError("--data-only builds what is missing and removes nothing; leave out --fresh")
    if args.data_only:
        _prepare_data(load_run(RUN_FILE, args.overrides), args.corpus_mb)
    else:
        quickstart(args.fresh, args.overrides, args.corpus_mb)


def quickstart(fresh: bool, overrides: list[str], corpus_mb: float) -> None:
    """Run all unfinished stages, then print where the results are."""
    started = time.monotonic()
    run = load_run(RUN_FILE, overrides)
    if fresh:
        check_unused(run.run_dir)
        shutil.rmtree(run.run_dir, ignore_errors=True)
    _prepare_data(run, corpus_mb)
    unigram = _unigram(run)
    _train(run, overrides)
    trained, exported = _export(run)
    stage("Text from the export")
    tool("generate.py", f"{run.run_dir}/hf", *[word for prompt in PROMPTS for word in ("--prompt", prompt)])
    stage("Benchmarks that need no download: the miniature suite")
    tool("evaluate.py", run.run_dir, "--tasks", "miniature")
    _report(run)
    _summary(run, unigram, trained, exported, time.monotonic() - started)


def _prepare_data(run: RunConfig, corpus_mb: float) -> None:
    data = os.path.dirname(run.data.tokenizer)
    corpus, shards = f"{data}/corpus", os.path.dirname(run.data.sources[0].path)
    if not os.path.exists(f"{corpus}/prose.jsonl"):
        stage("Corpus: Python sources and prose found on this machine")
        tool("shards.py", "gather", "--out", corpus, "--limit-mb", corpus_mb)
    if not os.path.exists(run.data.tokenizer):
        stage("Tokenizer: sentencepiece BPE, digits split, byte fallback")
        prefix = run.data.tokenizer.removesuffix(".model")
        size = ("--vocab-size", run.model.vocab_size)
        tool("tokenizer.py", "train", "--input", f"{corpus}/*.jsonl", *size, "--out", prefix)
    missing = [s for s in run.data.sources if not os.path.exists(f"{s.path}/manifest.json")]
    if missing:
        stage("Shards: rows of ids in webdataset tars")
        sources = [word for s in missing for word in ("--source", f"{s.name}={corpus}/{s.name}.jsonl")]
        seq_len = ("--seq-len", run.data.seq_len, "--validation-fraction", "0.03")
        tool("shards.py", "build", *sources, "--tokenizer", run.data.tokenizer, "--out", shards, *seq_len)


def _unigram(run: RunConfig) -> float:
    """Return the loss of a unigram model of the training tokens on the validation rows, in nats per token."""
    from llama_ds.data.sources import open_sources
    from llama_ds.data.unigram import mixture_counts, unigram_loss

    data = open_sources(run.data, run.model.vocab_size)
    counts = mixture_counts(data.train, [s.weight for s in run.data.sources])
    return unigram_loss(counts, data.validation_rows(run.evaluation.rows))


def _train(run: RunConfig, overrides: list[str]) -> None:
    """Train in two launches; the second resumes from the first one's checkpoint."""
    from llama_ds.checkpoint.store import newest, tag_of

    half, saved = run.training.steps // 2, newest(f"{run.run_dir}/checkpoints")
    if saved == tag_of(run.training.steps):
        stage(f"Training: finished before, at step {run.training.steps}")
        return
    if not saved:
        stage(f"Training: {RANKS} ranks, {resolve_layout(run, RANKS).words()}, steps 1 to {half}")
        launch(*overrides, f"checkpoint.stop_at={half}")
    stage(f"Training: resumed from its checkpoint, to step {run.training.steps}")
    launch(*overrides, "checkpoint.resume=must")


def _export(run: RunConfig) -> tuple[float, float]:
    """Export; return the validation loss from training and the loss of the export in transformers."""
    stage("Export to Hugging Face format, evaluated by transformers")
    folder = f"{run.run_dir}/hf"
    tool("convert.py", run.run_dir, folder, "--to", "hf", "--overwrite")
    evaluated = json.loads(tool("evaluate.py", run.run_dir, "--hf", folder, "--json", capture=True))
    with open(f"{run.run_dir}/{METRICS}") as file:
        losses = [line["val_loss"] for line in map(json.loads, file) if "val_loss" in line]
    return losses[-1], evaluated["loss"]


def _report(run: RunConfig) -> None:
    """Write the report's page and print the training loss as a curve."""
    from llama_ds.experiments.records import read_run
    from llama_ds.experiments.text_curve import text_curve

    stage("Report: the training loss, and a page with all that was measured")
    tool("report.py", run.run_dir)
    print(text_curve(read_run(run.run_dir).curves["loss"], encoding=sys.stdout.encoding))


def _summary(run: RunConfig, unigram: float, trained: float, exported: float, seconds: float) -> None:
    verdict = "below" if trained < unigram else "NOT BELOW"
    stage(f"Done in {seconds / 60:.1f} minutes")
    print(f"validation loss    {trained:.4f} nats per token, {verdict} the unigram model's {unigram:.4f}")
    print(f"the same rows      {exported:.4f} by transformers with the exported weights")
    print(f"data               {os.path.dirname(run.data.tokenizer)}")
    print(f"report             {run.run_dir}/report.html")
    print(f"metrics            {run.run_dir}/{METRICS}")
    print(f"checkpoints        {run.run_dir}/checkpoints")
    print(f"Hugging Face       {run.run_dir}/hf")
    if trained >= unigram:
        raise UserError(f"{RUN_FILE}: the validation loss is not below the unigram model's; raise training.steps")


def stage(title: str) -> None:
    """Print a stage's headline."""
    print(f"\n=== {title}", flush=True)


def tool(script: str, *arguments: object, capture: bool = False) -> str:
    """Print the command line of a tool and run it; return its stdout if captured."""
    program = shipped.command(script.removesuffix(".py")) if shipped.INSTALLED else [sys.executable, f"tools/{script}"]
    return run_command([*program, *map(str, arguments)], capture)


def launch(*arguments: str) -> None:
    """Run the training script under DeepSpeed's launcher."""
    deepspeed = os.path.join(os.path.dirname(sys.executable), "deepspeed")
    ranks = ["--num_accelerators", str(RANKS), "--master_port", str(free_port()), "--log_level", "error"]
    run_command([deepspeed, *ranks, os.path.relpath(shipped.TRAIN), RUN_FILE, *arguments], ranks=RANKS)


def run_command(command: list[str], capture: bool = False, ranks: int = 1) -> str:
    """Run a command; a failure stops the quickstart."""
    shown = shlex.join([os.path.basename(command[0]), *command[1:]])
    print(f"$ {shown}", flush=True)
    done = run_child(command, env=environment(ranks), stdout=PIPE if capture else None)
    if done.returncode:
        raise UserError(f"`{shown}` failed with exit code {done.returncode}; see its own message above")
    return done.stdout or ""


def environment(ranks: int) -> dict[str, str]:
    """Return a stage's environment: threads per rank, and the CPU unless every rank has a GPU."""
    values = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)), **os.environ}
    values["PATH"] = os.path.dirname(sys.executable) + os.pathsep + values.get("PATH", "")
    import torch

    if torch.cuda.device_count() < RANKS:
        values["DS_ACCELERATOR"] = "cpu"
    return values


if __name__ == "__main__":
    sys.exit(main())
