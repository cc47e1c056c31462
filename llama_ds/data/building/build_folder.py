"""The folder of a source while it is built: its lock, what a restart may go on with, and the last step.

    build.lock            held by the build that runs
    build/plan.json       input and flags
    build/part-*          tokenized parts (tokenized.py)
    build/train-* ...     checksums of shards that are done (shard_writer.py)
    build/manifest.json   written when all is done but for putting it in its place

Only a build of the same input and flags may go on with what is there; the folder `build` is removed at the end.
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

from llama_ds.data.building.whole_file import TEMPORARY, writing
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
    write_whole,
)
from llama_ds.errors import UserError
from llama_ds.log import logger

APPENDS_TO = "appends to"  # key of the fingerprint: the checksum of the manifest that an addition starts from
OURS = re.compile(rf"({'|'.join(SPLITS)})-(\d+)\.(tar|documents\.gz|sha256)")


def build_path(folder: str) -> str:
    """Return the folder of unfinished work of a source."""
    return os.path.join(folder, "build")


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Create the folder and hold its lock, which the system releases however the process ends.

    Raises:
        UserError: another build holds it, or the folder cannot be made.
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
                f"{folder}: another build of this source is running; wait for it, or end it first"
            ) from None
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s): start no second build here", folder, error.strerror)
            return file
        with suppress(FileNotFoundError):  # the holder before us removed it after we had opened it
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


def fingerprint(files: Sequence[str], flags: Mapping[str, object]) -> dict[str, object]:
    """Return what decides the bytes of a build: the flags, and the names, sizes and times of the files."""
    listed, size = hashlib.sha256(), 0
    for path in files:
        status = os.stat(path)
        size += status.st_size
        listed.update(json.dumps([path, status.st_size, status.st_mtime_ns]).encode())
    return {**flags, "input": f"{len(files)} files, {size} bytes, {listed.hexdigest()[:16]}"}


def finished(folder: str) -> bytes | None:
    """Return the manifest of a finished source, None where there is none."""
    try:
        with open(os.path.join(folder, MANIFEST), "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def put_in_place(folder: str, mark: Mapping[str, object]) -> Manifest | None:
    """Finish a build that was killed in its very last step; return its manifest if that was the build of `mark`."""
    build = build_path(folder)
    try:
        with open(os.path.join(build, MANIFEST), "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return None
    plan = _read_plan(build) or {}
    write_whole(os.path.join(folder, MANIFEST), content)
    _remove_build(folder)
    same = {**plan, APPENDS_TO: ""} == {**mark, APPENDS_TO: ""}
    return parse_manifest(content, build) if same else None


def begin(folder: str, mark: Mapping[str, object], base: Manifest | None, overwrite: bool) -> None:
    """Make the folder ready for a build with the fingerprint `mark`, new or gone on with.

    Raises:
        UserError: it holds the unfinished build of another fingerprint, and `overwrite` is false.
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
        start_anew = (
            f"delete {build} to give that addition up" if plan.get(APPENDS_TO) else "start anew with --overwrite"
        )
        raise UserError(
            f"{folder}: holds an unfinished build of other input or flags ({changes}); "
            f"finish that one with its own command, or {start_anew}"
        )
    remove_temporary(folder)
    if plan is None:
        _remove_strays(folder, base)
        os.makedirs(build, exist_ok=True)
        os.makedirs(os.path.join(folder, "index"), exist_ok=True)
        with writing(os.path.join(build, "plan.json")) as file:
            file.write(json.dumps(dict(mark), indent=1).encode())


def commit(folder: str, manifest: Manifest, base: Manifest | None, sha256: Mapping[str, list[str]]) -> None:
    """Write the checksums and the manifest of a build whose shards are done, and remove its unfinished work.

    `sha256` are the checksums of each split's shards that are new in this build.

    Raises:
        UserError: the checksums of the shards that were there cannot be read.
    """
    for split, new in sha256.items():
        old = _checksums(folder, split, base.splits[split].shards) if base else []
        for name, content in checksum_blocks(split, [*old, *new]):
            if _read(os.path.join(folder, name)) != content.encode():
                with writing(os.path.join(folder, name), len(content)) as file:
                    file.write(content.encode())
    whole = json.dumps(asdict(manifest), indent=1).encode()
    with writing(os.path.join(build_path(folder), MANIFEST), len(whole)) as file:
        file.write(whole)
    write_whole(os.path.join(folder, MANIFEST), whole)
    _remove_build(folder)


def give_up(folder: str) -> None:
    """Remove the unfinished work of a build that could never be finished."""
    _remove_build(folder)


def _checksums(folder: str, split: str, shards: int) -> list[str]:
    found: list[str] = []
    content = b""
    for shard in range(shards):
        if shard % CHECKSUM_BLOCK == 0:
            content = _read(os.path.join(folder, checksums_name(split, shard)))
        digest = checksum_of(content, split, shard)
        if digest is None:
            place = os.path.join(folder, checksums_name(split, shard))
            raise UserError(f"{place}: no checksum of {shard_name(split, shard)}; restore the file, or {REBUILD}")
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
    # In one step: a folder half removed would look like another, unfinished build.
    build, removed = build_path(folder), os.path.join(folder, "build.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if os.path.exists(build):
        os.rename(build, removed)
        shutil.rmtree(removed)


def remove_temporary(folder: str) -> None:
    """Remove what killed processes had begun to write; none may run."""
    shutil.rmtree(os.path.join(folder, "build.removed"), ignore_errors=True)
    for place in (folder, build_path(folder), os.path.join(folder, "index")):
        for name in os.listdir(place) if os.path.isdir(place) else ():
            if TEMPORARY in name:
                os.remove(os.path.join(place, name))


def _remove_strays(folder: str, base: Manifest | None) -> None:
    # Shards of an older or given-up build: they are in no manifest, and would be taken for shards of this one.
    for place in (folder, os.path.join(folder, "index")):
        for name in os.listdir(place) if os.path.isdir(place) else ():
            if (match := OURS.fullmatch(name)) and _is_stray(name, match, base):
                os.remove(os.path.join(place, name))


def _is_stray(name: str, match: re.Match[str], base: Manifest | None) -> bool:
    split, number, kind = match[1], int(match[2]), match[3]
    shards = base.splits[split].shards if base else 0
    if kind == "sha256":
        return number * CHECKSUM_BLOCK >= shards
    return number >= shards or (kind == "tar" and name != shard_name(split, number))
