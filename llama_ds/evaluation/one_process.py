"""Tasks on a model folder of any format, in one process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llama_ds.checkpoint.load_model import load_model, open_model
from llama_ds.checkpoint.weights import DTYPES, ModelFiles
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError
from llama_ds.evaluation.evaluate import FORMAT, Journal, Work, evaluate
from llama_ds.evaluation.requests import prefix
from llama_ds.evaluation.scoring import ModelBackend, Scorer


def evaluate_folder(
    path: str,
    works: Sequence[Work],
    journal: str | None,
    dtype: str | None,
    rows: int,
    tokenizer: str | None = None,
    tick: Callable[[int], object] = lambda requests: None,
) -> dict[str, Any]:
    """Evaluate the tasks on the model in `path` and return their results and what was evaluated.

    Args:
        path: what `open_model` accepts.
        journal: the file of outcomes, from which a killed evaluation goes on; None: there is none.
        dtype: dtype of weights and computation; None: that of training.
        rows: rows of a forward pass.
        tokenizer: the tokenizer's path; None: the one in the folder.
        tick: is called with the number of requests just done, also with those of an earlier evaluation.

    Raises:
        UserError: the folder is damaged or has no tokenizer, or the tokenizer has no bos.
    """
    files, ours = opened(path, tokenizer)
    dtype = dtype or files.dtype
    kept = Journal(journal, subject_of(files, ours, dtype))
    return results_of(_scorer(files, ours, dtype, rows), files, dtype, works, kept, tick)


def results_of(
    scorer: Scorer, files: ModelFiles, dtype: str, works: Sequence[Work], kept: Journal, tick: Callable[[int], object]
) -> dict[str, Any]:
    """Return the results of the tasks, and what was evaluated. Collective under an engine."""
    results = [evaluate(scorer, work, kept, tick=tick) for work in works]
    return {
        "model": files.path,
        "dtype": dtype,
        "cache_bytes": scorer.cache_bytes,
        "truncated_requests": sum(result.truncated_requests for result in results),
        "examples_done_before": kept.done_before,
        "tasks": [asdict(result) for result in results],
    }


def open_scorer(path: str, dtype: str | None = None, rows: int = 8, tokenizer: str | None = None) -> Scorer:
    """Return a scorer of the model in `path`; the arguments and errors are those of `evaluate_folder`."""
    files, ours = opened(path, tokenizer)
    return _scorer(files, ours, dtype or files.dtype, rows)


def subject_of(files: ModelFiles, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Return of what a journal is: outcomes of another model, dtype or tokenizer are not taken for its own."""
    return {
        "model": os.path.abspath(files.path),
        "saved": saved_at(files.path),
        "dtype": dtype,
        "tokenizer": tokenizer.sha256,
        "format": FORMAT,
    }


def opened(path: str, tokenizer: str | None) -> tuple[ModelFiles, Tokenizer]:
    """Return the weights in `path`, and the tokenizer: the given one, or that of the folder.

    Raises:
        UserError: the folder is damaged or has no tokenizer, or the tokenizer has no bos.
    """
    files = open_model(path)
    found = tokenizer or files.tokenizer
    if found is None:
        raise UserError(f"{files.path}: has no tokenizer; name the model's own with --tokenizer FILE")
    ours = Tokenizer(found)
    prefix(ours)  # before the weights are read
    return files, ours


def _scorer(files: ModelFiles, tokenizer: Tokenizer, dtype: str, rows: int) -> Scorer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Scorer(ModelBackend(load_model(files, device, DTYPES[dtype]), rows), tokenizer)


def saved_at(folder: str) -> str:
    """Return a digest of the names, sizes and times of all files in a model folder: it changes with any of them.

    A model converted or copied over another one, even with older times or in folders below, is another model.
    """
    os.stat(folder)  # raises an OSError if there is none
    files = ((path, path.stat()) for path in sorted(Path(folder).rglob("*")) if not path.is_dir())
    found = [(str(path.relative_to(folder)), file.st_size, file.st_mtime_ns) for path, file in files]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]
