"""Any range of any rank's shard equals that of torch.chunk, however the files are sharded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llama_ds.checkpoint import spread
from llama_ds.checkpoint.formats import views
from llama_ds.checkpoint.formats.views import Columns, RotaryReordered, TableRows
from llama_ds.checkpoint.spread import Run, Spread
from llama_ds.checkpoint.stored import safetensors_tensors

ROWS, COLUMNS, HEAD = 24, 20, 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int | None, int], tuple[torch.Tensor, Spread]]:
    """Matrices, and their locations in files, by (dimension, parts)."""
    folder = tmp_path_factory.mktemp("views")
    found = {}
    for dim, parts in ((0, 1), (0, 3), (1, 1), (1, 2)):
        full = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(parts))
        path = str(folder / f"{dim}-{parts}")
        save_file({str(i): part.contiguous() for i, part in enumerate(full.chunk(parts, dim))}, path)
        stored = safetensors_tensors(path)
        runs = [[Run(0, stored[str(i)], full.numel() // parts)] for i in range(parts)]
        found[dim, parts] = full, Spread(full.shape, dim, runs)
    return found


def metas_order(full: torch.Tensor) -> torch.Tensor:
    """Return the matrix with each head's rows in Meta's order, the inverse of `permute` in Hugging Face's converter."""
    halves = full.view(ROWS // HEAD, 2, HEAD // 2, COLUMNS).transpose(1, 2).reshape(ROWS, COLUMNS)
    back = halves.view(ROWS // HEAD, HEAD // 2, 2, COLUMNS).transpose(1, 2).reshape(ROWS, COLUMNS)
    assert torch.equal(back, full)
    return halves


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_parts_are_sharded_as_torch_does(
    files: dict[tuple[int | None, int], tuple[torch.Tensor, Spread]], data: st.DataObject
) -> None:
    full, source = files[data.draw(st.sampled_from(sorted(files)))]
    kind = data.draw(st.sampled_from(["spread", "rows", "columns", "rotary"]))
    wanted, view, dim = full, source, source.dim
    if kind == "rows":
        rows = data.draw(st.sampled_from([4, 23, 40]))
        wanted, view, dim = torch.zeros(rows, COLUMNS), TableRows(source, rows), 0
        wanted[: min(rows, ROWS)] = full[:rows]
    elif kind == "columns":
        wanted, view, dim = full, Columns(source), 1
    elif kind == "rotary":
        wanted, view, dim = metas_order(full), RotaryReordered(TableRows(source, ROWS), HEAD, to_halves=False), 0
        assert torch.equal(RotaryReordered(view, HEAD, to_halves=True).whole(), full)
    size = data.draw(st.sampled_from([1, 2, 4] if dim == 1 or kind == "rows" else [1, 2, 3, 6]))
    rank = data.draw(st.integers(0, size - 1))
    padded = torch.cat([wanted, torch.zeros(-len(wanted) % size, COLUMNS)]) if kind == "rows" else wanted
    part = padded.chunk(size, dim)[rank].reshape(-1)
    start = data.draw(st.integers(0, len(part) - 1))
    out = torch.empty(data.draw(st.integers(1, len(part) - start)), dtype=data.draw(st.sampled_from(DTYPES)))
    block = data.draw(st.sampled_from([1, 70, 4 << 20]))
    spread.BLOCK_ELEMENTS = views.BLOCK_ELEMENTS = block
    try:
        view.read(out, rank, size, start)
    finally:
        spread.BLOCK_ELEMENTS = views.BLOCK_ELEMENTS = 4 << 20
    assert torch.equal(out, part[start : start + len(out)].to(out.dtype))


DTYPES = [torch.float32, torch.bfloat16]
