"""Files that are the same file under several names, whose documents would be read twice: links, compressed copies."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

from llama_ds.data.text import decompress
from llama_ds.data.text.formats import FileFormat
from llama_ds.data.text.input_storage import open_input


def links(paths: Sequence[str]) -> set[str]:
    """Return the links, also hard ones, to files that are in `paths` under another name."""
    targets: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for path in paths:
        status = os.stat(path)
        key = (status.st_dev, status.st_ino, status.st_size) if status.st_ino else (os.path.realpath(path),)
        targets[key].append(path)
    kept = {min(same, key=os.path.islink) for same in targets.values()}
    return set(paths) - kept


def compressed_copies(files: Iterable[tuple[str, FileFormat]]) -> set[str]:
    """Return the files that hold the same bytes as one of `files` of the same name without the suffix of a compression.

    Such pairs are what `gzip -k` and `zstd` leave. Their contents are compared.
    """
    named: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, form in files:
        bare = decompress.without_compression(path) if form.compression else path
        named[bare].append((path, form.compression))
    found: set[str] = set()
    for first, *others in (sorted(same, key=lambda file: len(file[0])) for same in named.values()):
        found |= {path for path, compression in others if _equal(first, (path, compression))}
    return found


def _equal(one: tuple[str, str], other: tuple[str, str]) -> bool:
    return all(a == b for a, b in zip_longest(_blocks(*one), _blocks(*other)))


def _blocks(path: str, compression: str, size: int = 1 << 20) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file in blocks of `size`."""
    rest = b""
    with open_input(path) as file:
        for chunk in decompress.decompressed(file, compression, path):
            rest += chunk
            while len(rest) >= size:
                yield rest[:size]
                rest = rest[size:]
    yield rest
