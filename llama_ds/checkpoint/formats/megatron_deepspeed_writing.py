"""Writing Megatron-DeepSpeed's checkpoints, as `megatron_deepspeed` describes them, with a pipeline or without."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace

from llama_ds.checkpoint.carried import carried_files
from llama_ds.checkpoint.formats.engine_files import engine_fields, engine_state, layer_file, rank_file
from llama_ds.checkpoint.formats.hf_settings import TOKEN_IDS
from llama_ds.checkpoint.formats.megatron import VERSION
from llama_ds.checkpoint.formats.megatron_args import MULTIPLE
from llama_ds.checkpoint.formats.megatron_deepspeed import BLOCKS_SINCE, FIRST
from llama_ds.checkpoint.formats.megatron_legacy import MODULES, block_lengths, legacy_local, legacy_name
from llama_ds.checkpoint.formats.megatron_tensors import EMBEDDING, FINAL_NORM, HEAD, LAYER, qkv_lengths
from llama_ds.checkpoint.formats.megatron_writing import stage_tensors
from llama_ds.checkpoint.formats.plain_llama import check_plain
from llama_ds.checkpoint.formats.plan import Enclosing, OutputFile, OutputTensor, Plan, Target, check_parts, part_shape
from llama_ds.checkpoint.store import LATEST
from llama_ds.checkpoint.weights import DTYPES, ModelFiles
from llama_ds.errors import UserError

TAG = "global_step0"
NORM = "layernorm"  # what its norms are called, also those that are RMSNorm
# Names in the files of a pipeline's layers outside of decoder layers.
ENDS = {EMBEDDING: "word_embeddings.weight", FINAL_NORM: "weight", HEAD: "lm_head.weight"}


def plan_megatron_deepspeed(files: ModelFiles, target: Target) -> Plan:
    """Return the plan: one checkpoint without a training state, which Megatron-DeepSpeed loads with --finetune.

    Raises:
        UserError: Megatron-DeepSpeed does not compute the model, or it cannot be sharded over that many ranks.
    """
    check_parts(files, target, padded=True, fewest_stages=0)
    order = _order(files, target)
    args = _args(files, target, order)
    common = {"args": args, "checkpoint_version": VERSION, "iteration": 0}
    ranks = [_rank_tensors(files, target, args, order, rank) for rank in range(target.tp)]
    small = {LATEST: TAG.encode()}
    if target.pp:
        outputs = tuple(file for rank, own in enumerate(ranks) for file in _layer_files(files, own, rank))
        state = engine_state(0, target.pp * target.tp, **common)
        small |= {f"{TAG}/{rank_file(rank)}": state for rank in range(target.pp * target.tp)}
    else:
        around = Enclosing("module", engine_fields(0, target.tp, **common), modules=MODULES)
        outputs = tuple(OutputFile(f"{TAG}/{rank_file(rank)}", _whole(own), around) for rank, own in enumerate(ranks))
    dropped = [f"{key} {files.hf_config[key]}" for key in TOKEN_IDS if files.hf_config.get(key) is not None]
    notes = (f"Megatron-DeepSpeed loads it with --finetune --load and {_flags(args)}", _order_note(order))
    copied = carried_files(files.path)
    return Plan("megatron_deepspeed", DTYPES[target.dtype], outputs, small, copied, dropped=tuple(dropped), notes=notes)


def _order(files: ModelFiles, target: Target) -> str:
    """Return the order of the rows of query, key and value, one of `choices.QKV_ORDERS`."""
    if files.model.num_key_value_heads == files.model.num_attention_heads:
        return target.qkv_order or "blocks"
    if target.qkv_order == "blocks":
        raise UserError(
            f"command line: --to-qkv-order blocks: {files.path} has grouped heads, computed by Megatron-DeepSpeed in "
            "the order heads only; omit it"
        )
    return "heads"


def _order_note(order: str) -> str:
    when = "since 2024-12-04" if order == "blocks" else "before 2024-12-04 (commit 676a482c)"
    return f"query, key and value: in the order {order}, for Megatron-DeepSpeed's code {when}"


def _rank_tensors(
    files: ModelFiles, target: Target, args: Namespace, order: str, rank: int
) -> tuple[OutputTensor, ...]:
    """Return the tensors of a tensor-parallel rank, all layers in a row, by Megatron core's names."""
    lengths = block_lengths(files.model, target.tp) if order == "blocks" else qkv_lengths(files.model)
    whole = replace(target, pp=1, transformer_impl="local")
    return tuple(
        OutputTensor(name, part_shape(source.shape, dim, target.tp), source, rank, target.tp)
        for name, source, dim in stage_tensors(files, whole, args.padded_vocab_size, 0, lengths)
    )


def _whole(tensors: tuple[OutputTensor, ...]) -> tuple[OutputTensor, ...]:
    return tuple(replace(tensor, name=legacy_name(tensor.name, NORM)) for tensor in tensors)


def _layer_files(files: ModelFiles, tensors: tuple[OutputTensor, ...], rank: int) -> Iterator[OutputFile]:
    """Yield the files of a rank, one for each layer of the pipeline that has weights."""
    last = FIRST + files.model.num_hidden_layers
    numbers = {EMBEDDING: FIRST, FINAL_NORM: last + 1, HEAD: last + 2}
    layers: dict[int, list[OutputTensor]] = {}
    for tensor in tensors:
        layer = LAYER.fullmatch(tensor.name)
        number = FIRST + 1 + int(layer[1]) if layer else numbers[tensor.name]
        name = legacy_local(layer[2], NORM) if layer else ENDS[tensor.name]
        layers.setdefault(number, []).append(replace(tensor, name=name))
    for number, own in layers.items():
        yield OutputFile(f"{TAG}/{layer_file(number, rank)}", tuple(own))


def _args(files: ModelFiles, target: Target, order: str) -> Namespace:
    """Return the args of a model.

    Raises:
        UserError: Megatron-DeepSpeed does not compute the model.
    """
    model, multiple = files.model, MULTIPLE * target.tp
    check_plain(model, files.path, "Megatron-DeepSpeed")
    if model.rope_scaling is not None or not model.rope_theta.is_integer():
        what = "model.rope_scaling" if model.rope_scaling else f"rope_theta = {model.rope_theta}, which is no integer,"
        raise UserError(f"{files.path}: {what} is not computed by Megatron-DeepSpeed; convert to hf or deepspeed")
    return Namespace(
        **({BLOCKS_SINCE: False} if order == "blocks" else {}),
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        kv_channels=model.head_dim,
        max_position_embeddings=files.seq_len,
        seq_length=files.seq_len,
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        rotary_percent=1.0,
        rope_theta=int(model.rope_theta),
        normalization="rmsnorm",
        layernorm_epsilon=model.rms_norm_eps,
        apply_layernorm_1p=False,
        swiglu=True,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=not model.tie_word_embeddings,
        vocab_size=model.vocab_size,
        padded_vocab_size=-(-model.vocab_size // multiple) * multiple,
        make_vocab_size_divisible_by=MULTIPLE,
        num_experts=[1],
        init_method_std=files.initializer_range,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=target.tp,
        pipeline_model_parallel_size=max(target.pp, 1),
        virtual_pipeline_model_parallel_size=None,
        no_pipeline_parallel=not target.pp,
        params_dtype=DTYPES[target.dtype],
        bf16=target.dtype == "bf16",
        fp16=target.dtype == "fp16",
        deepspeed=True,
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        consumed_train_tokens=0,
    )


def _flags(args: Namespace) -> str:
    """Return the flags that describe the model; Megatron-DeepSpeed takes none of them from a DeepSpeed checkpoint."""
    values = {
        "num-layers": args.num_layers,
        "hidden-size": args.hidden_size,
        "ffn-hidden-size": args.ffn_hidden_size,
        "num-attention-heads": args.num_attention_heads,
        "num-key-value-heads": args.num_key_value_heads,
        "kv-channels": args.kv_channels,
        "max-position-embeddings": args.max_position_embeddings,
        "rotary-position-embeddings-theta": args.rope_theta,
        "normalization": args.normalization,
        "layernorm-epsilon": args.layernorm_epsilon,
        "make-vocab-size-divisible-by": args.make_vocab_size_divisible_by,
        "tensor-model-parallel-size": args.tensor_model_parallel_size,
        "pipeline-model-parallel-size": args.pipeline_model_parallel_size,
    }
    switches = {
        "use-rotary-position-embeddings": True,
        "swiglu": True,
        "disable-bias-linear": True,
        "untie-embeddings-and-output-weights": args.untie_embeddings_and_output_weights,
        "no-pipeline-parallel": args.no_pipeline_parallel,
        "bf16": args.bf16,
        "fp16": args.fp16,
    }
    words = [f"--{name} {value}" for name, value in values.items()]
    return " ".join([*words, *(f"--{name}" for name, given in switches.items() if given)])
