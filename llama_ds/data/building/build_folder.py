"""The folder of a source during a build: its lock, the state for resuming, and the final commit.

    build.lock            lock held by the running build
    build/plan.json       input and flags
    build/files.json      input files as they were found, with their times
    build/part-*          tokenized parts (tokenized.py)
    build/train-* ...     checksums of finished shards (shard_writer.py)
    build/manifest.json   written last, before it is moved to the source folder

Only a build of the same input and flags may resume an unfinished one; the folder `build` is removed at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict

from llama_ds.atomic_files import TEMPORARY, write_atomically
from llama_ds.data.building.input_files import InputFile
from llama_ds.data.building.write_errors import atomic_writer
from llama_ds.data.source.input_index import INPUT_FILE, ListedFile, input_name, write_inputs
from llama_ds.data.source.manifest import (
    CHECKSUM_BLOCK,
    MANIFEST,
    REBUILD,
    SPLITS,
    Manifest,
    checksum_blocks,
    checksum_of,
    checksums_name,
    shard_name,
)
from llama_ds.data.source.source_folder import BUILD, PLAN
from llama_ds.errors import UserError
from llama_ds.log import logger

INPUT = "input"  # key of the fingerprint: number, total size and names of the files
APPENDS_TO = "appends to"  # key of the fingerprint: checksum of the manifest that a build appends to
SOURCE_FILE = re.compile(rf"({'|'.join(SPLITS)})-(\d+)\.(tar|documents\.gz|sha256)")


def build_path(folder: str) -> str:
    """Return the folder for the unfinished work of a source."""
    return os.path.join(folder, BUILD)


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Create the folder and hold its lock, which the system releases even if the process is killed.

    Raises:
        UserError: another build holds the lock, or the folder cannot be created.
    """
    path = os.path.join(folder, "build.lock")
    try:
        os.makedirs(folder, exist_ok=True)
        held = _take_lock(path, folder)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None
    try:
        yield
    finally:
        with suppress(OSError):  # a disk that has become read-only is the reason of another error
            os.remove(path)
        os.close(held)


def _take_lock(path: str, folder: str) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(
                f"{folder}: another build of this source is running; wait until it ends, or stop it first"
            ) from None
        except OSError as error:
            logger.warning("%s: the file system has no locks (%s); start no second build here", folder, error.strerror)
            return file
        with suppress(FileNotFoundError):  # the previous holder removed the file after this process opened it
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


def fingerprint(files: Sequence[InputFile], flags: Mapping[str, object]) -> dict[str, object]:
    """Return what an unfinished build must agree in to be resumed: the flags, and the files' names and sizes."""
    listed = hashlib.sha256(json.dumps([(file.path, file.size) for file in files]).encode())
    size = sum(file.size for file in files)
    return {**flags, INPUT: f"{len(files)} files, {size} bytes, {listed.hexdigest()[:16]}"}


def finished(folder: str) -> bytes | None:
    """Return the content of the manifest of a finished source, or None."""
    try:
        with open(os.path.join(folder, MANIFEST), "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def finish_commit(folder: str) -> None:
    """Finish a build that was killed during its commit."""
    if content := _read(os.path.join(build_path(folder), MANIFEST)):
        write_atomically(os.path.join(folder, MANIFEST), content, durable=True)
        _remove_build(folder)
    shutil.rmtree(_removed_path(folder), ignore_errors=True)


def begin(
    folder: str, mark: Mapping[str, object], files: Sequence[InputFile], base: Manifest | None, overwrite: bool
) -> list[InputFile]:
    """Prepare the folder for a new or resumed build with the fingerprint `mark`; return the files as it found them.

    Raises:
        UserError: it holds an unfinished build with another fingerprint, and `overwrite` is false.
    """
    build = build_path(folder)
    plan = _read_plan(build)
    if overwrite and (finished(folder) is not None or plan not in (None, mark)):
        with suppress(FileNotFoundError):
            os.remove(os.path.join(folder, MANIFEST))  # first: without it the folder no longer counts as a source
        _remove_build(folder)
        plan = None
    if plan is not None and plan != mark:
        if plan.keys() == mark.keys():
            what = f"build of other input or flags ({_changes(build, plan, mark, files)})"
        else:
            what = "build of another version of this program"
        raise UserError(
            f"{folder}: holds an unfinished {what}; finish it with the command that started it, or delete {build} to "
            f"{'abandon that addition' if plan.get(APPENDS_TO) else 'start again'}"
        )
    remove_temporary(folder)
    if plan is not None:
        return _read_files(build)
    _remove_strays(folder, base)
    os.makedirs(build, exist_ok=True)
    os.makedirs(os.path.join(folder, "index"), exist_ok=True)
    save_files(folder, files)
    with atomic_writer(os.path.join(build, PLAN)) as file:
        file.write(json.dumps(dict(mark), indent=1).encode())
    return list(files)


def save_files(folder: str, files: Sequence[InputFile]) -> None:
    """Record the input files as they are found now."""
    with atomic_writer(os.path.join(build_path(folder), "files.json")) as file:
        file.write(json.dumps(files).encode())


def _read_files(build: str) -> list[InputFile]:
    return [InputFile(*file) for file in json.loads(_read(os.path.join(build, "files.json")) or b"[]")]


def _changes(build: str, plan: Mapping[str, object], mark: Mapping[str, object], files: Sequence[InputFile]) -> str:
    differ = [key for key in mark if plan[key] != mark[key]]
    changes = [f"{key} {plan[key]}, now {mark[key]}" for key in differ if key != INPUT]
    if INPUT in differ:
        changes.append(_input_change(_read_files(build), files))
    return ", ".join(changes)


def _input_change(then: Sequence[InputFile], now: Sequence[InputFile]) -> str:
    sizes = [{file.path: file.size for file in files} for files in (then, now)]
    for path in sorted({**sizes[0], **sizes[1]}):
        was, is_ = (f"of {some[path]} bytes" if path in some else "absent" for some in sizes)
        if was != is_:
            return f"{path} {was}, now {is_}"
    return "input files in another order"


def commit(
    folder: str,
    manifest: Manifest,
    base: Manifest | None,
    sha256: Mapping[str, list[str]],
    files: Sequence[ListedFile],
) -> None:
    """Write the checksums and the manifest of a build whose shards are finished, and remove its temporary files.

    `sha256` holds, for each split, the checksums of the shards of this build; `files` are its input.

    Raises:
        UserError: the checksums of the earlier shards cannot be read.
    """
    for split, new in sha256.items():
        old = _checksums(folder, split, base.splits[split].shards) if base else []
        for name, lines in checksum_blocks(split, [*old, *new]):
            if _read(os.path.join(folder, name)) != lines.encode():
                with atomic_writer(os.path.join(folder, name), len(lines)) as file:
                    file.write(lines.encode())
    with atomic_writer(os.path.join(folder, input_name(len(manifest.inputs) - 1))) as file:
        write_inputs(file, files)
    content = json.dumps(asdict(manifest), indent=1).encode()
    with atomic_writer(os.path.join(build_path(folder), MANIFEST), len(content)) as file:
        file.write(content)
    write_atomically(os.path.join(folder, MANIFEST), content, durable=True)
    _remove_build(folder)


def discard(folder: str) -> None:
    """Remove the unfinished work of a build that cannot succeed."""
    _remove_build(folder)


def _checksums(folder: str, split: str, shards: int) -> list[str]:
    found: list[str] = []
    content = b""
    for shard in range(shards):
        if shard % CHECKSUM_BLOCK == 0:
            content = _read(os.path.join(folder, checksums_name(split, shard)))
        digest = checksum_of(content, split, shard)
        if digest is None:
            path = os.path.join(folder, checksums_name(split, shard))
            raise UserError(f"{path}: no checksum of {shard_name(split, shard)}; restore the file, or {REBUILD}")
        found.append(digest)
    return found


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def _read_plan(build: str) -> dict[str, object] | None:
    content = _read(os.path.join(build, PLAN))
    return json.loads(content) if content else None


def _removed_path(folder: str) -> str:
    return os.path.join(folder, "build.removed")


def _remove_build(folder: str) -> None:
    # Rename first: a partly removed folder would look like an unfinished build of other flags.
    build, removed = build_path(folder), _removed_path(folder)
    shutil.rmtree(removed, ignore_errors=True)
    if os.path.exists(build):
        os.rename(build, removed)
        shutil.rmtree(removed)


def remove_temporary(folder: str) -> None:
    """Remove the partial files of killed processes; no build may be running."""
    shutil.rmtree(_removed_path(folder), ignore_errors=True)
    for directory in (folder, build_path(folder), os.path.join(folder, "index")):
        for name in os.listdir(directory) if os.path.isdir(directory) else ():
            if TEMPORARY.fullmatch(name):
                with suppress(OSError):
                    os.remove(os.path.join(directory, name))


def _remove_strays(folder: str, base: Manifest | None) -> None:
    # Shards of an older or abandoned build are in no manifest, and this build would take them for its own.
    for directory in (folder, os.path.join(folder, "index")):
        for name in os.listdir(directory) if os.path.isdir(directory) else ():
            if _is_stray(name, base):
                os.remove(os.path.join(directory, name))


def _is_stray(name: str, base: Manifest | None) -> bool:
    if match := INPUT_FILE.fullmatch(name):
        return int(match[1]) >= (len(base.inputs) if base else 0)
    if not (match := SOURCE_FILE.fullmatch(name)):
        return False
    split, number, kind = match[1], int(match[2]), match[3]
    shards = base.splits[split].shards if base else 0
    if kind == "sha256":
        return number * CHECKSUM_BLOCK >= shards
    return number >= shards or (kind == "tar" and name != shard_name(split, number))
