"""A weights-only checkpoint in DeepSpeed's pipeline format: one file per layer and tensor-parallel rank.

DeepSpeed's PipelineEngine loads it (load_module_only) with the pp and tp it was written for, so the files hold the
padding of the vocabulary. The index of this project does not, by which it is also one of its checkpoints, from which a
run of any layout can start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from llama_ds.checkpoint.carried import carried_files
from llama_ds.checkpoint.formats.engine_files import engine_state, layer_file, rank_file
from llama_ds.checkpoint.formats.plan import OutputFile, OutputTensor, Plan, Target, check_parts, part_shape
from llama_ds.checkpoint.manifest import (
    DESCRIPTION,
    WEIGHT,
    Description,
    FileEntry,
    Record,
    StoredPiece,
    checksum,
    describe,
    name_of,
    write_manifest,
)
from llama_ds.checkpoint.weights import DTYPES, ModelFiles
from llama_ds.layout.layout import Layout
from llama_ds.layout.weights import weight_of


def plan_layer_files(files: ModelFiles, target: Target) -> Plan:
    """Return the plan. Step, tokens and run are copied from a source that is a checkpoint of this project.

    Raises:
        UserError: the model cannot be sharded over the target's ranks.
    """
    check_parts(files, target, padded=True)
    outputs = tuple(
        OutputFile(layer_file(layer, rank), tuple(_output_tensors(files, layer, rank, target.tp)))
        for layer in files.layers()
        for rank in range(target.tp)
    )
    description = _description(files, target)
    state = engine_state(description.step, target.pp * target.tp)
    small = {rank_file(rank): state for rank in range(target.pp * target.tp)}
    copied = carried_files(files.path)
    return Plan("deepspeed", DTYPES[target.dtype], outputs, small, copied, description)


def write_index(folder: str, plan: Plan, checksums: Mapping[str, str]) -> None:
    """Write the index and description of a checkpoint whose files exist. `checksums` are those of its layer files."""
    assert plan.description is not None
    record = Record(rank=0)
    for name in (*checksums, *plan.small):
        path = os.path.join(folder, name)
        record.files[name] = FileEntry(os.path.getsize(path), checksums.get(name) or checksum(path), 0)
    for file in plan.files:
        layer = int(file.name.split("_")[1].partition("-")[0])
        located = file.locate(folder)
        for tensor in file.tensors:
            if tensor.rank and weight_of(tensor.name).cut is None:
                continue  # replicated on every rank; readers use the copy of rank 0
            stored, weight = located[tensor.name], weight_of(tensor.name)
            numel = weight.own_numel(plan.description.model, tensor.rank, tensor.size)
            dtype = str(stored.dtype).removeprefix("torch.")
            piece = StoredPiece(WEIGHT, tensor.rank, 0, numel, file.name, stored.offset, dtype)
            record.pieces.setdefault(name_of((layer, tensor.name)), []).append(piece)
    write_manifest(folder, plan.description, [record])


def _output_tensors(files: ModelFiles, layer: int, rank: int, size: int) -> list[OutputTensor]:
    return [
        OutputTensor(name, part_shape(tensor.shape, weight_of(name).cut, size), tensor, rank, size)
        for (index, name), tensor in files.tensors.items()
        if index == layer
    ]


def _description(files: ModelFiles, target: Target) -> Description:
    pp, tp = target.pp, target.tp
    layout = Layout(pp=pp, tp=tp).as_data()
    model = asdict(files.model)
    if not os.path.exists(os.path.join(files.path, DESCRIPTION)):
        run: dict[str, Any] = {
            "model": model,
            "data": {"seq_len": files.seq_len},
            "training": {"initializer_range": files.initializer_range},
        }
        return Description(
            *(0, 0, 0, target.dtype, layout, run),
            bos_id=files.bos_id,
            eos_id=files.eos_id,
            hf_config=dict(files.hf_config),
        )
    found = describe(files.path)
    return replace(
        found,
        zero_stage=0,
        dtype=target.dtype,
        layout=layout,
        run={**found.run, "model": model},
        optimizer_steps=None,
        files={},
    )
