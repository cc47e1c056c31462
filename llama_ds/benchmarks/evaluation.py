"""Validation loss of a checkpoint on its run's validation rows, by our model or by transformers on an export.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ds.config.document_marks import DocumentMarks
from llama_ds.config.schema import DataConfig, RunConfig
from llama_ds.data.filler import count_labels
from llama_ds.data.sources import open_sources
from llama_ds.errors import UserError
from llama_ds.evaluation.validation import ValidationLoss, ValidationRows, rows_by_source
from llama_ds.model.attention import Documents
from llama_ds.model.embedding import document_starts
from llama_ds.model.loss import IGNORED
from llama_ds.training.device_batches import ids_and_labels

Loss = Callable[[Tensor, Tensor], Tensor]  # ids and labels (B, T) -> mean loss in nats per token


def moved(data: DataConfig, tokenizer: str | None, sources: list[str]) -> DataConfig:
    """Return the run's data configuration with new paths: `sources` are NAME=DIR."""
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


def validation_rows(run: RunConfig, count: int | None) -> list[ValidationRows]:
    """Return the first `count` validation rows, or as many as the run evaluates, by source.

    Raises:
        UserError: there are none, or they hold no text.
    """
    count = run.evaluation.rows if count is None else count
    if count < 1:
        raise UserError(
            f"command line: --rows {count} is not positive; the run has evaluation.rows {run.evaluation.rows}"
        )
    sources = open_sources(run.data, run.model.vocab_size)
    found = rows_by_source(sources, count)
    for part in found:
        if not part.text_bytes:
            raise UserError(f"source {part.source}: its {len(part.rows)} validation rows hold no text; raise --rows")
    return found


def transformers_loss(
    folder: str, run: RunConfig, marks: DocumentMarks, device: torch.device, dtype: torch.dtype
) -> Loss:
    """Return the loss function of an exported model in transformers; `marks` are the ids between documents."""
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise UserError(f"{folder}: has no config.json, so it is not an export; make one with tools/convert.py --to hf")
    from llama_ds.benchmarks.generation import load_exported

    model = load_exported(folder, dtype).to(device).eval()

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        mask = Documents(document_starts(ids, marks)).mask if run.data.document_mask else None
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)

    return loss


@torch.no_grad()
def validation_loss(
    loss_of: Loss, part: ValidationRows, micro_batch: int, device: torch.device, tick: Callable[[int], object]
) -> ValidationLoss:
    """Return the loss over the labels of rows; `tick` gets the number of rows just done."""
    total, rows = 0.0, part.rows
    for start in range(0, len(rows), micro_batch):
        batch = rows[start : start + micro_batch]
        total += count_labels(batch) * loss_of(*ids_and_labels(batch, device)).item()
        tick(len(batch))
    return ValidationLoss(len(rows), count_labels(rows), part.text_bytes, total)
