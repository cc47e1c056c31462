"""The folder of a source during a build: its lock, the state for resuming, and the final commit.

    build.lock            lock held by the running build
    build/plan.json       input and flags
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

from llama_ds.data.building.atomic_file import TEMPORARY, atomic_writer
from llama_ds.data.source.manifest import (
    CHECKSUM_BLOCK,
    MANIFEST,
    REBUILD,
    SPLITS,
    Manifest,
    checksum_blocks,
    checksum_of,
    checksums_name,
    parse_manifest,
    shard_name,
    write_atomically,
)
from llama_ds.errors import UserError
from llama_ds.log import logger

APPENDS_TO = "appends to"  # key of the fingerprint: checksum of the manifest that a build appends to
SOURCE_FILE = re.compile(rf"({'|'.join(SPLITS)})-(\d+)\.(tar|documents\.gz|sha256)")


def build_path(folder: str) -> str:
    """Return the folder for the unfinished work of a source."""
    return os.path.join(folder, "build")


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


def fingerprint(files: Sequence[str], flags: Mapping[str, object]) -> dict[str, object]:
    """Return everything that determines the bytes of a build: the flags, and the files' names, sizes and mtimes."""
    listed, size = hashlib.sha256(), 0
    for path in files:
        status = os.stat(path)
        size += status.st_size
        listed.update(json.dumps([path, status.st_size, status.st_mtime_ns]).encode())
    return {**flags, "input": f"{len(files)} files, {size} bytes, {listed.hexdigest()[:16]}"}


def finished(folder: str) -> bytes | None:
    """Return the content of the manifest of a finished source, or None."""
    try:
        with open(os.path.join(folder, MANIFEST), "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def finish_commit(folder: str, mark: Mapping[str, object]) -> Manifest | None:
    """Finish a build that was killed during its commit; return its manifest if its fingerprint is `mark`."""
    build = build_path(folder)
    try:
        with open(os.path.join(build, MANIFEST), "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return None
    plan = _read_plan(build) or {}
    write_atomically(os.path.join(folder, MANIFEST), content)
    _remove_build(folder)
    same = {**plan, APPENDS_TO: ""} == {**mark, APPENDS_TO: ""}
    return parse_manifest(content, build) if same else None


def begin(folder: str, mark: Mapping[str, object], base: Manifest | None, overwrite: bool) -> None:
    """Prepare the folder for a new or resumed build with the fingerprint `mark`.

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
        changes = ", ".join(
            f"{key} {plan.get(key)}, now {value}" for key, value in mark.items() if plan.get(key) != value
        )
        alternative = (
            f"delete {build} to abandon that addition" if plan.get(APPENDS_TO) else "start again with --overwrite"
        )
        raise UserError(
            f"{folder}: holds an unfinished build of other input or flags ({changes}); "
            f"finish it with the command that started it, or {alternative}"
        )
    remove_temporary(folder)
    if plan is None:
        _remove_strays(folder, base)
        os.makedirs(build, exist_ok=True)
        os.makedirs(os.path.join(folder, "index"), exist_ok=True)
        with atomic_writer(os.path.join(build, "plan.json")) as file:
            file.write(json.dumps(dict(mark), indent=1).encode())


def commit(folder: str, manifest: Manifest, base: Manifest | None, sha256: Mapping[str, list[str]]) -> None:
    """Write the checksums and the manifest of a build whose shards are finished, and remove its temporary files.

    `sha256` holds, for each split, the checksums of the shards of this build.

    Raises:
        UserError: the checksums of the earlier shards cannot be read.
    """
    for split, new in sha256.items():
        old = _checksums(folder, split, base.splits[split].shards) if base else []
        for name, lines in checksum_blocks(split, [*old, *new]):
            if _read(os.path.join(folder, name)) != lines.encode():
                with atomic_writer(os.path.join(folder, name), len(lines)) as file:
                    file.write(lines.encode())
    content = json.dumps(asdict(manifest), indent=1).encode()
    with atomic_writer(os.path.join(build_path(folder), MANIFEST), len(content)) as file:
        file.write(content)
    write_atomically(os.path.join(folder, MANIFEST), content)
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
    content = _read(os.path.join(build, "plan.json"))
    return json.loads(content) if content else None


def _remove_build(folder: str) -> None:
    # Rename first: a partly removed folder would look like an unfinished build of other flags.
    build, removed = build_path(folder), os.path.join(folder, "build.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if os.path.exists(build):
        os.rename(build, removed)
        shutil.rmtree(removed)


def remove_temporary(folder: str) -> None:
    """Remove the partial files of killed processes; no build may be running."""
    shutil.rmtree(os.path.join(folder, "build.removed"), ignore_errors=True)
    for directory in (folder, build_path(folder), os.path.join(folder, "index")):
        for name in os.listdir(directory) if os.path.isdir(directory) else ():
            if TEMPORARY in name:
                os.remove(os.path.join(directory, name))


def _remove_strays(folder: str, base: Manifest | None) -> None:
    # Shards of an older or abandoned build are in no manifest, and this build would take them for its own.
    for directory in (folder, os.path.join(folder, "index")):
        for name in os.listdir(directory) if os.path.isdir(directory) else ():
            if (match := SOURCE_FILE.fullmatch(name)) and _is_stray(name, match, base):
                os.remove(os.path.join(directory, name))


def _is_stray(name: str, match: re.Match[str], base: Manifest | None) -> bool:
    split, number, kind = match[1], int(match[2]), match[3]
    shards = base.splits[split].shards if base else 0
    if kind == "sha256":
        return number * CHECKSUM_BLOCK >= shards
    return number >= shards or (kind == "tar" and name != shard_name(split, number))
