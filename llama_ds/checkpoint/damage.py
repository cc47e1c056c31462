"""Damaged files of a checkpoint: each with its problem, and whether a resume reads it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

from llama_ds.checkpoint.manifest import DESCRIPTION, INDEX, Description, check_present, read_tensors, verify
from llama_ds.errors import UserError


def missing_files(folder: str, found: Description) -> dict[str, str]:
    """Return the problem of each file that is missing or not of its full size."""
    problems = {}
    for name, entry in found.files.items():
        try:
            check_present(folder, replace(found, files={name: entry}))
        except UserError as error:
            problems[name] = str(error)
    return problems


def damaged_files(folder: str, found: Description, names: Iterable[str]) -> dict[str, str]:
    """Return the problem of each of the files `names` that cannot be read or has another checksum."""
    problems = {}
    for name in names:
        try:
            verify(folder, found, [name])
        except UserError as error:
            problems[name] = str(error)
    return problems


def needed_to_resume(folder: str, found: Description) -> set[str]:
    """Return the names of the files that a resume reads: description, index, and those with states of the optimizer.

    It does not read the copies of weights for forward and backward, which are the rounded masters, and the tokenizer.

    Raises:
        UserError: the index is damaged.
    """
    kinds = read_tensors(folder, found, found.states.all_kinds())
    paths = {path for weights in kinds.values() for tensor in weights.values() for path in tensor.paths}
    return {DESCRIPTION, INDEX, *(os.path.relpath(path, folder) for path in paths)}
