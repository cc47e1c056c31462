"""Division of the input into parts: a function of the files alone, so that the worker count changes no byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llama_ds.data.text.columns import row_counts
from llama_ds.data.text.formats import JSON_LINES, MEGATRON, PARQUET, TEXT, ReadOptions
from llama_ds.data.text.input_storage import input_size
from llama_ds.data.text.inputs import TakenFile
from llama_ds.data.text.megatron import open_megatron
from llama_ds.data.text.piece_reader import TextPiece

PARTS = 1024  # target number of parts: enough to balance workers, few enough for one file each
MIN_BYTES, MAX_BYTES = 1 << 20, 64 << 20  # part size: large enough to amortize scheduling, small enough for memory

Part = tuple[TextPiece, ...]


def plan_parts(files: Sequence[TakenFile], options: ReadOptions) -> list[Part]:
    """Return the parts of the files, in order.

    Small files share a part. JSON lines and separated texts that are not compressed are cut into byte ranges, parquet
    files between row groups, Megatron ids between documents. Other files cannot be read from the middle and form one
    piece of any size.

    Raises:
        UserError: a parquet file is damaged.
    """
    sizes = [input_size(file.path) for file in files]
    size = min(MAX_BYTES, max(MIN_BYTES, sum(sizes) // PARTS))
    parts: list[Part] = []
    pieces: list[TextPiece] = []
    filled = 0
    for file, file_size in zip(files, sizes, strict=True):
        for piece in _pieces(file, options, file_size, size):
            if pieces and filled + piece.size > size:
                parts.append(tuple(pieces))
                pieces, filled = [], 0
            pieces.append(piece)
            filled += piece.size
    return [*parts, tuple(pieces)] if pieces else parts


def _pieces(file: TakenFile, options: ReadOptions, file_size: int, size: int) -> Iterator[TextPiece]:
    if file.format.content == PARQUET:
        yield from _units(file, len(row_counts(file.path, options.text_field)), file_size, size)
    elif file.format.content == MEGATRON:
        yield from _units(file, len(open_megatron(file.path)), file_size, size)
    elif file_size > size and _is_divisible(file, options):
        for start in range(0, file_size, size):
            stop = min(start + size, file_size)
            yield TextPiece(file.path, start, stop, stop - start, file.format)
    else:
        yield TextPiece(file.path, size=file_size, format=file.format)


def _is_divisible(file: TakenFile, options: ReadOptions) -> bool:
    if file.format.compression or file.format.content not in (JSON_LINES, TEXT):
        return False
    # Where a separator can overlap itself, as two line ends do in three, documents depend on where reading begins.
    s = options.separator
    overlaps = any(s.startswith(s[start:]) for start in range(1, len(s)))
    return file.format.content == JSON_LINES or (bool(s) and not overlaps)


def _units(file: TakenFile, units: int, file_size: int, size: int) -> Iterator[TextPiece]:
    """Yield pieces of about `size` bytes of a file of row groups or documents, one piece if it has none."""
    together = max(1, units * size // max(1, file_size))
    for start in range(0, max(1, units), together):
        stop = min(start + together, units)
        share = file_size * stop // max(1, units) - file_size * start // max(1, units)
        yield TextPiece(file.path, start, stop, share, file.format)
