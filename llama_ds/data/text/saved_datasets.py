"""Datasets as Hugging Face's save_to_disk leaves them: Arrow streams, and JSON files that list and describe them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from llama_ds.errors import UserError

STATE, SPLITS = "state.json", "dataset_dict.json"
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
FILES = (STATE, SPLITS, *DESCRIPTIONS)
METADATA = "metadata of a saved dataset"


def check(folder: str, names: Sequence[str]) -> dict[str, str]:
    """Return the files among `names` that hold no rows of a saved dataset, with the reason to leave them out.

    Raises:
        UserError: the dataset is incomplete, or the folder holds several splits.
    """
    if SPLITS in names:
        splits = _names(os.path.join(folder, SPLITS), _read(os.path.join(folder, SPLITS)).get("splits", []))
        if len(splits) != 1:
            raise UserError(
                f"{folder}: a saved dataset of the splits {', '.join(splits)}, which a source must not mix; name one, "
                f"such as {os.path.join(folder, splits[0] if splits else 'train')}"
            )
        return {SPLITS: METADATA}
    described = {name: METADATA for name in DESCRIPTIONS if name in names}
    state = _read(os.path.join(folder, STATE)) if STATE in names else {}
    if "_data_files" not in state:
        return described
    listed = state["_data_files"]
    if isinstance(listed, list):
        listed = [file.get("filename") if isinstance(file, dict) else file for file in listed]
    files = _names(os.path.join(folder, STATE), listed)
    if missing := [name for name in files if name not in names]:
        raise UserError(
            f"{os.path.join(folder, missing[0])}: missing, though {STATE} lists it ({len(missing)} of {len(files)} "
            "files are missing); copy the dataset again"
        )
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder}: the dataset has an index of selected rows, which is not read; write it again with "
            "flatten_indices().save_to_disk()"
        )
    stale = {name: f"not listed in {STATE}" for name in names if name.endswith(".arrow") and name not in files}
    return {**stale, **described, STATE: METADATA}


def _names(path: str, found: object) -> list[str]:
    """Return `found`, which must be a list of names, of the JSON file at `path`."""
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{path}: cannot be read (it lists no names); copy the dataset again, or delete the file")
    return found


def _read(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the dataset again, or delete the file") from None
    return found if isinstance(found, dict) else {}
