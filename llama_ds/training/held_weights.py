"""The weights of an engine that evaluates only: it has no optimizer whose masters would be filled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llama_ds.checkpoint.weights import Readable
from llama_ds.layout.weights import Key, key_of, weight_of
from llama_ds.parallel import world
from llama_ds.training.reading import check_finite, read_part


@torch.no_grad()
def fill_weights(engine: Any, weights: Mapping[Key, Readable], tp: int, path: str) -> None:
    """Read this rank's parts of the weights of the model at `path` into a DeepSpeed engine. Collective.

    Raises:
        UserError: on all ranks: a weight is NaN or infinite, or cannot be read.
    """

    def fill() -> None:
        for parameter, name in engine.param_names.items():
            key = key_of(name)
            rank, size = (0, 1) if weight_of(key[1]).cut is None else (engine.mpu.get_tensor_model_parallel_rank(), tp)
            read_part(weights[key], parameter.view(-1), rank, size, 0)
            check_finite(path, key, parameter)

    world.together(fill)
