"""Comparison of a model in files with the model that a run trains: everything that changes the function."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
import xxhash

from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.config.differences import Difference, model_differences, shown
from llama_ds.config.reader import plain
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError
from llama_ds.layout.weights import weight_shapes

SAMPLE = 1024  # elements of each weight in a fingerprint


def check_same_function(found: ModelFiles, wanted: ModelConfig, changes: Collection[str]) -> list[Difference]:
    """Return the keys of `changes` in which the model found differs from the model `wanted`.

    Raises:
        UserError: it differs in other keys, too; the message names all of them, with both values.
    """
    differing = model_differences(plain(found.model), plain(wanted))
    refused = [one for one in differing if one[0] not in changes]
    if refused:
        values = "; ".join(f"{key} = {shown(there)} there, {shown(here)} here" for key, there, here in refused)
        free = [key for key, *_ in refused if _keeps_shapes(found.model, wanted, key.removeprefix("model."))]
        purpose = f", or list what you change on purpose: checkpoint.start_from_changes='[{', '.join(free)}]'"
        raise UserError(
            f"{found.path}: is another model than the run's: {values}; set these keys to the folder's values, or take "
            f"all of them: model='{{from: {found.path}}}'{purpose if free else ''}"
        )
    return differing


def fingerprint(files: ModelFiles) -> str:
    """Return a hash of names, shapes and the first SAMPLE elements of all weights.

    It reads little, and it is the same for the same numbers in any format and dtype.
    """
    digest = xxhash.xxh3_128()
    for (layer, name), tensor in sorted(files.tensors.items()):
        sample = torch.empty(min(SAMPLE, torch.Size(tensor.shape).numel()))
        tensor.read(sample)
        digest.update(f"{layer}.{name} {list(tensor.shape)} ".encode())
        digest.update(sample.numpy().data)
    return digest.hexdigest()


def _keeps_shapes(found: ModelConfig, wanted: ModelConfig, key: str) -> bool:
    """Return whether a model that takes only `key` from `wanted` has weights of the same shapes, but for rows of ids.

    Rows for other ids are added or dropped.
    """
    try:
        changed = replace(found, **{key: getattr(wanted, key)})
    except UserError:
        return False
    return weight_shapes(replace(changed, vocab_size=found.vocab_size)) == weight_shapes(found)
