#!/usr/bin/env python3
"""Compute loss and perplexity of a checkpoint on the validation rows that its training run evaluates."""

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
from llama_ds.command_line import Answer, add_json, new_parser, run, whole

EXAMPLES = """examples:
  tools/evaluate.py runs/quickstart
  tools/evaluate.py runs/quickstart/checkpoints/step_00000100 --rows 256 --json
  tools/evaluate.py runs/quickstart --hf runs/quickstart/hf
  tools/evaluate.py runs/old --tokenizer moved/tokenizer.model --source code=moved/shards/code
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(evaluate, __doc__, EXAMPLES)
    parser.add_argument(
        "checkpoint", help="a checkpoint, or a run folder or its checkpoints folder (newest checkpoint)"
    )
    parser.add_argument("--hf", metavar="DIR", help="evaluate this export with transformers instead, on the same rows")
    parser.add_argument("--rows", type=whole(), help="validation rows (default: the run's evaluation.rows)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="compute dtype (default: that of training)")
    parser.add_argument("--tokenizer", metavar="FILE", help="new path of the run's tokenizer, if it was moved")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=DIR", help="new path of a moved source")
    add_json(parser, "loss, perplexity, rows, step and dtype")
    return parser


def evaluate(args: argparse.Namespace) -> Answer:
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
