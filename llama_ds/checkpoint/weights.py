"""Weights of a checkpoint, read without DeepSpeed and merged over the tensor-parallel ranks, one layer at a time."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator

import torch
from torch import Tensor

from llama_ds.checkpoint.names import sharded_dim
from llama_ds.checkpoint.store import Description, describe
from llama_ds.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by the names that descriptions use
SINGLE_STAGE_PREFIX = "layers."  # of parameter names in llama_ds.model.llama.Llama


def layer_file(folder: str, layer: int, tp_rank: int) -> str:
    """Return the path of one layer's weights as DeepSpeed's PipelineModule names it."""
    return os.path.join(folder, f"layer_{layer:02d}-model_{tp_rank:02d}-model_states.pt")


class CheckpointWeights:
    """The model weights of one checkpoint folder, whatever layout wrote it.

    A pipeline writes a file per layer and tensor-parallel rank, and so do we under ZeRO-3; a single stage under
    ZeRO 0 to 2 has all layers in one file per tensor-parallel rank.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.description: Description = describe(folder)
        self.tp = self.description.layout["tp"]
        model = self.description.run["model"]
        self.layers: int = model["num_hidden_layers"] + (2 if model["tie_word_embeddings"] else 3)
        self._by_layer = os.path.exists(layer_file(folder, 0, 0))
        self._single_stage: list[dict[str, Tensor]] = [] if self._by_layer else self._read_single_stage()

    def __iter__(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (layer index, whole weights by local name), in order."""
        for layer in range(self.layers):
            yield layer, self.layer(layer)

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Return the whole weights of one layer by local name."""
        parts = [self._part(layer, rank) for rank in range(self.tp)]
        return {name: _merge(name, [part[name] for part in parts]) for name in parts[0]}

    def _part(self, layer: int, tp_rank: int) -> dict[str, Tensor]:
        if self._by_layer:
            return _load(layer_file(self.folder, layer, tp_rank))
        prefix = f"{SINGLE_STAGE_PREFIX}{layer}."
        states = self._single_stage[tp_rank]
        return {name.removeprefix(prefix): w for name, w in states.items() if name.startswith(prefix)}

    def _read_single_stage(self) -> list[dict[str, Tensor]]:
        files = [os.path.join(self.folder, f"mp_rank_{rank:02d}_model_states.pt") for rank in range(self.tp)]
        return [_load(file)["module"] for file in files]  # type: ignore[misc]


def _merge(name: str, parts: list[Tensor]) -> Tensor:
    dim = sharded_dim(name)
    return parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)


def _load(path: str) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as a checkpoint file ({reason}); use another checkpoint") from None
