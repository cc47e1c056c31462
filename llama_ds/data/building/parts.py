"""Division of the input into parts: a function of the files alone, so that the worker count changes no byte."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from llama_ds.data.text.piece_reader import PARQUET, TextPiece, open_parquet
from llama_ds.errors import UserError

PARTS = 1024  # target number of parts: enough to balance workers, few enough for one file each
MIN_BYTES, MAX_BYTES = 1 << 20, 64 << 20  # part size: large enough to amortize scheduling, small enough for memory

Part = tuple[TextPiece, ...]


def plan_parts(files: Sequence[str]) -> list[Part]:
    """Return the parts of the files, in order.

    Small files share a part. Plain JSON lines are cut into byte ranges, parquet files between row groups. Other files
    cannot be read from the middle and form one piece of any size.

    Raises:
        UserError: a parquet file is damaged.
    """
    sizes = [_size(path) for path in files]
    size = min(MAX_BYTES, max(MIN_BYTES, sum(sizes) // PARTS))
    parts: list[Part] = []
    pieces: list[TextPiece] = []
    filled = 0
    for path, file_size in zip(files, sizes, strict=True):
        for piece in _pieces(path, file_size, size):
            if pieces and filled + piece.size > size:
                parts.append(tuple(pieces))
                pieces, filled = [], 0
            pieces.append(piece)
            filled += piece.size
    return [*parts, tuple(pieces)] if pieces else parts


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _pieces(path: str, file_size: int, size: int) -> Iterator[TextPiece]:
    if path.lower().endswith(PARQUET):
        yield from _row_groups(path, file_size, size)
    elif path.lower().endswith(".jsonl") and file_size > size:
        for start in range(0, file_size, size):
            stop = min(start + size, file_size)
            yield TextPiece(path, start, stop, stop - start)
    else:
        yield TextPiece(path, size=file_size)


def _row_groups(path: str, file_size: int, size: int) -> Iterator[TextPiece]:
    with open_parquet(path) as file:
        groups = file.num_row_groups
    together = max(1, groups * size // max(1, file_size))
    for start in range(0, groups, together):
        stop = min(start + together, groups)
        yield TextPiece(path, start, stop, file_size * stop // groups - file_size * start // groups)
