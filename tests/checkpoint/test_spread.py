"""A tensor sharded in any way over any files is read correctly by any rank of any layout."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_ds.checkpoint import spread, stored
from llama_ds.checkpoint.spread import Run, Spread, in_one_file
from llama_ds.checkpoint.stored import Stored
from llama_ds.errors import UserError

DTYPES = (torch.float32, torch.bfloat16)
FACTORS = (1, 2, 3, 4, 6)


@dataclass(frozen=True)
class Cut:
    """How a tensor is sharded and distributed over files."""

    shape: tuple[int, ...]
    dim: int | None
    parts: int
    borders: tuple[tuple[int, ...], ...]  # for each part, the borders between its runs
    files: tuple[int, ...]  # file number of each run
    gaps: tuple[int, ...]  # unused bytes before each run in its file
    dtype: torch.dtype

    def write(self, folder: str, full: Tensor) -> Spread:
        """Write the files."""
        contents: dict[str, bytearray] = defaultdict(bytearray)
        parts = shards(full, self.dim, self.parts)
        positions = zip(self.files, self.gaps, strict=True)
        found = []
        for part, borders in zip(parts, self.borders, strict=True):
            runs = []
            for begin, end in pairwise(borders):
                file, gap = next(positions)
                path = os.path.join(folder, str(file))
                contents[path] += bytes([0xAA]) * gap
                location = Stored(path, len(contents[path]), self.dtype, (end - begin,))
                runs.append(Run(begin, location, end - begin))
                contents[path] += part.contiguous().view(-1)[begin:end].view(torch.uint8).numpy().tobytes()
            found.append(runs)
        for path, content in contents.items():
            Path(path).write_bytes(content)
        return Spread(self.shape, self.dim, found)


@dataclass(frozen=True)
class Part:
    """A range of elements that a rank reads."""

    rank: int
    size: int
    start: int
    count: int
    dtype: torch.dtype


def shards(full: Tensor, dim: int | None, parts: int) -> list[Tensor]:
    """Return what each part holds; torch.chunk leaves out parts that get no rows."""
    found = [full] if dim is None else list(full.chunk(parts, dim))
    return found + [full[:0]] * (parts - len(found))


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    dim = draw(st.sampled_from((None, 0, 1)))
    parts = draw(st.sampled_from(FACTORS)) if dim is not None else 1
    shape = draw(st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 12), st.integers(1, 12))))
    if dim is not None:
        rows, columns = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
        # Rows may leave the last part, or the last few, smaller or empty: a padded vocabulary.
        shape = (12 * rows - draw(st.integers(0, 5)), columns) if dim == 0 else (rows, 12 * columns)
    lengths = [part.numel() for part in shards(torch.empty(shape), dim, parts)]
    inner = [draw(st.sets(st.integers(1, max(numel - 1, 1)), max_size=4)) for numel in lengths]
    borders = tuple((0, *sorted(b for b in own if b < n), n) for own, n in zip(inner, lengths, strict=True))
    runs = sum(len(part) - 1 for part in borders)
    files = tuple(draw(st.lists(st.integers(0, 2), min_size=runs, max_size=runs)))
    gaps = tuple(draw(st.lists(st.integers(0, 9), min_size=runs, max_size=runs)))
    return Cut(shape, dim, parts, borders, files, gaps, draw(st.sampled_from(DTYPES)))


@st.composite
def readings(draw: st.DrawFn) -> tuple[Cut, list[Part]]:
    cut = draw(cuts())
    found = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.sampled_from(FACTORS))
        first = shards(torch.empty(cut.shape), cut.dim, 1 if cut.dim is None else size)[0]
        held = first.numel()  # the last ones are padded to it
        start = draw(st.integers(0, held - 1))
        count = draw(st.integers(0, held - start))
        found.append(Part(draw(st.integers(0, size - 1)), size, start, count, draw(st.sampled_from(DTYPES))))
    return cut, found


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor whose elements are all different; in bf16, for up to a few hundred elements."""
    numel = torch.Size(shape).numel()
    if dtype == torch.bfloat16:
        return (torch.arange(numel, dtype=torch.int16) + 0x3F80).view(torch.bfloat16).view(shape)  # 1.0 and up
    return (torch.arange(numel) + 1 / 3).view(shape)


@settings(max_examples=200, deadline=None)
@given(readings(), st.integers(1, 40), st.integers(1, 7))
def test_any_sharding_is_read_by_any_rank(reading: tuple[Cut, list[Part]], block: int, chunk: int) -> None:
    """Otherwise a run that resumes with another layout could read wrong weights or moments."""
    cut, parts = reading
    full = numbers(cut.shape, cut.dtype)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(spread, "BLOCK_ELEMENTS", block)
        patch.setattr(stored, "CHUNK_ELEMENTS", chunk)
        found = cut.write(folder, full)
        assert torch.equal(found.whole(), full) and found.whole().dtype == found.dtype == cut.dtype
        for part in parts:
            own = shards(full, cut.dim, 1 if cut.dim is None else part.size)
            held = own[0 if cut.dim is None else part.rank].reshape(-1)
            padded = torch.cat([held, torch.zeros(own[0].numel() - held.numel(), dtype=full.dtype)])
            wanted = padded[part.start : part.start + part.count].to(part.dtype)
            around = torch.full((part.count + 2,), -7.0, dtype=part.dtype)
            found.read(around[1:-1], part.rank, part.size, part.start)
            assert torch.equal(around[1:-1], wanted)
            assert around[0] == around[-1] == -7.0
        assert found.paths == {os.path.join(folder, str(file)) for file in cut.files}
        assert found.numel == full.numel()


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_an_unsharded_tensor_is_sharded_for_ranks(tmp_path: Path, dim: int | None, size: int) -> None:
    """Otherwise a run with tensor parallelism could not start from a Hugging Face model."""
    full = numbers((6, 12), torch.float32)
    (tmp_path / "f").write_bytes(bytes(5) + full.numpy().tobytes())
    found = in_one_file(Stored(str(tmp_path / "f"), 5, torch.float32, (6, 12)), dim)
    for rank in range(size):
        wanted = full if dim is None else full.chunk(size, dim)[rank]
        out = torch.empty(wanted.shape, dtype=torch.bfloat16)
        found.read(out, rank, size)
        assert torch.equal(out, wanted.bfloat16())
    assert torch.equal(found.whole(torch.bfloat16), full.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_truncated_file_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    """Otherwise missing elements would be read as uninitialized memory."""
    path = tmp_path / "f"
    path.write_bytes(bytes(4 * 99 + 3))
    found = in_one_file(Stored(str(path), 0, torch.float32, (100,)), None)
    out = torch.empty(99, dtype=dtype)
    found.read(out)
    assert not out.any()
    with pytest.raises(UserError, match=f"^{path}: ends at byte 399, the file is truncated"):
        found.whole(dtype)
    path.unlink()
    with pytest.raises(UserError, match=rf"^{path}: cannot be read \(No such file or directory\)"):
        found.whole(dtype)
