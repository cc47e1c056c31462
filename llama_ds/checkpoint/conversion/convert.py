"""Execution of a conversion plan: files are written in parallel, tensors in chunks, and the result is verified.

Memory: CHUNK_BYTES for each worker, plus blocks of rows (`spread.BLOCK_ELEMENTS`) where source and result are sharded
along different dimensions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from llama_ds.checkpoint.carried import carried_files, check_carried
from llama_ds.checkpoint.conversion.digest import surely_finite
from llama_ds.checkpoint.conversion.partial import Partial, cannot_write, written_by_conversion
from llama_ds.checkpoint.formats.folded import folded
from llama_ds.checkpoint.formats.huggingface import HfTokenizer, plan_huggingface
from llama_ds.checkpoint.formats.layer_files import plan_layer_files, write_index
from llama_ds.checkpoint.formats.megatron_deepspeed_writing import plan_megatron_deepspeed
from llama_ds.checkpoint.formats.megatron_writing import plan_megatron, plan_megatron_legacy
from llama_ds.checkpoint.formats.meta import plan_meta
from llama_ds.checkpoint.formats.neox_writing import plan_neox
from llama_ds.checkpoint.formats.plan import OutputFile, OutputTensor, Plan, Target
from llama_ds.checkpoint.formats.torchtitan_writing import plan_torchtitan
from llama_ds.checkpoint.manifest import DESCRIPTION, INDEX, checksum, describe, verify
from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.errors import UserError

CHUNK_BYTES = 1 << 20  # fits in the CPU cache: larger chunks are copied at half the speed
WORKERS = 4  # default upper bound; preads, pwrites and casts overlap

PLANS: dict[str, Callable[[ModelFiles, Target], Plan]] = {
    "deepspeed": plan_layer_files,
    "meta": plan_meta,
    "megatron": plan_megatron,
    "megatron_legacy": plan_megatron_legacy,
    "megatron_deepspeed": plan_megatron_deepspeed,
    "neox": plan_neox,
    "torchtitan": plan_torchtitan,
}

T = TypeVar("T")
Progress = Callable[[str, int, int], None]  # (phase, bytes done, total bytes)


@dataclass(frozen=True)
class Options:
    """How a conversion is executed, independent of its result."""

    overwrite: bool = False
    allow_nonfinite: bool = False  # copy NaN and infinities instead of refusing them
    workers: int = min(WORKERS, max(2, os.cpu_count() or 1))


class Counter:
    """Counts bytes for a progress bar, and stops the other workers when one of them has failed."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self.stop = threading.Event()
        self._progress, self._what, self._total = progress, what, total
        self._lock = threading.Lock()
        self._done = 0

    def add(self, count: int) -> None:
        """Count bytes done.

        Raises:
            Stopped: another worker has failed.
        """
        if self.stop.is_set():
            raise Stopped
        with self._lock:
            self._done += count
            self._progress(self._what, self._done, self._total)


class Stopped(Exception):
    """Raised in a worker when another worker has failed."""


def run_all(jobs: Iterable[Callable[[], None]], workers: int, counter: Counter) -> None:
    """Run jobs in threads; the first failure stops all of them and is raised."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            counter.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def convert(
    files: ModelFiles,
    plan: Plan,
    destination: str,
    options: Options,
    prove: Callable[[str], T],
    progress: Progress = lambda what, done, total: None,
) -> T:
    """Write the files of `plan` to `destination`, completely or not at all, and return the result of `prove`.

    A conversion that was killed resumes with its unfinished files. `prove` receives the folder before it is renamed to
    `destination`, and raises if the result differs from the source.

    Raises:
        UserError: a damaged source, a destination that exists or cannot be written, a failed verification.
    """
    _check_apart(files, plan, destination)
    check_carried(plan.copied)
    with Partial(destination, fingerprint(files, plan, destination), options.overwrite) as work:
        _check_source(files, options, progress)
        _write_all(plan, work, options, progress)
        try:
            found = prove(work.folder)
        except UserError:
            work.spoil()
            raise
        work.commit(plan.files[0].name if plan.single else None)
    return found


def plan_of(files: ModelFiles, kind: str, target: Target, tokenizer: HfTokenizer | None = None) -> Plan:
    """Return the plan of a conversion to `kind`. `tokenizer`, from the source's sentencepiece model, is for hf only.

    Raises:
        UserError: the model cannot be written in that format.
    """
    if kind != "deepspeed":
        files = folded(files)
    if kind == "hf":
        return plan_huggingface(files, target, tokenizer)
    return PLANS[kind](files, target)


def fingerprint(files: ModelFiles, plan: Plan, destination: str) -> str:
    """Return a hash of the source files (path, size, mtime) and the planned outputs, without the tensor data."""
    states = [(path, os.stat(path)) for path in _source_files(files.path, destination) if os.path.isfile(path)]
    source = [(path, state.st_size, state.st_mtime_ns) for path, state in states]
    outputs = [
        (
            file.name,
            file.surroundings(),
            [(t.name, t.shape, t.rank, t.size, str(t.encoding)) for t in file.tensors],
        )
        for file in plan.files
    ]
    small = {name: hashlib.sha256(content).hexdigest() for name, content in plan.small.items()}
    identity = [os.path.realpath(files.path), source, plan.kind, str(plan.dtype), outputs, small]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _source_files(folder: str, destination: str) -> list[str]:
    """Return the paths in a source's folder, without what the conversion itself writes there."""
    own, found = written_by_conversion(destination), []
    for parent, folders, names in os.walk(os.path.realpath(folder)):
        folders[:] = [name for name in folders if not own(os.path.join(parent, name))]
        found += [path for name in names if not own(path := os.path.join(parent, name))]
    return sorted(found)


def _check_apart(files: ModelFiles, plan: Plan, destination: str) -> None:
    """Refuse a destination that contains the source or is a file in it, because replacing it would delete that."""
    source, outer = os.path.realpath(files.path), os.path.realpath(destination)
    used = [path for tensor in files.tensors.values() for path in tensor.paths]
    for path in {files.path, *used, *plan.copied.values()}:
        if os.path.commonpath([os.path.realpath(path), outer]) == outer:
            raise UserError(f"{destination}: holds the source {path}; give another folder")
    if os.path.isfile(destination) and not plan.single and os.path.commonpath([source, outer]) == source:
        raise UserError(f"{destination}: is a file of the source {files.path}; give another folder")


def _check_source(files: ModelFiles, options: Options, progress: Progress) -> None:
    """Verify the checksums of tokenizer and weights. Only checkpoints of this project record them."""
    if not os.path.exists(os.path.join(files.path, DESCRIPTION)):
        return
    description = describe(files.path)
    carried = [name for name in carried_files(files.path) if name in description.files]
    verify(files.path, description, [INDEX, *carried])
    paths = {path for tensor in files.tensors.values() for path in tensor.paths}
    names = sorted(os.path.relpath(path, files.path) for path in paths)
    counter = Counter(progress, "check", sum(description.files[name].size for name in names))

    def check(name: str) -> None:
        verify(files.path, description, [name])
        counter.add(description.files[name].size)

    run_all((partial(check, name) for name in names), options.workers, counter)


def _write_all(plan: Plan, work: Partial, options: Options, progress: Progress) -> None:
    left = [file for file in plan.files if file.name not in work.finished]
    remaining = sum(file.nbytes(plan.dtype) for file in left)
    counter = Counter(progress, "convert", plan.nbytes)
    counter.add(plan.nbytes - remaining)
    try:
        free = shutil.disk_usage(work.folder).free
        if free < remaining:
            raise UserError(
                f"{work.folder}: needs {remaining / 1e9:.2f} GB more and the disk has {free / 1e9:.2f} GB left; "
                "free space, or give another destination"
            )
        _write_small(plan, work)
        run_all((partial(_write_file, file, plan, work, counter) for file in left), options.workers, counter)
        if plan.finish is not None:
            plan.finish(work.folder)
        if plan.description is not None:
            write_index(work.folder, plan, work.finished)
    except (OSError, RuntimeError) as error:
        raise cannot_write(work.folder, error) from None


def _write_small(plan: Plan, work: Partial) -> None:
    contents = {name: lambda p=path: Path(p).read_bytes() for name, path in plan.copied.items()}
    contents |= {name: lambda c=content: c for name, content in plan.small.items()}
    for name, content_of in contents.items():
        if name in work.finished:
            continue
        os.makedirs(os.path.dirname(os.path.join(work.folder, name)), exist_ok=True)
        with open(os.path.join(work.folder, name), "wb") as file:
            file.write(content_of())
            file.flush()
            os.fsync(file.fileno())
        work.finish(name)


def _write_file(file: OutputFile, plan: Plan, work: Partial, counter: Counter) -> None:
    path = os.path.join(work.folder, file.name)
    if os.path.lexists(path):
        os.unlink(path)  # a conversion that was killed left it unfinished
    stored = file.create(work.folder, plan.dtype)
    memory = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    output = os.open(path, os.O_WRONLY)
    try:
        for tensor in file.tensors:
            encoding = tensor.stored_as(plan.dtype)
            buffer = memory.view(encoding.dtype)
            for start in range(0, tensor.numel, len(buffer)):
                part = buffer[: min(len(buffer), tensor.numel - start)]
                tensor.source.read(part, tensor.rank, tensor.size, start)
                _check_range(tensor, part, start)
                encoded = encoding.encode(part)
                _write_at(output, encoded, stored[tensor.name].offset + encoding.nbytes(start))
                counter.add(encoded.nbytes)
        os.fsync(output)
    finally:
        os.close(output)
    work.finish(file.name, checksum(path) if plan.description else "")


def _write_at(output: int, part: Tensor, position: int) -> None:
    begin, left = position, part.view(torch.uint8).numpy().data
    while left:
        count = os.pwrite(output, left, position)
        left, position = left[count:], position + count
    # DONTNEED makes Linux start writeback now; otherwise the final fsync would wait for all of it.
    os.posix_fadvise(output, begin, part.nbytes, os.POSIX_FADV_DONTNEED)


def _check_range(tensor: OutputTensor, part: Tensor, start: int) -> None:
    """Refuse a value beyond the range of a narrower dtype, which would become infinity."""
    stored = tensor.source.dtype
    if torch.finfo(part.dtype).max >= torch.finfo(stored).max or surely_finite(part):
        return
    original = torch.empty(part.shape, dtype=stored)
    tensor.source.read(original, tensor.rank, tensor.size, start)
    if (original.isfinite() & ~part.isfinite()).any():
        name, wider = str(part.dtype).removeprefix("torch."), "bf16" if part.dtype == torch.float16 else "fp32"
        raise UserError(
            f"{tensor.name}: holds numbers above {torch.finfo(part.dtype).max:.6g}, the largest of {name}; "
            f"convert with --dtype {wider}"
        )
