"""The input files of a build: whether they stay unchanged while it runs, and which of them a source already holds.

The content of a file identifies it, with that of the files that belong to it, such as an index. Its stamp (size and
times) only says whether the content must be compared again.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

from llama_ds.data.source.input_index import ListedFile, input_name, parse_inputs
from llama_ds.data.source.manifest import BuildInput, Manifest
from llama_ds.data.text.decompress import without_compression
from llama_ds.data.text.formats import companions
from llama_ds.data.text.input_storage import input_size, open_input, remote_version, stamp, unreadable
from llama_ds.errors import UserError, first_of
from llama_ds.log import logger

BLOCK = 1 << 20  # bytes per read
NAMED = 3  # files that a message names


class InputFile(NamedTuple):
    """An input file as it was found."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int  # also changes when a file is replaced by one with an older mtime


def stat_files(paths: Iterable[str]) -> list[InputFile]:
    """Return the files with their present stamps.

    Raises:
        UserError: a file cannot be read.
    """
    return [_stat(path) for path in paths]


def check_unchanged(files: Iterable[InputFile]) -> None:
    """Raise UserError if a file is no longer as it was found."""
    for file in files:
        try:
            now = _stat(file.path)
        except UserError:
            raise UserError(f"{file.path}: was removed while the build read it; {_again('restore it')}") from None
        if now.size != file.size:
            raise UserError(
                f"{file.path}: changed from {file.size} to {now.size} bytes while the build read it; "
                f"{_again('restore it')}"
            )
        if now != file:
            raise UserError(
                f"{file.path}: was written to or replaced while the build read it; {_again('leave it alone')}"
            )


def _again(fix: str) -> str:
    return f"{fix} and run the same command again, which resumes the build if the content is the same"


def digest(path: str, size: int | None = None) -> str:
    """Return the sha256 of a file with those that belong to it, or of its first `size` bytes.

    Raises:
        UserError: it cannot be read.
    """
    if size is None and (version := remote_version(path)):  # stands for the content, which is not read twice
        return hashlib.sha256(f"{input_size(path)} {version}".encode()).hexdigest()
    sha256 = hashlib.sha256()
    for name in (path, *(companions(path) if size is None else ())):
        try:
            with open_input(name) as file:
                _add(sha256, file, size)
        except OSError as error:
            raise unreadable(name, error) from None
    return sha256.hexdigest()


def _add(sha256: hashlib._Hash, file: BinaryIO, size: int | None) -> None:
    left = size
    while data := file.read(BLOCK if left is None else min(BLOCK, left)):
        sha256.update(data)
        left = None if left is None else left - len(data)


def check_touched(
    found: Sequence[InputFile], now: Sequence[InputFile], digests: Mapping[str, str], read: set[str], build: str
) -> None:
    """Check the files whose stamps changed since an unfinished build found them: equal content is accepted.

    Args:
        digests: sha256 by path of the files that the build has hashed.
        read: paths of all files that it has read in part.
        build: its folder, for messages.

    Raises:
        UserError: the build has read another content, or part of a file whose content it does not know.
    """
    for then, file in zip(found, now, strict=True):
        if then == file or file.path not in read:
            continue
        known = digests.get(file.path)
        content = digest(file.path) if known else None
        if known is None or content != known:
            what = f"sha256 {known[:12]}, now {content[:12]}" if known and content else "its times differ"
            raise UserError(
                f"{file.path}: changed since the unfinished build in {build} read it ({what}); restore the file, or "
                f"delete {build} to start this build again"
            )
        logger.info("%s: its times changed, but not its content; the build continues", file.path)


def build_input(files: Sequence[ListedFile], appended: bool, settings: dict[str, object]) -> BuildInput:
    """Return the entry of the manifest for a build of `files`."""
    return BuildInput(appended, len(files), sum(f.size for f in files), _combined(files), settings)


def missing_files(
    folder: str, manifest: Manifest, files: Sequence[InputFile], settings: dict[str, object], append: bool, workers: int
) -> list[InputFile]:
    """Return the files that a finished source does not hold yet: [] if the build or addition is already complete.

    Without `append`, the source must be built from exactly `files`. Files of equal size are compared by content.

    Raises:
        UserError: the source was built from other files, or from these with other settings; or a file has only grown
            since it was added, so that its old documents would be added again.
    """
    held = [_listed(folder, number) for number in range(len(manifest.inputs))]
    listed = [file for files_ in held for file in files_]
    mine = _compared(files, {file.size for file in listed}, workers)
    for entry, same in zip(manifest.inputs, held, strict=True):
        if (append or not entry.appended) and [f.sha256 for f in mine] == [f.sha256 for f in same]:
            _check_settings(folder, entry, settings)
            return []
    known = Counter(file.sha256 for file in listed)
    left = [file for file, own in zip(files, mine, strict=True) if own.sha256 not in known]
    if not append:
        if _is_recorded(manifest) and Counter(own.sha256 for own in mine) == known:
            _check_settings(folder, manifest.inputs[0], settings)
            return []
        raise UserError(_other_input(folder, files, left, manifest))
    if left and not settings["dedup"]:
        _check_not_grown(folder, left, listed)
        if not _is_recorded(manifest):
            logger.warning(
                "%s: an older version built it and recorded no input; files that it already holds are added again, so "
                "name new ones alone, or leave out equal documents with --dedup",
                folder,
            )
    if left and len(left) < len(files):
        _warn_of_other_settings(folder, manifest, held, {own.sha256 for own in mine}, settings)
        names = {file.path for file in left}
        logger.info(
            "%s: already holds %d of the %d input files, which are not added again: %s",
            *(
                folder,
                len(files) - len(left),
                len(files),
                first_of([f.path for f in files if f.path not in names], NAMED),
            ),
        )
    return left


def _stat(path: str) -> InputFile:
    # sums: a change of any of the files changes them
    return InputFile(path, *(sum(numbers) for numbers in zip(*map(stamp, (path, *companions(path))), strict=True)))


def _listed(folder: str, number: int) -> list[ListedFile]:
    path = os.path.join(folder, input_name(number))
    try:
        with open(path, "rb") as file:
            return parse_inputs(file.read(), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it from a copy of the source") from None


def _compared(files: Sequence[InputFile], sizes: set[int], workers: int) -> list[ListedFile]:
    """Return the files with their checksums; a file whose size is not in `sizes` is new, and is not read."""
    with ThreadPoolExecutor(workers) as pool:  # hashing releases the GIL
        found = pool.map(lambda file: digest(file.path) if file.size in sizes else "", files)
        return [ListedFile(sha256, file.size, file.path) for file, sha256 in zip(files, found, strict=True)]


def _combined(files: Sequence[ListedFile]) -> str:
    return hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()


def _check_settings(folder: str, entry: BuildInput, settings: dict[str, object]) -> None:
    if differ := _other_settings(entry, settings):
        raise UserError(
            f"{folder}: already holds these documents, built with other flags ({differ}); use another --out "
            "or name, or --overwrite to build the source again"
        )


def _other_settings(entry: BuildInput, settings: dict[str, object]) -> str:
    return "; ".join(
        f"{key} {entry.settings.get(key)}, now {value}"
        for key, value in settings.items()
        if entry.settings.get(key) != value
    )


def _warn_of_other_settings(
    folder: str,
    manifest: Manifest,
    held: Sequence[Sequence[ListedFile]],
    named: set[str],
    settings: dict[str, object],
) -> None:
    """Name the flags that held files were added with if they are others, because these files stay as they are."""
    for entry, files in zip(manifest.inputs, held, strict=True):
        kept = [file.path for file in files if file.sha256 in named]
        if kept and (differ := _other_settings(entry, settings)):
            logger.warning(
                "%s: files that it already holds stay as they were built, with other flags (%s): %s",
                *(folder, differ, first_of(kept, NAMED)),
            )


def _is_recorded(manifest: Manifest) -> bool:
    """Whether the source lists all its input: older versions did not."""
    return bool(manifest.inputs) and not manifest.inputs[0].appended


def _other_input(folder: str, files: Sequence[InputFile], left: Sequence[InputFile], manifest: Manifest) -> str:
    if not _is_recorded(manifest):
        what = "and an older version, which recorded no input, built it"
    elif left:
        shown = first_of([f.path for f in left], NAMED)
        what = f"and does not hold {len(left)} of these {len(files)} input files: {shown}"
    else:
        what = f"whose {sum(entry.files for entry in manifest.inputs)} input files are not exactly these"
    return (
        f"{folder}: already holds a finished source, {what}; use another --out or name, --append to add to it, or "
        "--overwrite to replace it"
    )


def _check_not_grown(folder: str, files: Sequence[InputFile], listed: Sequence[ListedFile]) -> None:
    """Refuse files that have grown or been compressed since they were added, and name those that changed otherwise."""
    held: dict[str, list[ListedFile]] = defaultdict(list)
    for known in listed:
        held[known.path].append(known)
    bare = {without_compression(path): path for path in held}
    for file in files:
        other = bare.get(without_compression(file.path), file.path)
        if file.path not in held and other != file.path:
            raise UserError(
                f"{file.path}: {folder} holds {other}, the same file by its name, compressed or not, whose documents "
                "would be added again; leave it out with --exclude, or equal documents with --dedup"
            )
        for old in held[file.path]:
            if companions(file.path):
                raise UserError(
                    f"{file.path}: changed since it was added to {folder}, which would add its documents again; append "
                    "a file of the new documents alone, or leave out equal documents with --dedup"
                )
            if 0 < old.size < file.size and digest(file.path, old.size) == old.sha256:
                raise UserError(
                    f"{file.path}: {folder} holds its first {old.size} bytes, whose documents would be added again; "
                    "append a file of the new documents alone, or leave out equal documents with --dedup"
                )
    if changed := [file.path for file in files if held[file.path]]:
        logger.warning(
            "%s: files that changed since they were added are added as a whole, with documents that it may hold: %s",
            *(folder, first_of(changed, NAMED)),
        )
