"""Writing Megatron-LM's checkpoints, as `megatron` describes them, with the names of Megatron core or those before."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace

from llama_ds.checkpoint.carried import carried_files
from llama_ds.checkpoint.formats.fused import Fused
from llama_ds.checkpoint.formats.hf_settings import TOKEN_IDS
from llama_ds.checkpoint.formats.megatron import RANK_FILE, RELEASE, TRACKER, VERSION, rank_folder
from llama_ds.checkpoint.formats.megatron_args import MULTIPLE, OLD_ROTARY_BASE, args_of, flags_of
from llama_ds.checkpoint.formats.megatron_legacy import MODULES, legacy_name
from llama_ds.checkpoint.formats.megatron_tensors import (
    EMBEDDING,
    EXTRA_STATE,
    FC1,
    FINAL_NORM,
    GATE,
    HEAD,
    NORMS,
    PARALLEL,
    QKV,
    UP,
    K,
    Q,
    V,
    gate_up_lengths,
    qkv_lengths,
)
from llama_ds.checkpoint.formats.plan import Enclosing, OutputFile, OutputTensor, Plan, Target, check_parts, part_shape
from llama_ds.checkpoint.formats.views import TableRows
from llama_ds.checkpoint.weights import DTYPES, ModelFiles, Readable
from llama_ds.config.numbers import divisors
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError, listed
from llama_ds.layout.weights import EMBEDDING_KEY


def plan_megatron(files: ModelFiles, target: Target) -> Plan:
    """Return the plan: a release, which Megatron-LM loads without a training state, of one file for each rank.

    Raises:
        UserError: Megatron-LM does not compute the model, or it cannot be divided among that many ranks.
    """
    return _plan(files, target, legacy=False)


def plan_megatron_legacy(files: ModelFiles, target: Target) -> Plan:
    """Return the same plan with the names before Megatron core, which --use-legacy-models loads.

    Raises:
        UserError: that model does not compute this one, or it cannot be divided among that many ranks.
    """
    model = files.model
    if (model.rope_theta, model.rope_scaling) != (OLD_ROTARY_BASE, None):
        what = f"rope_theta = {model.rope_theta:g}" if model.rope_scaling is None else "model.rope_scaling"
        raise UserError(
            f"{files.path}: {what} is not computed by Megatron-LM's legacy model, which rotates with base "
            f"{OLD_ROTARY_BASE:g}; convert with --to megatron"
        )
    return _plan(files, replace(target, transformer_impl="local"), legacy=True)


def _plan(files: ModelFiles, target: Target, legacy: bool) -> Plan:
    check_parts(files, target, padded=True)
    layers = files.model.num_hidden_layers
    if layers % target.pp:
        raise UserError(
            f"command line: --pp {target.pp} does not divide num_hidden_layers = {layers} of {files.path}; use "
            f"{listed(divisors(layers))}"
        )
    multiple = MULTIPLE * target.tp
    args = args_of(files, target, -(-files.model.vocab_size // multiple) * multiple)
    outputs = tuple(
        _output_file(files, target, args, rank, stage, legacy)
        for stage in range(target.pp)
        for rank in range(target.tp)
    )
    flags = f"--use-checkpoint-args{' --use-legacy-models' if legacy else ''} {flags_of(args)}"
    note = f"Megatron-LM loads it with --load and {flags}"
    dropped = [f"{key} {files.hf_config[key]}" for key in TOKEN_IDS if files.hf_config.get(key) is not None]
    small, copied = {TRACKER: f"{RELEASE}\n".encode()}, carried_files(files.path)
    kind = "megatron_legacy" if legacy else "megatron"
    return Plan(kind, DTYPES[target.dtype], outputs, small, copied, dropped=tuple(dropped), notes=(note,))


def _output_file(files: ModelFiles, target: Target, args: Namespace, rank: int, stage: int, legacy: bool) -> OutputFile:
    path = f"{RELEASE}/{rank_folder(rank, stage, target.pp)}/{RANK_FILE}"
    beside = {"args": args, "checkpoint_version": VERSION, "iteration": 0}
    tensors = tuple(
        OutputTensor(name, part_shape(source.shape, dim, target.tp), source, rank, target.tp)
        for name, source, dim in stage_tensors(files, target, args.padded_vocab_size, stage)
    )
    if legacy:
        tied = files.model.tie_word_embeddings
        tensors = tuple(replace(tensor, name=legacy_name(tensor.name, "norm", tied)) for tensor in tensors)
        return OutputFile(path, tensors, Enclosing("model", beside, modules=MODULES))
    modules = [tensor.name.removesuffix(".weight") for tensor in tensors if len(tensor.shape) > 1]
    # Modules of parallel linear layers have this entry; in Transformer Engine without FP8, and otherwise, it is None.
    empty = tuple(module + EXTRA_STATE for module in modules if module + ".weight" != EMBEDDING)
    return OutputFile(path, tensors, Enclosing("model", beside, empty))


def stage_tensors(
    files: ModelFiles, target: Target, rows: int, stage: int, lengths: tuple[int, int, int] | None = None
) -> Iterator[tuple[str, Readable, int | None]]:
    """Yield name, unsharded tensor and sharded dimension of everything on a stage.

    Args:
        rows: those of the vocabulary tables, with the padding.
        lengths: rows of query, key and value that take turns in their matrix; None: as in Megatron core.
    """
    model, tensors = files.model, files.tensors
    count = model.num_hidden_layers // target.pp
    table = TableRows(tensors[EMBEDDING_KEY], rows)
    if stage == 0:
        yield EMBEDDING, table, 0
    for local in range(count):
        layer = {name: tensors[stage * count + local + 1, name] for name in (*NORMS, *PARALLEL, Q, K, V, GATE, UP)}
        for name, source, dim in _layer_tensors(layer, model, target, lengths or qkv_lengths(model)):
            yield f"decoder.layers.{local}.{name}", source, dim
    if stage < target.pp - 1:
        return
    yield FINAL_NORM, tensors[model.num_hidden_layers + 1, "norm.weight"], None
    if not model.tie_word_embeddings:
        yield HEAD, TableRows(tensors[model.num_hidden_layers + 2, "lm_head.weight"], rows), 0
    elif target.pp > 1:
        yield HEAD, table, 0


def _layer_tensors(
    layer: Mapping[str, Readable], model: ModelConfig, target: Target, lengths: tuple[int, int, int]
) -> Iterator[tuple[str, Readable, int | None]]:
    for name, spellings in NORMS.items():
        yield spellings[target.transformer_impl], layer[name], None
    yield f"{QKV}.weight", Fused([layer[Q], layer[K], layer[V]], lengths), 0
    yield f"{FC1}.weight", Fused([layer[GATE], layer[UP]], gate_up_lengths(model, target.tp)), 0
    for name, module in PARALLEL.items():
        yield f"{module}.weight", layer[name], 1
