"""Which folders hold a source, finished or in progress: their files are no input of another build."""

from __future__ import annotations

import json
import os

MANIFEST = "manifest.json"
BUILD = "build"  # folder of the unfinished work of a source
PLAN = "plan.json"  # file in it, present until the build is complete


def is_source_folder(folder: str) -> bool:
    """Return whether a build has made or begun a source in a folder on disk."""
    if os.path.isfile(os.path.join(folder, BUILD, PLAN)):
        return True
    try:
        with open(os.path.join(folder, MANIFEST), "rb") as file:
            manifest = json.load(file)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"source", "splits", "tokenizer_sha256"} <= manifest.keys()
