"""Writing GPT-NeoX's checkpoints, as `neox` describes them, for its present code, with a pipeline or without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llama_ds.checkpoint.carried import carried_files
from llama_ds.checkpoint.formats.engine_files import engine_fields, engine_state, layer_file, rank_file
from llama_ds.checkpoint.formats.fused import Fused
from llama_ds.checkpoint.formats.hf_settings import TOKEN_IDS
from llama_ds.checkpoint.formats.neox import (
    EMBEDDING,
    FINAL_NORM,
    FUSED_MLP,
    GATE,
    HEAD,
    NORMS,
    OUTPUT,
    QKV,
    RECORD,
    SEQUENTIAL,
    UP,
    UP_GATE,
    K,
    Q,
    V,
    layer_index,
    qkv_lengths,
    up_gate_lengths,
)
from llama_ds.checkpoint.formats.neox_config import CONFIGS, configuration
from llama_ds.checkpoint.formats.plan import Enclosing, OutputFile, OutputTensor, Plan, Target, check_parts, part_shape
from llama_ds.checkpoint.store import LATEST
from llama_ds.checkpoint.weights import DTYPES, ModelFiles, Readable

TAG = "global_step0"
ENDS = {"weight": (EMBEDDING, 0), "norm.weight": (FINAL_NORM, None), "lm_head.weight": (HEAD, 0)}


def plan_neox(files: ModelFiles, target: Target) -> Plan:
    """Return the plan: one checkpoint without a training state, from which GPT-NeoX starts with `finetune: true`.

    Raises:
        UserError: GPT-NeoX does not compute the model, or it cannot be sharded over that many ranks.
    """
    check_parts(files, target, fewest_stages=0)
    small = {LATEST: TAG.encode(), f"{TAG}/{CONFIGS}/llama_ds.yml": configuration(files, target)}
    more: dict[str, object] = {"iteration": 0, RECORD: {"qkv_order": qkv_order(files)}}
    if target.pp:
        outputs = tuple(
            OutputFile(f"{TAG}/{layer_file(number, rank)}", tuple(_of_rank(files, layer, target, rank)))
            for layer, number in _layers(files)
            for rank in range(target.tp)
        )
        state = engine_state(0, target.pp * target.tp, **more)
        small |= {f"{TAG}/{rank_file(rank)}": state for rank in range(target.pp * target.tp)}
    else:
        around = Enclosing("module", engine_fields(0, target.tp, **more))
        outputs = tuple(
            OutputFile(f"{TAG}/{rank_file(rank)}", tuple(_sequential(files, target, rank)), around)
            for rank in range(target.tp)
        )
    dropped = [f"{key} {files.hf_config[key]}" for key in TOKEN_IDS if files.hf_config.get(key) is not None]
    note = (
        f"GPT-NeoX starts from it with {TAG}/{CONFIGS}/llama_ds.yml, beside files that set load, tokenizer_type, "
        "vocab_file and the training"
    )
    copied = carried_files(files.path)
    return Plan("neox", DTYPES[target.dtype], outputs, small, copied, dropped=tuple(dropped), notes=(note,))


def qkv_order(files: ModelFiles) -> str:
    """Return the order of GPT-NeoX's present code, one of `choices.QKV_ORDERS`."""
    return "heads" if files.model.num_key_value_heads == files.model.num_attention_heads else "blocks"


def _layers(files: ModelFiles) -> Iterator[tuple[int, int]]:
    """Yield our number of each layer, and GPT-NeoX's."""
    for layer in files.layers():
        yield layer, layer_index(layer, files.model.num_hidden_layers)


def _sequential(files: ModelFiles, target: Target, rank: int) -> Iterator[OutputTensor]:
    """Yield all tensors of a rank by their names in a model without a pipeline."""
    for layer, number in _layers(files):
        for tensor in _of_rank(files, layer, target, rank):
            yield replace(tensor, name=f"{SEQUENTIAL}{number}.{tensor.name}")


def _of_rank(files: ModelFiles, layer: int, target: Target, rank: int) -> Iterator[OutputTensor]:
    for name, source, dim in _layer_tensors(files, layer, target):
        yield OutputTensor(name, part_shape(source.shape, dim, target.tp), source, rank, target.tp)


def _layer_tensors(files: ModelFiles, layer: int, target: Target) -> Iterator[tuple[str, Readable, int | None]]:
    """Yield name, unsharded tensor and sharded dimension of everything in a layer."""
    model = files.model
    own = {name: tensor for (index, name), tensor in files.tensors.items() if index == layer}
    for name in own.keys() & ENDS.keys():
        yield ENDS[name][0], own[name], ENDS[name][1]
    if Q not in own:
        return
    for name, spelling in NORMS.items():
        yield spelling, own[name], None
    lengths = qkv_lengths(files.path, model, target.tp, qkv_order(files))
    yield QKV, Fused([own[Q], own[K], own[V]], lengths), 0
    yield UP_GATE, Fused([own[UP], own[GATE]], up_gate_lengths(model, target.tp)), 0
    for name, spelling in {**OUTPUT, **FUSED_MLP}.items():
        yield spelling, own[name], 1
