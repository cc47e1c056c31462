"""Counts of the documents taken and left out of each input file, so that no file is lost without a word."""

from __future__ import annotations

from collections import Counter

from llama_ds.data.building.parts import Part
from llama_ds.data.building.tokenized import TokenizedPart
from llama_ds.data.text.formats import ReadOptions, matches
from llama_ds.errors import UserError
from llama_ds.log import logger

SHOWN = 20  # files whose left out documents are reported one by one


class DocumentCounts:
    """Adds up the parts of a build in their order. Files in `allow_empty` may yield no document."""

    def __init__(self, options: ReadOptions, allow_empty: tuple[str, ...]) -> None:
        self._options, self._allow_empty = options, allow_empty
        self._path = ""  # the file in progress, whose counts follow
        self._is_list = False
        self._taken = self._lines = 0
        self._reasons: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._files: list[str] = []  # descriptions of the first files with documents left out
        self._files_left_out = 0

    def add(self, pieces: Part, part: TokenizedPart) -> tuple[tuple[str, int], ...]:
        """Add the next part; return the path of each piece, and the number of lines of its file before the piece.

        Raises:
            UserError: a file has ended without a document.
        """
        files = []
        for piece, lines, taken, left_out in zip(pieces, part.lines, part.taken, part.left_out, strict=True):
            if piece.path != self._path:
                self.end_file()
                self._path, self._taken, self._lines = piece.path, 0, 0
                self._is_list = bool(self._options.separator) or (piece.format is not None and piece.format.is_list)
            for reason, found in left_out.items():
                first = f", the first in line {self._lines + found.first}" if found.first else ""
                self._reasons.setdefault(reason, f"{reason}{first}")
                self._counts[reason] += found.count
            files.append((piece.path, self._lines))
            self._taken += taken
            self._lines += lines
        return tuple(files)

    def end_file(self) -> None:
        """Finish the counts of the file in progress. Raises UserError: it yields nothing, which is not allowed."""
        counts = ", ".join(f"{count}: {self._reasons[reason]}" for reason, count in self._counts.items())
        if self._path and self._is_list and not self._taken and not matches(self._path, self._allow_empty):
            found = (
                f"none of its {self._counts.total()} documents is taken ({counts})" if counts else "holds no document"
            )
            raise UserError(
                f"{self._path}: {found}; repair the file, name the field of its texts with --text-field, or accept "
                f"it with --allow-empty '{self._path}'"
            )
        if counts:
            self._files_left_out += 1
            if len(self._files) < SHOWN:
                self._files.append(f"{self._path}: documents left out, {counts}")
        self._totals += self._counts
        self._counts, self._reasons = Counter(), {}

    def report(self, name: str) -> None:
        """Log how many documents were left out, by file and by reason."""
        if not self._totals:
            return
        for line in self._files:
            logger.warning("%s", line)
        if self._files_left_out > SHOWN:
            logger.warning("documents of %d more files left out", self._files_left_out - SHOWN)
        logger.warning(
            "source %s: %d empty or malformed documents left out (%s)",
            name,
            self._totals.total(),
            _listed(self._totals),
        )


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count}: {reason}" for reason, count in counts.most_common())
