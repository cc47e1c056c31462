"""Reading one column of parquet and Arrow files in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llama_ds.data.text.decompress import damaged
from llama_ds.data.text.formats import ARROW_STREAM, PARQUET
from llama_ds.data.text.input_storage import open_input
from llama_ds.errors import UserError

BATCH_ROWS = 256  # rows per batch
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # last bytes of an Arrow stream that its writer has closed

Values = list[Any]  # bytes where the column holds strings, None for nulls, other objects for other types


def open_parquet(path: str, field: str) -> Any:
    """Open a parquet file that has the column `field`; the checksums of its pages are verified as they are read.

    Raises:
        UserError: pyarrow is not installed, or the file is damaged or has no such column.
    """
    pa = _pyarrow(path)
    with _reporting_damage(path, PARQUET, pa):
        file = pa.parquet.ParquetFile(open_input(path), page_checksum_verification=True)
    _path_of(path, file.schema_arrow, field)
    return file


def row_counts(path: str, field: str) -> list[int]:
    """Return the number of rows of each row group of a parquet file. Raises UserError as `open_parquet` does."""
    with open_parquet(path, field) as file:
        return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def parquet_values(path: str, field: str, groups: Sequence[int]) -> Iterator[Values]:
    """Yield the values of a column in batches. Raises UserError: the file is damaged."""
    with open_parquet(path, field) as file, _reporting_damage(path, PARQUET, _pyarrow(path)):
        names = _path_of(path, file.schema_arrow, field)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=[".".join(names)]):
            yield _values(batch, names)


def arrow_values(path: str, kind: str, field: str) -> Iterator[Values]:
    """Yield the values of a column of an Arrow stream or file in batches.

    Raises:
        UserError: pyarrow is not installed, or the file is damaged, cut short or has no such column.
    """
    pa = _pyarrow(path)
    with open_input(path) as file, _reporting_damage(path, kind, pa):
        if kind == ARROW_STREAM:
            file.seek(-min(len(END_OF_STREAM), file.seek(0, 2)), 2)
            if file.read() != END_OF_STREAM:
                raise damaged(path, kind, "cut short: the mark at the end of the stream is missing")
            file.seek(0)
            reader = pa.ipc.open_stream(file)
            batches: Iterator[Any] = iter(reader)
        else:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        names = _path_of(path, reader.schema, field)
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield _values(batch.slice(start, BATCH_ROWS), names)


def _pyarrow(path: str) -> Any:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.compute  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(
            f"{path}: reading parquet and Arrow files needs the package pyarrow; pip install 'llama_ds[parquet]'"
        ) from None
    return pyarrow


@contextmanager
def _reporting_damage(path: str, kind: str, pa: Any) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, kind, str(error).splitlines()[0]) from None


def _path_of(path: str, schema: Any, field: str) -> list[str]:
    """Return the names that lead to a column, where a.b is column a.b or field b of the structs in column a."""
    pa = _pyarrow(path)
    leaves = sorted(_leaves(pa, schema), key=lambda leaf: -len(leaf[0]))
    columns = {".".join(names): (names, kind) for names, kind in leaves}  # a column "a.b" before field b of column a
    if field in columns:
        found = columns[field][0]
        if sum(names == found for names, _ in leaves) > 1:
            raise UserError(f'{path}: several columns "{field}"; write the file again with one of them')
        return found
    texts = [name for name, (_, kind) in columns.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    advice = f"name one with --text-field: {', '.join(texts)}" if texts else "none of them holds strings"
    raise UserError(f'{path}: no column "{field}", only {", ".join(columns)}; {advice}')


def _leaves(pa: Any, fields: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    for field in fields:
        names = (*above, field.name)
        if pa.types.is_struct(field.type):
            yield from _leaves(pa, field.type, names)
        else:
            yield list(names), field.type


def _values(batch: Any, names: Sequence[str]) -> Values:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = batch.column(names[0])
    if len(names) > 1:
        column = pc.struct_field(column, list(names[1:]))
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # As bytes, so that one invalid string does not cost the batch; the check finds offsets outside of the data.
        column = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
        column.validate(full=True)
    return column.to_pylist()
