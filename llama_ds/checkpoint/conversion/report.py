"""What a conversion says of its result."""

from __future__ import annotations

from collections.abc import Iterator

from llama_ds.checkpoint.formats.plan import Plan
from llama_ds.checkpoint.formats.views import TableRows
from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.layout.weights import EMBEDDING_KEY


def report(files: ModelFiles, plan: Plan, destination: str, dtype: str) -> list[str]:
    """Return lines on the files written, and on what of the source was changed, chosen or dropped."""
    return list(_lines(files, plan, destination, dtype))


def _lines(files: ModelFiles, plan: Plan, destination: str, dtype: str) -> Iterator[str]:
    count, size = len(plan.files), plan.nbytes / 1e9
    yield f"{destination}: {plan.kind}, {dtype}, {count} file{'s' * (count > 1)}, {size:.3f} GB, from {files.path}"
    yield from files.notes
    if plan.dropped:
        yield f"dropped, {plan.kind} has no place for it: {', '.join(plan.dropped)}"
    yield from plan.notes
    table = files.tensors[EMBEDDING_KEY]
    if isinstance(table, TableRows) and table.source.shape[0] != table.shape[0]:
        change = table.shape[0] - table.source.shape[0]
        what = f"{change} rows of zeros added" if change > 0 else f"the last {-change} rows removed"
        yield f"vocabulary: {table.source.shape[0]} -> {table.shape[0]} rows, {what}"
    if files.tokenizer is None and not (plan.kind == "hf" and files.from_hf):
        yield f"no tokenizer was written: {files.path} has no tokenizer.model or tokenizer.json"
