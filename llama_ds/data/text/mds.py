"""Datasets of mosaicml-streaming: shards of samples in the MDS format, and the index.json that lists them.

    shard     number of samples (u32), offsets of the samples and of their end (u32), configuration (JSON), samples
    sample    size of each value whose column has no fixed size (u32), then the values in the order of the columns

All numbers are little-endian. A shard may be compressed as a whole. index.json holds the sizes of the files and, if the
writer was told to compute them, hashes. Source: mosaicml/streaming, streaming/base/format.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from typing import Any

from llama_ds.data.text.decompress import damaged, decompressed
from llama_ds.data.text.input_storage import open_input
from llama_ds.data.text.json_values import field_of, parse
from llama_ds.errors import UserError
from llama_ds.log import logger

KIND = "MDS"
INDEX = "index.json"
METADATA = "index of a streaming dataset"
BATCH_SAMPLES = 256
_SUFFIX = ".mds"
_TEXTS = ("str", "bytes", "json")  # encodings that may hold a text


def begins_as_shard(head: bytes) -> bool:
    """Whether the first bytes of a file, or the whole file, are those of a shard."""
    if len(head) < 8:
        return False
    samples, first = struct.unpack_from("<II", head)
    config = 4 + 4 * (samples + 1)
    return first > config and (config >= len(head) or head[config : config + 1] == b"{")


def is_index(path: str) -> bool:
    """Whether a file is the index of a streaming dataset."""
    return os.path.basename(path) == INDEX and _shards(path) is not None


def check(folder: str, names: Sequence[str]) -> dict[str, str]:
    """Return the files among `names` that hold no samples of a streaming dataset, with the reason to leave them out.

    Raises:
        UserError: a file that the index lists is missing or has another size, or the index is damaged.
    """
    path = os.path.join(folder, INDEX)
    shards = _shards(path) if INDEX in names else None
    present = [name for name in names if name.endswith(_SUFFIX) or f"{_SUFFIX}." in name]
    if shards is None:
        if INDEX in names and present:
            raise damaged(path, "JSON", f"it lists no shards, but {present[0]} lies beside it")
        return {}
    left_out = {INDEX: METADATA}
    listed: set[str] = set()
    for shard in shards:
        files = [info["basename"] for info in _files(shard)]
        listed.update(files)
        found = [info for info in _files(shard) if os.path.exists(os.path.join(folder, info["basename"]))]
        if not found:
            raise UserError(
                f"{os.path.join(folder, files[-1])}: missing, though {INDEX} lists it; copy the dataset again"
            )
        for info in found:
            size = os.path.getsize(os.path.join(folder, info["basename"]))
            if size != info["bytes"]:
                raise damaged(
                    os.path.join(folder, info["basename"]), KIND, f"{size} bytes, not the {info['bytes']} of {INDEX}"
                )
        left_out.update({info["basename"]: "compressed copy of a file that is read" for info in found[1:]})
        below = os.path.dirname(files[0])  # in an index of merged datasets, each of which has its own beside the files
        if below and len(found) > 1 and not os.path.exists(os.path.join(folder, below, INDEX)):
            raise UserError(
                f"{os.path.join(folder, files[0])}: lies there as {files[1]} too; delete one, or they are read twice"
            )
    _warn_of_unchecked(path, shards)
    return {**left_out, **{name: f"not listed in {INDEX}" for name in present if name not in listed}}


def mds_values(path: str, compression: str, column: str) -> Iterator[tuple[list[Any], float]]:
    """Yield values of a column in batches, bytes where it holds strings, with the fraction of the samples read so far.

    Column a.b is column "a.b", or field b of the JSON values in column a. The hashes that an index.json beside the
    shard holds are compared at the end.

    Raises:
        UserError: the shard is damaged or cut short, is not what its index says, or has no such column of texts.
    """
    info = _listed(path)
    with open_input(path) as file:
        stream = _Stream(decompressed(file, compression, path), path, _checked_hash(info))
        (samples,) = struct.unpack("<I", stream.read(4))
        offsets = struct.unpack(f"<{samples + 1}I", stream.read(4 * (samples + 1)))
        if offsets[0] <= stream.read_bytes or any(a > b for a, b in pairwise(offsets)):
            raise damaged(path, KIND, "its offsets do not ascend")
        value_of = _Columns(path, stream.read(offsets[0] - stream.read_bytes)).getter(column)
        batch = []
        for number, (start, end) in enumerate(pairwise(offsets), 1):
            batch.append(value_of(stream.read(end - start), number))
            if len(batch) == BATCH_SAMPLES:
                yield batch, number / samples
                batch = []
        stream.end(info)
        yield batch, 1.0


class _Stream:
    """Reads a shard from its start to its end, and hashes what it reads."""

    def __init__(self, chunks: Iterator[bytes], path: str, hash_name: str) -> None:
        self._chunks, self._path = chunks, path
        self._rest = memoryview(b"")
        self.read_bytes = 0
        self._hash_name = hash_name
        self._hash = _hash(hash_name) if hash_name else None

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes. Raises UserError: the shard ends before."""
        parts: list[memoryview] = []
        wanted = size
        while wanted:
            if not self._rest:
                chunk = next(self._chunks, b"")
                if not chunk:
                    raise damaged(self._path, KIND, f"cut short at {self.read_bytes + size - wanted} bytes")
                self._rest = memoryview(chunk)
            part = self._rest[:wanted]
            parts.append(part)
            self._rest = self._rest[len(part) :]
            wanted -= len(part)
        data = b"".join(parts)
        if self._hash:
            self._hash.update(data)
        self.read_bytes += size
        return data

    def end(self, info: dict[str, Any]) -> None:
        """Check that the shard ends here, and compare its hash with that of the index."""
        if len(self._rest) or next(self._chunks, b""):
            raise damaged(self._path, KIND, f"it goes on after its last sample, at {self.read_bytes} bytes")
        if self._hash and self._hash.hexdigest() != info["hashes"][self._hash_name]:
            raise damaged(self._path, KIND, f"its {self._hash_name} is not that of {INDEX}")


class _Columns:
    """The columns of a shard, from its configuration."""

    def __init__(self, path: str, config: bytes) -> None:
        self._path = path
        try:
            found = json.loads(config)
            if found["format"] != "mds" or found["version"] != 2:
                raise ValueError
            self._encodings = dict(zip(found["column_names"], found["column_encodings"], strict=True))
            self._sizes = [size or None for size in found["column_sizes"]]
            if len(self._sizes) != len(self._encodings) or not all(size is None or size > 0 for size in self._sizes):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise damaged(path, KIND, "its configuration is not that of version 2") from None

    def getter(self, column: str) -> Callable[[bytes, int], Any]:
        """Return the function of (sample, number) to the value of a column. Raises UserError: no such texts."""
        name, field = self._find(column)
        index = list(self._encodings).index(name)
        of_json = self._encodings[name] == "json"
        free = [i for i, size in enumerate(self._sizes) if size is None]
        head = struct.Struct(f"<{len(free)}I")

        def value(sample: bytes, number: int) -> Any:
            sizes = list(self._sizes)
            if len(sample) >= head.size:
                for i, size in zip(free, head.unpack_from(sample), strict=True):
                    sizes[i] = size
            if None in sizes or head.size + sum(sizes) != len(sample):  # type: ignore[arg-type]
                raise damaged(self._path, KIND, f"sample {number} has another size than its values")
            start = head.size + sum(sizes[:index])  # type: ignore[arg-type]
            data = sample[start : start + sizes[index]]  # type: ignore[operator]
            return _json_text(data, field) if of_json else data

        return value

    def _find(self, column: str) -> tuple[str, str]:
        """Return the column, and the field of its JSON values or ""."""
        for name in (column, *(column[:i] for i, char in enumerate(column) if char == ".")):
            encoding = self._encodings.get(name)
            if encoding in _TEXTS and (name == column or encoding == "json"):
                return name, column[len(name) + 1 :]
        columns = ", ".join(f"{name} ({encoding})" for name, encoding in self._encodings.items())
        texts = [name for name, encoding in self._encodings.items() if encoding in _TEXTS]
        advice = f"name one with --text-field: {', '.join(texts)}" if texts else "none of them holds texts"
        raise UserError(f'{self._path}: no column "{column}" of texts, only {columns}; {advice}')


def _json_text(data: bytes, field: str) -> Any:
    try:
        found = parse(data.decode())
    except UnicodeDecodeError:
        return data  # the reader reports that it is not UTF-8
    except ValueError:
        return None
    found = field_of(found, field) if field else found
    return found.encode("utf-8", "surrogatepass") if isinstance(found, str) else None


def _shards(path: str) -> list[dict[str, Any]] | None:
    """Return the shards that an index lists, None if the file is no index of a streaming dataset."""
    try:
        with open(path, encoding="utf-8") as file:
            shards = json.load(file)["shards"]
        if all(_is_file_info(shard.get("raw_data")) for shard in shards):
            return list(shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None


def _is_file_info(found: object) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("hashes") or {}, dict):
        return False
    return isinstance(found.get("basename"), str) and isinstance(found.get("bytes"), int)


def _files(shard: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the index says of a shard's files: uncompressed, and compressed if there is one."""
    zipped = shard.get("zip_data")
    return [shard["raw_data"], *([zipped] if _is_file_info(zipped) else [])]


def _listed(path: str) -> dict[str, Any]:
    """Return what an index says of the uncompressed shard at `path`; {} if no index lists it."""
    folder, name = os.path.split(os.path.abspath(path))
    above, subfolder = os.path.split(folder)
    for where, wanted in ((folder, name), (above, os.path.join(subfolder, name))):  # an index of merged datasets
        with suppress(FileNotFoundError):
            index = os.path.join(where, INDEX)
            if wanted in (listed := _by_name(index, os.stat(index).st_mtime_ns)):
                return listed[wanted]
    return {}


@lru_cache(2)  # a shard is one of many of its index
def _by_name(index: str, _mtime: int) -> dict[str, dict[str, Any]]:
    return {info["basename"]: shard["raw_data"] for shard in _shards(index) or () for info in _files(shard)}


def _checked_hash(info: dict[str, Any]) -> str:
    """Return the name of a hash in the index that can be computed here, or ""."""
    hashes = info.get("hashes") or {}
    return next((name for name in hashes if _hash(name) is not None), "")


def _hash(name: str) -> Any:
    """Return a new hash object, None if the algorithm is not known here."""
    if name in hashlib.algorithms_available and not name.startswith("shake"):
        return hashlib.new(name, usedforsecurity=False)
    with suppress(ImportError, AttributeError):
        import xxhash

        return getattr(xxhash, name)()
    return None


def _warn_of_unchecked(path: str, shards: Sequence[dict[str, Any]]) -> None:
    hashes = {name for shard in shards for name in shard["raw_data"].get("hashes") or ()}
    if hashes and not any(_hash(name) for name in hashes):
        names = ", ".join(sorted(hashes))
        logger.warning("%s: its hashes are not checked (%s); pip install xxhash to check them", path, names)
