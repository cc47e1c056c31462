"""Megatron-LM's distributed checkpoints (torch_dist) of a LLaMA, which torch's DCP stores (`dcp`).

    iter_0000100/metadata.json   {"sharded_backend": "torch_dist", ...}
    iter_0000100/common.pt       the args and what else all ranks share; since 2026 the object common_state of .metadata
    iter_0000100/.metadata, iter_0000100/__0_0.distcp, ...

Tensors are whole, whatever tp and pp were. Those of the decoder layers are stacked, in blocks of one layer each:
`decoder.layers.mlp.linear_fc2.weight` has shape (L, rows, columns). Or they are apart and numbered from 0 through the
whole model, as in heterogeneous models and in code of August to October 2025, in which `linear_fc1.weight` is two,
`..._w` and `..._v`. The fused matrix of gate and up has all rows of gate first. Norms have Transformer Engine's names.

Sources, in megatron/core of github.com/NVIDIA/Megatron-LM: `TransformerBlock.sharded_state_dict` in
transformer/transformer_block.py (layers), `apply_swiglu_sharded_factory` in transformer/mlp.py (gate and up),
`sharded_state_dict_keys_map` in models/gpt/gpt_layer_specs.py (norms), `LanguageModule.sharded_state_dict` in
models/common/language_module (tied head), and `load_common_state_dict` in dist_checkpointing/serialization.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from llama_ds.checkpoint.formats.dcp import METADATA, OTHER_FORMAT, DcpTensor, dcp_entries
from llama_ds.checkpoint.formats.hf_config import read_object
from llama_ds.checkpoint.formats.inventory import MAX_LAYERS, check_file, check_names, check_shape
from llama_ds.checkpoint.formats.megatron_tensors import FC1, LAYER, Chunk
from llama_ds.checkpoint.stored import embedded_content, torch_content
from llama_ds.checkpoint.weights import Readable
from llama_ds.errors import UserError

COMMON, BACKENDS = OTHER_FORMAT
BACKEND = "torch_dist"
COMMON_OBJECT = "common_state/shard_0_1"
STACKED = "decoder.layers."
# Beginnings of the names of what is no weight; several optimizers are chained_0, ...
STATES = re.compile(r"(optimizer|chained_\d+|opt_param_scheduler|rng_state|rerun_state_machine_state)\b")
HALVES = {f"{FC1}.weight_w": f"{FC1}.weight_v"}


@dataclass(frozen=True)
class DistChunk(Chunk):
    """The whole model, not in parts of ranks."""

    tensors: Mapping[str, DcpTensor]

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors."""
        return self.tensors.keys()

    def check(self, wanted: Collection[str]) -> None:
        """Check that these are the tensors.

        Raises:
            UserError: tensors are missing or unknown.
        """
        check_names(self.paths[0], wanted, self.tensors)

    def merged(
        self, name: str, dim: int | None, shape: tuple[int, ...], config: str = "args", equal: bool = True
    ) -> Readable:
        """Return a tensor, checked to have `shape`, to be sharded along `dim`.

        Raises:
            UserError: it has another shape, or is damaged.
        """
        check_shape(self.paths[0], name, self.tensors[name].shape, shape, config)
        return self.tensors[name].readable(dim)


def is_distributed(where: str) -> bool:
    """Return whether a folder is a distributed checkpoint, of any backend."""
    return any(os.path.lexists(os.path.join(where, name)) for name in (METADATA, *OTHER_FORMAT))


def open_distributed(where: str) -> tuple[dict[str, Any], DistChunk]:
    """Return what all ranks share, the args among it, and the weights of a distributed checkpoint.

    Raises:
        UserError: it has another backend, is damaged, or its layers are stored in an unknown way.
    """
    path = os.path.join(where, BACKENDS)
    backend = read_object(check_file(path)).get("sharded_backend") if os.path.lexists(path) else None
    if backend != BACKEND:
        raise UserError(
            f"{where}: is a distributed checkpoint of Megatron-LM that is not in the format {BACKEND}; save it in the "
            "format torch, with Megatron-LM's --ckpt-convert-format torch"
        )
    tensors, objects = dcp_entries(where)
    common = os.path.join(where, COMMON)
    if os.path.lexists(common):
        shared = torch_content(check_file(common), inert=True)
    elif COMMON_OBJECT in objects:
        shared = (embedded_content(*objects[COMMON_OBJECT]) or [None])[0]
    else:
        raise UserError(f"{common}: is missing, with the args that describe the model; copy the checkpoint again")
    if not isinstance(shared, dict):
        raise UserError(f"{common}: holds no dict with args; copy the checkpoint again")
    found: dict[str, DcpTensor] = {}
    for name, tensor in tensors.items():
        if not STATES.match(name):
            found |= _layers(name, tensor) if name.startswith(STACKED) else {name: tensor}
    for first, second in HALVES.items():
        for name in [name for name in found if name.endswith(f".{first}")]:
            other = name.removesuffix(first) + second
            if other in found:
                found[name.removesuffix("_w")] = found.pop(name).followed_by(found.pop(other))
    return shared, DistChunk((where,), (), found)


def _layers(name: str, tensor: DcpTensor) -> dict[str, DcpTensor]:
    """Return the tensors of single layers, by the names with their numbers."""
    if LAYER.fullmatch(name):
        return {name: tensor}
    if not tensor.shape or tensor.shape[0] > MAX_LAYERS:
        raise UserError(
            f"{tensor.folder}: {name} has shape {list(tensor.shape)}, not that of stacked layers; copy it again"
        )
    local = name.removeprefix(STACKED)
    return {f"{STACKED}{index}.{local}": tensor.layer(index) for index in range(tensor.shape[0])}
