"""Writing the `.metadata` of a folder of torch's DCP, in which each tensor is one block, alone in its file.

The classes are torch's own, because DCP reads the file by unpickling them.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping

import torch

from llama_ds.checkpoint.stored import embedded_tensor


def metadata_of(paths: Mapping[str, str]) -> bytes:
    """Return the content of `.metadata` for files of torch.save that hold one tensor each, by the tensor's name."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # the import takes seconds
    from torch.distributed.checkpoint.metadata import (
        STORAGE_TYPES,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    entries: dict[str, STORAGE_TYPES] = {}
    places = {}
    for name, path in paths.items():
        length = os.path.getsize(path)
        stored = embedded_tensor(path, 0, length)
        begin, shape = torch.Size([0] * len(stored.shape)), torch.Size(stored.shape)
        chunks = [ChunkStorageMetadata(begin, shape)]
        entries[name] = TensorStorageMetadata(TensorProperties(stored.dtype), shape, chunks)
        places[MetadataIndex(name, begin, 0)] = _StorageInfo(os.path.basename(path), 0, length)
    flat = {name: (name,) for name in paths}  # how DCP restores nested state dicts
    return pickle.dumps(Metadata(entries, planner_data=flat, storage_data=places))
