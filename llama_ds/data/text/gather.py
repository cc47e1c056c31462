"""A real corpus without a download: Python code and prose from the standard library and site-packages."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator

from llama_ds.atomic_files import atomic_file

MIN_BYTES = 200  # shorter texts are useless for training
MAX_BYTES = 400_000  # longer files are generated tables
CODE_SHARE = 0.75  # fraction of code in the corpus
DOCSTRING_MODULES = 3  # every third module contributes its docstrings to prose instead of its code: no text is in both
PROSE_SUFFIXES = (".md", ".rst", ".txt")
NOT_PROSE = re.compile(r"(^|/)(tests?|testdata|lib2to3)/|(SOURCES|top_level|requires|entry_points|CMakeLists)\.txt$")
DOCSTRING = re.compile(r'^[ \t]*[rR]?"""(.+?)"""', re.MULTILINE | re.DOTALL)


def gather_local_corpus(
    out_dir: str, limit_mb: float = 32.0, progress: Callable[[int], None] = lambda size: None
) -> dict[str, str]:
    """Write out_dir/code.jsonl and out_dir/prose.jsonl, together about `limit_mb` of text.

    Every line is {"text", "path"}. Files are taken in the order of the hash of their path, so a small corpus is an
    unbiased sample, and the result is reproducible on the same machine. Duplicate, tiny, huge and undecodable files are
    left out. `progress` is called with the size in bytes of each text taken.

    Returns:
        The path of each source's file.
    """
    os.makedirs(out_dir, exist_ok=True)
    files = sorted(_files(), key=lambda file: hashlib.sha256(file[0].encode()).digest())
    modules = [file for file in files if file[0].endswith(".py")]
    code = (text for i, text in _read_numbered(modules) if i % DOCSTRING_MODULES)
    sources = {"code": (code, CODE_SHARE), "prose": (_prose(files, modules), 1 - CODE_SHARE)}
    return {
        name: _write(os.path.join(out_dir, f"{name}.jsonl"), texts, share * limit_mb * 1e6, progress)
        for name, (texts, share) in sources.items()
    }


def _files() -> Iterator[tuple[str, str]]:
    # (name, path); the name does not depend on where Python is installed.
    for kind in ("stdlib", "purelib"):
        root = sysconfig.get_paths()[kind]
        for folder, subfolders, names in os.walk(root):
            skipped = {"__pycache__"} if kind == "purelib" else {"__pycache__", "site-packages", "dist-packages"}
            subfolders[:] = [name for name in subfolders if name not in skipped]
            for name in names:
                path = os.path.join(folder, name)
                yield f"{kind}/{os.path.relpath(path, root)}", path


def _read_numbered(files: list[tuple[str, str]]) -> Iterator[tuple[int, tuple[str, str]]]:
    for i, (name, path) in enumerate(files):
        if (text := _read(path)) is not None:
            yield i, (name, text)


def _prose(files: list[tuple[str, str]], modules: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for name, path in files:
        if name.endswith(PROSE_SUFFIXES) and not NOT_PROSE.search(name) and (text := _read(path)) is not None:
            yield name, text
        elif os.path.basename(name) == "METADATA" and (text := _read(path)) is not None:
            yield name, text.partition("\n\n")[2]  # the long description without the headers
    for i, (name, text) in _read_numbered(modules):
        if i % DOCSTRING_MODULES == 0:
            yield f"{name}:docstrings", "\n\n".join(inspect.cleandoc(doc) for doc in DOCSTRING.findall(text)) + "\n"


def _read(path: str) -> str | None:
    try:
        if not MIN_BYTES <= os.path.getsize(path) <= MAX_BYTES:
            return None
        with open(path, "rb") as file:
            data = file.read()
        return None if b"\0" in data else data.decode()
    except (OSError, UnicodeDecodeError):
        return None  # unreadable files are skipped silently, because they are not the user's


def _write(path: str, texts: Iterator[tuple[str, str]], limit: float, progress: Callable[[int], None]) -> str:
    seen: set[bytes] = set()
    written = 0
    with atomic_file(path) as file:
        for name, text in texts:
            data = text.encode()
            digest = hashlib.sha256(data).digest()
            if len(data) < MIN_BYTES or digest in seen:
                continue
            seen.add(digest)
            file.write(json.dumps({"text": text, "path": name}, ensure_ascii=False).encode() + b"\n")
            progress(len(data))
            written += len(data)
            if written >= limit:
                break
    return path
