"""Signatures of flash_attn's functions that the model calls, by version; `flash_attn_signatures.json` holds them.

To refresh, download a version without building it, and name the archives:

    FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE pip download --no-deps --no-build-isolation flash-attn==2.8.3
    pip download --no-deps flash-attn-4==4.0.0b36
    python -m tests.model.flash_attn_signatures flash_attn-2.8.3.tar.gz flash_attn_4-4.0.0b36-py3-none-any.whl
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path

STORED = Path(__file__).with_suffix(".json")
# Package: the module whose functions are called, and these.
CALLED = {
    "2": (
        "flash_attn/flash_attn_interface.py",
        {
            "flash_attn_func",
            "flash_attn_varlen_func",
            "_flash_attn_forward",
            "_flash_attn_varlen_forward",
            "_flash_attn_backward",
            "_flash_attn_varlen_backward",
        },
    ),
    "4": (
        "flash_attn/cute/interface.py",
        {"flash_attn_func", "flash_attn_varlen_func", "_flash_attn_fwd", "_flash_attn_bwd"},
    ),
}

Parameters = list[list[str]]  # (name, kind of inspect.Parameter, "" or "default")


def stored() -> dict[str, dict[str, Parameters]]:
    """Return the signatures by version and function."""
    found: dict[str, dict[str, Parameters]] = json.loads(STORED.read_text())
    return found


def signature(parameters: Parameters) -> inspect.Signature:
    """Return a stored signature as an object that arguments can be bound to."""
    kinds = {kind.name: kind for kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)}
    return inspect.Signature(
        [
            inspect.Parameter(name, kinds[kind], default=None if default else inspect.Parameter.empty)
            for name, kind, default in parameters
        ]
    )


def read(archive: Path) -> tuple[str, dict[str, Parameters]]:
    """Return (version, signatures) of a wheel or source distribution."""
    match = re.search(r"-(\d+\.[^-]+?)(?:-py3.*\.whl|\.tar\.gz)$", archive.name)
    assert match, f"{archive}: neither a wheel nor a source distribution"
    version = match[1]
    path, names = CALLED[version[0]]
    found = {
        node.name: _parameters(node.args)
        for node in ast.parse(_text(archive, path)).body
        if isinstance(node, ast.FunctionDef) and node.name in names
    }
    assert found.keys() == names, f"{archive}: {path} lacks {names - found.keys()}"
    return version, found


def _parameters(args: ast.arguments) -> Parameters:
    assert not (args.posonlyargs or args.vararg or args.kwarg)
    required = len(args.args) - len(args.defaults)
    return [
        *([a.arg, "POSITIONAL_OR_KEYWORD", "" if i < required else "default"] for i, a in enumerate(args.args)),
        *(
            [a.arg, "KEYWORD_ONLY", "default" if d else ""]
            for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)
        ),
    ]


def _text(archive: Path, path: str) -> str:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(path).decode()
    with tarfile.open(archive) as source:
        name = next(name for name in source.getnames() if name.endswith("/" + path))
        file = source.extractfile(name)
        assert file
        return file.read().decode()


if __name__ == "__main__":
    versions = stored() if STORED.exists() else {}
    versions.update(read(Path(name)) for name in sys.argv[1:])
    lines = ",\n".join(
        f"  {json.dumps(version)}: {{\n"
        + ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(parameters)}" for name, parameters in sorted(functions.items())
        )
        + "\n  }"
        for version, functions in sorted(versions.items())
    )
    STORED.write_text("{\n" + lines + "\n}\n")
