#!/usr/bin/env python3
"""Loss and perplexity of a checkpoint on its run's validation rows: those that training evaluated."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llama_ds.checkpoint.load_model import load_model, locate, run_of
from llama_ds.checkpoint.manifest import describe
from llama_ds.checkpoint.weights import DTYPES, open_checkpoint
from llama_ds.config.schema import DataConfig, RunConfig
from llama_ds.data.sources import open_sources
from llama_ds.errors import UserError
from llama_ds.model.attention import Documents
from llama_ds.model.embedding import document_starts

EXAMPLES = """examples:
  tools/evaluate.py runs/quickstart
  tools/evaluate.py runs/quickstart/checkpoints/step_00000100 --rows 256 --json
  tools/evaluate.py runs/quickstart --hf runs/quickstart/hf
  tools/evaluate.py runs/old --tokenizer moved/tokenizer.model --source code=moved/shards/code
"""
Loss = Callable[[Tensor, Tensor], Tensor]  # ids and labels (B, T) -> mean loss in nats per token


def main(argv: list[str] | None = None) -> int:
    """Evaluate and return the exit code."""
    args = parse(argv)
    try:
        return evaluate(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=formatter)
    parser.add_argument("checkpoint", help="a run folder or its checkpoints folder (the newest), or one checkpoint")
    parser.add_argument("--hf", metavar="DIR", help="evaluate this export with transformers instead, on the same rows")
    parser.add_argument("--rows", type=int, help="validation rows (default: the run's evaluation.rows)")
    parser.add_argument("--dtype", choices=DTYPES, help="to compute in (default: what training computed in)")
    parser.add_argument("--tokenizer", metavar="MODEL", help="where the run's tokenizer is now, if it was moved")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=DIR", help="where a source is now")
    parser.add_argument("--json", action="store_true", help="print loss, perplexity, rows, step and dtype as JSON")
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace) -> int:
    """Print loss and perplexity."""
    folder = locate(args.checkpoint)
    description = describe(folder)
    run = run_of(folder, description)
    run = replace(run, data=moved(run.data, args.tokenizer, args.source))
    rows = validation_rows(run, args.rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or description.dtype
    if args.hf:
        loss_of = transformers_loss(args.hf, run, device, DTYPES[dtype])
    else:
        loss_of = load_model(open_checkpoint(folder), device, DTYPES[dtype])
    loss = mean_loss(loss_of, rows, run.parallel.micro_batch, device)
    found = {"loss": loss, "perplexity": math.exp(loss), "rows": len(rows), "step": description.step, "dtype": dtype}
    if args.json:
        print(json.dumps(found))
    else:
        what = args.hf or folder
        print(f"{what}: step {description.step} | {len(rows)} rows | loss {loss:.4f} | perplexity {math.exp(loss):.2f}")
    return 0


def moved(data: DataConfig, tokenizer: str | None, sources: list[str]) -> DataConfig:
    """Return the run's data with the paths given on the command line."""
    paths = dict(source.partition("=")[::2] for source in sources)
    known = [source.name for source in data.sources]
    for name, path in paths.items():
        if name not in known or not path:
            raise UserError(f"command line: --source {name}={path} is not NAME=DIR of a source: {', '.join(known)}")
    return replace(
        data,
        tokenizer=tokenizer or data.tokenizer,
        sources=tuple(replace(source, path=paths.get(source.name, source.path)) for source in data.sources),
    )


def validation_rows(run: RunConfig, count: int | None) -> np.ndarray:
    """Return the rows to evaluate, int64 (rows, seq_len + 1)."""
    count = run.evaluation.rows if count is None else count
    if count < 1:
        raise UserError(
            f"command line: --rows {count} is not positive; the run has evaluation.rows {run.evaluation.rows}"
        )
    return open_sources(run.data, run.model.vocab_size).validation_rows(count)


def transformers_loss(folder: str, run: RunConfig, device: torch.device, dtype: torch.dtype) -> Loss:
    """Return the loss of an exported model by transformers."""
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise UserError(f"{folder}: no config.json, so no export; make one with tools/convert.py --to hf")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        mask = Documents(document_starts(ids)).mask if run.data.document_mask else None
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    return loss


@torch.no_grad()
def mean_loss(loss_of: Loss, rows: np.ndarray, micro_batch: int, device: torch.device) -> float:
    """Return the mean loss over rows, in nats per token."""
    total = 0.0
    with tqdm(total=len(rows), unit="row", desc="evaluate", disable=None) as bar:
        for start in range(0, len(rows), micro_batch):
            batch = torch.from_numpy(rows[start : start + micro_batch]).to(device)
            total += len(batch) * loss_of(batch[:, :-1], batch[:, 1:]).item()
            bar.update(len(batch))
    return total / len(rows)


if __name__ == "__main__":
    sys.exit(main())
