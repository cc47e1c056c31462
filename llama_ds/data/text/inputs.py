"""The files of a source: which files of a pattern are taken, in which format, and why the others are left out."""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from llama_ds.data.source.source_folder import is_source_folder
from llama_ds.data.text import mds, saved_datasets
from llama_ds.data.text.copies import compressed_copies, links
from llama_ds.data.text.formats import (
    BINARY,
    EMPTY,
    MEGATRON_INDEX,
    TEXT,
    TEXT_SUFFIXES,
    FileFormat,
    ReadOptions,
    content_suffix,
    known_suffixes,
    matches,
    recognise,
)
from llama_ds.data.text.input_storage import is_remote, list_remote, unreadable
from llama_ds.errors import UserError
from llama_ds.log import logger

SHOWN = 3  # examples of files that are left out for one reason
SPLIT = re.compile(r"(?:^|[/._-])(train|validation|valid|test)(?:/|[._-]\d)")  # as hubs name folders and shards
HIDDEN = "hidden or a marker"
UNFINISHED = "a backup or an unfinished file by its name"
LINK = "a link to a file that is read under another name"
COPY = "a compressed copy of a file that is read"
BUILT = "of a source that a build has made"
# Names that Hadoop, Spark and Delta Lake give to files and folders beside the data.
MARKER = re.compile(r"_(SUCCESS|metadata|common_metadata|temporary|spark_metadata|delta_log|(committed|started)_\w+)")
# Names that editors give to backups, and browsers and download tools to files in progress.
BACKUP = re.compile(r".*~|#.*#|.*\.(bak|orig|swp|tmp|temp|crdownload|download|partial|incomplete|aria2)", re.IGNORECASE)


@dataclass(frozen=True)
class TakenFile:
    """A file that a source takes."""

    path: str
    format: FileFormat


@dataclass
class Inputs:
    """The files of a pattern in a fixed order, and those that are left out, by reason."""

    pattern: str
    files: list[TakenFile] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def paths(self) -> list[str]:
        """Paths of the files taken."""
        return [file.path for file in self.files]

    @property
    def formats(self) -> dict[str, FileFormat]:
        """Formats of the files taken, by path."""
        return {file.path: file.format for file in self.files}

    def report(self) -> None:
        """Log how many files are taken, by format, and which are left out, by reason."""
        formats = Counter(str(file.format) for file in self.files)
        taken = ", ".join(f"{count} {name}" for name, count in sorted(formats.items()))
        logger.info("%s: %s taken (%s)", self.pattern, _files(len(self.files)), taken)
        for line in self._left_out_lines():
            logger.warning("%s: %s", self.pattern, line)
        splits = Counter(found[1] for path in self.paths if (found := SPLIT.search(path.removeprefix(self.pattern))))
        if len(splits) > 1:
            listed = ", ".join(f"{name} ({_files(count)})" for name, count in sorted(splits.items()))
            logger.warning("%s: mixes the splits %s; name one with a folder or a glob", self.pattern, listed)

    def nothing(self) -> UserError:
        """Return the error for a pattern without a file to take."""
        if not self.left_out:
            return UserError(
                f"{self.pattern}: no such file, and as a glob it matches no file; check the path, and quote globs"
            )
        others = f", such as '{os.path.join(self.pattern, '**', '*')}'" if os.path.isdir(self.pattern) else ""
        return UserError(
            f"{self.pattern}: holds no file to take; {'; '.join(self._left_out_lines())}. Taken are texts, JSON, "
            f"parquet and Arrow files (suffixes {' '.join(known_suffixes())}); name others with a glob{others}"
        )

    def _left_out_lines(self) -> Iterator[str]:
        for reason, paths in sorted(self.left_out.items()):
            more = ", ..." if len(paths) > SHOWN else ""
            yield f"{_files(len(paths))} left out, {reason}: {', '.join(paths[:SHOWN])}{more}"


def find_inputs(pattern: str, options: ReadOptions) -> Inputs:
    """Return the files of `pattern`: a file, a folder with all below it, or a glob with `**`.

    A file named in full is always taken, files that match a glob unless they are markers such as _SUCCESS, and files of
    a folder if their content or their name shows a text or a list of texts. Links are followed.

    Raises:
        UserError: nothing is taken, a file or folder cannot be read, or a file holds records that are not read.
    """
    pattern = os.path.expanduser(pattern.removeprefix("file://"))
    search = _Search(Inputs(pattern), options)
    if is_remote(pattern):
        search.remote(pattern)
    elif os.path.isdir(pattern):
        search.folder(pattern)
    elif os.path.isfile(pattern):
        search.named(pattern)
    else:
        search.matching(sorted(_glob(pattern)))
    inputs = search.inputs
    _leave_out_readme(inputs)
    if not inputs.files:
        raise inputs.nothing()
    inputs.files.sort(key=lambda file: file.path)
    if not is_remote(pattern):
        _leave_out_repeated(inputs)
    return inputs


class _Search:
    def __init__(self, inputs: Inputs, options: ReadOptions) -> None:
        self.inputs = inputs
        self._options = options
        self._matched: set[str] = set()  # paths that match the glob
        self._seen: set[str] = set()  # paths, because several ways of a glob may lead to one
        self._folders: set[tuple[int, int]] = set()  # device and inode, because links may form a loop
        self._built: dict[str, bool] = {}  # whether folders hold sources

    def named(self, path: str) -> None:
        """Take a file that the user named in full."""
        if path in self._matched and mds.is_index(path):
            self._leave_out(path, mds.METADATA)
            return
        found = recognise(path, self._options)
        if found.content == MEGATRON_INDEX:
            ids = f"{os.path.splitext(path)[0]}.bin"
            if not is_remote(path) and not os.path.exists(ids):
                raise UserError(f"{path}: an index of Megatron ids without {ids}; copy that too, or delete the index")
            self._leave_out(path, f"the {MEGATRON_INDEX} in the .bin file")
            return
        self._take(path, FileFormat(TEXT, found.compression) if found.content in (BINARY, EMPTY) else found)

    def matching(self, paths: list[str]) -> None:
        """Take the files and folders that match a glob."""
        self._matched = set(paths)
        for path in paths:
            self.entry(path)

    def remote(self, url: str) -> None:
        """Take the files at a URL."""
        for path in list_remote(url):
            if path == url:
                self.named(path)
                continue
            if matches(path, self._options.exclude):
                self._leave_out(path, "named by --exclude")
            elif any(
                _is_hidden(part) or MARKER.fullmatch(part) for part in path.split("/") if part not in url.split("/")
            ):
                self._leave_out(path, HIDDEN)
            elif BACKUP.fullmatch(os.path.basename(path)):
                self._leave_out(path, UNFINISHED)
            elif os.path.basename(path) in saved_datasets.FILES:
                self._leave_out(path, saved_datasets.METADATA)
            else:
                self._of_folder(path)

    def folder(self, path: str) -> None:
        """Take the files of a folder and of all folders below it."""
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in self._folders:
            self._leave_out(path, "a link to a folder that is read under another name")
            return
        self._folders.add((status.st_dev, status.st_ino))
        if self._is_built(path):
            self._leave_out(path, BUILT)
            return
        try:
            names = sorted(os.listdir(path))
        except OSError as error:
            raise unreadable(path, error) from None
        metadata = {**saved_datasets.check(path, names), **mds.check(path, names)}
        for name in names:
            if name in metadata:
                self._leave_out(os.path.join(path, name), metadata[name])
            else:
                self.entry(os.path.join(path, name))

    def entry(self, path: str) -> None:
        """Take or leave out a file or a folder."""
        if path in self._seen:
            return
        self._seen.add(path)
        in_folder = path not in self._matched
        if matches(path, self._options.exclude):
            self._leave_out(path, "named by --exclude")
            return
        name = os.path.basename(path)
        if MARKER.fullmatch(name) or (in_folder and _is_hidden(name)):
            self._leave_out(path, HIDDEN)
            return
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            raise unreadable(path, error) from None
        if stat.S_ISDIR(mode):
            self.folder(path)
        elif any(self._is_built(folder) for folder in _folders_above(path, 2)):  # a glob may match its files
            self._leave_out(path, BUILT)
        elif not stat.S_ISREG(mode):
            self._leave_out(path, "not a regular file")
        elif not in_folder:
            self.named(path)
        elif BACKUP.fullmatch(name):
            self._leave_out(path, UNFINISHED)
        else:
            self._of_folder(path)

    def _is_built(self, folder: str) -> bool:
        if folder not in self._built:
            self._built[folder] = is_source_folder(folder)
        return self._built[folder]

    def _of_folder(self, path: str) -> None:
        found = recognise(path, self._options)
        suffix = content_suffix(path)
        if matches(path, self._options.as_text):
            self._take(path, found)
        elif found.content == MEGATRON_INDEX:
            self.named(path)
        elif found.content in (BINARY, EMPTY) and not _is_part(path):
            self._leave_out(path, "not text" if found.content == BINARY else "empty, and no suffix of a text")
        elif found.content == TEXT and suffix not in TEXT_SUFFIXES and not _may_be_text(path, suffix, found):
            self._leave_out(path, f"suffix {suffix or 'missing'}, which folders are not searched for")
        else:
            self._take(path, FileFormat(TEXT, found.compression) if found.content in (BINARY, EMPTY) else found)

    def _take(self, path: str, found: FileFormat) -> None:
        self.inputs.files.append(TakenFile(path, found))

    def _leave_out(self, path: str, reason: str) -> None:
        self.inputs.left_out[reason].append(path)


def _leave_out_readme(inputs: Inputs) -> None:
    """Leave out the README of a folder of lists: it describes them, as the card of a dataset does on a hub."""
    folders: set[str] = set()  # folders of lists, and all above them
    for file in inputs.files:
        folder = os.path.dirname(file.path) if file.format.is_list else ""
        while folder and folder not in folders:
            folders.add(folder)
            folder = os.path.dirname(folder) if os.path.dirname(folder) != folder else ""
    for file in inputs.files:
        if os.path.basename(file.path).lower() == "readme.md" and os.path.dirname(file.path) in folders:
            inputs.left_out["describes lists of texts"].append(file.path)
    describing = set(inputs.left_out.get("describes lists of texts", ()))
    inputs.files = [file for file in inputs.files if file.path not in describing]


def _leave_out_repeated(inputs: Inputs) -> None:
    """Leave out files that are taken under another name, because their documents would be read twice."""
    for reason, repeated in (
        (LINK, links(inputs.paths)),
        (COPY, compressed_copies((file.path, file.format) for file in inputs.files)),
    ):
        if repeated:
            inputs.left_out[reason] = sorted(repeated)
            inputs.files = [file for file in inputs.files if file.path not in repeated]


def _may_be_text(path: str, suffix: str, found: FileFormat) -> bool:
    """Whether a name without a suffix of texts may be that of one: shard.gz and web.2019.gz may, dump.xml.gz not."""
    return _is_part(path) or (bool(found.compression) and not suffix.strip(".").isalpha())


def _folders_above(path: str, levels: int) -> Iterator[str]:
    for _ in range(levels):
        path = os.path.dirname(path)
        yield path


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _is_part(path: str) -> bool:
    """Whether the name is one that Hadoop and Spark give to files of an output."""
    return os.path.basename(path).startswith("part-")


def _glob(pattern: str) -> list[str]:
    """Return the files and folders that match a glob. Raises UserError: one of its folders cannot be read."""
    parts = pattern.split(os.sep)
    for i, part in enumerate(parts):  # Python's glob passes over folders that it cannot list
        if glob.has_magic(part):
            above = os.sep.join(parts[: i + (part == "**")])
            for folder in glob.iglob(above + os.sep, recursive=True) if i else (".",):
                if not os.access(folder, os.R_OK | os.X_OK):
                    raise unreadable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return glob.glob(pattern, recursive=True)
