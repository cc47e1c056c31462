"""Boards that are files of the run: TensorBoard's event files, and a CSV table."""

from __future__ import annotations

import csv
import io
import os

from llama_ds.atomic_files import write_atomically
from llama_ds.job.run_end import RunEnd
from llama_ds.training.boards.background import Values, numbers


class TensorBoardFiles:
    """Event files for TensorBoard."""

    def __init__(self, folder: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=first_step + 1)

    def add(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if isinstance(value, str):  # TensorBoard takes it as Markdown, where an indented line is code
                self._writer.add_text(name, "\n".join(f"    {line}" for line in value.splitlines()), step)
            else:
                self._writer.add_scalar(name, value, step)

    def close(self, end: RunEnd) -> None:
        self._writer.close()


class CsvFile:
    """A table of (step, name, value): each kind of report has other names, so they are rows and not columns."""

    HEADER = ("step", "name", "value")

    def __init__(self, path: str, first_step: int) -> None:
        kept = _rows_until(path, first_step)
        table = io.StringIO()
        csv.writer(table).writerows((self.HEADER, *kept))
        write_atomically(path, table.getvalue())
        self._file = open(path, "a", buffering=1, newline="")  # noqa: SIM115 (closed by close)
        self._writer = csv.writer(self._file)

    def add(self, step: int, values: Values) -> None:
        self._writer.writerows((step, name, value) for name, value in numbers(values).items())

    def close(self, end: RunEnd) -> None:
        self._file.close()


def _rows_until(path: str, step: int) -> list[list[str]]:
    """Return the complete rows up to `step`; a kill may have cut off the last one."""
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        lines = [line for line in file if line.endswith("\n")]
    return [row for row in csv.reader(lines) if len(row) == 3 and row[0].isdigit() and int(row[0]) <= step]
