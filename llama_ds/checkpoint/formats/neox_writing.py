"""Writing GPT-NeoX's checkpoints, as `neox` describes them: those of its pipeline, for its present code."""

from __future__ import annotations

from collections.abc import Iterator

from llama_ds.checkpoint.carried import carried_files
from llama_ds.checkpoint.formats.engine_files import engine_state, layer_file, rank_file
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
from llama_ds.checkpoint.formats.plan import OutputFile, OutputTensor, Plan, Target, check_parts, part_shape
from llama_ds.checkpoint.store import LATEST
from llama_ds.checkpoint.weights import DTYPES, ModelFiles, Readable

TAG = "global_step0"
ENDS = {"weight": (EMBEDDING, 0), "norm.weight": (FINAL_NORM, None), "lm_head.weight": (HEAD, 0)}


def plan_neox(files: ModelFiles, target: Target) -> Plan:
    """Return the plan: one checkpoint without a training state, from which GPT-NeoX starts with `finetune: true`.

    Raises:
        UserError: GPT-NeoX does not compute the model, or it cannot be sharded over that many ranks.
    """
    check_parts(files, target)
    model = files.model
    configs = configuration(files, target)
    outputs = tuple(
        OutputFile(
            f"{TAG}/{layer_file(layer_index(layer, model.num_hidden_layers), rank)}",
            tuple(
                OutputTensor(name, part_shape(source.shape, dim, target.tp), source, rank, target.tp)
                for name, source, dim in _layer_tensors(files, layer, target)
            ),
        )
        for layer in files.layers()
        for rank in range(target.tp)
    )
    state = engine_state(0, target.pp * target.tp, iteration=0, **{RECORD: {"qkv_order": qkv_order(files)}})
    small = {LATEST: TAG.encode(), f"{TAG}/{CONFIGS}/llama_ds.yml": configs}
    small |= {f"{TAG}/{rank_file(rank)}": state for rank in range(target.pp * target.tp)}
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
