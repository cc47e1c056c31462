"""The weight table agrees with the modules and transformers; other rooms use it and do not name weights themselves."""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_ds.checkpoint.formats.hf_config import hf_config
from llama_ds.checkpoint.names import hf_name
from llama_ds.config.schema import ModelConfig, OptimizerConfig
from llama_ds.layout.partition import boundaries, stage_roles
from llama_ds.layout.weights import TABLE, Role, decoder_layer, held_elements, key_of, weight_of, weight_shapes, weights
from llama_ds.model.attention import CausalAttention
from llama_ds.model.decoder import LayerContext
from llama_ds.model.llama import Llama
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.rope import RotaryTables
from llama_ds.model.tensor_parallel import SingleRank
from llama_ds.parallel.state_files import universal_info
from llama_ds.training.engines.optimizer_groups import decay_groups

REPO = Path(__file__).resolve().parent.parent
GQA = ModelConfig(96, 32, 88, 3, 8, 4, 8)
WIDE_HEADS = ModelConfig(96, 32, 88, 2, 8, 2, 16)  # head_dim above hidden / heads
TIED = replace(GQA, tie_word_embeddings=True)
BIASED = replace(GQA, attention_bias="qkvo", mlp_bias=True)
QWEN3 = replace(WIDE_HEADS, attention_bias="qkvo", qk_norm=True)
MODELS = pytest.mark.parametrize(
    "model", [GQA, WIDE_HEADS, TIED, BIASED, QWEN3], ids=["gqa", "wide heads", "tied", "biased", "qwen3"]
)
RANKS = pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])


def build(model: ModelConfig, rank: int = 0, size: int = 1) -> Llama:
    """Return the model of one tensor-parallel rank."""
    tp = SingleRank()
    tp.rank, tp.size = rank, size
    context = LayerContext(model, 7, tp, CausalAttention("reference"), RotaryTables(model, 16))
    return Llama(context, NextTokenLoss(tp, vocab_size=model.vocab_size))


@MODELS
@RANKS
def test_the_table_agrees_with_the_modules(model: ModelConfig, rank: int, size: int) -> None:
    """A weight that is missing in the table, or has another shape there, would be neither saved nor counted."""
    found = {key_of(name): parameter for name, parameter in build(model, rank, size).named_parameters()}
    assert list(found) == [key for key, _ in weights(model)]
    for key, weight in weights(model):
        shape = list(weight.shape(model))
        if weight.cut is not None:
            shape[weight.cut] //= size
        assert list(found[key].shape) == shape, key
        assert getattr(found[key], "tensor_model_parallel", False) == (size > 1 and weight.cut is not None), key
    held = held_elements((weight for _, weight in weights(model)), model, size)
    assert held.total() == sum(p.numel() for p in found.values())


@MODELS
def test_names_and_shapes_are_those_of_transformers(model: ModelConfig) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(model, 16, "float32")))
    assert {hf_name(*key, model.num_hidden_layers): shape for key, shape in weight_shapes(model).items()} == {
        name: tuple(parameter.shape) for name, parameter in reference.named_parameters()
    }


@pytest.mark.parametrize(
    ("model", "rank", "size", "digest"),
    [
        (GQA, 0, 1, "b6989eaccc4dfd681e81c89acb0ac23d"),
        (GQA, 0, 2, "d1d8117740a190634036966bc911a760"),
        (GQA, 1, 2, "734dd522f5faaf169511c1bbad4d8780"),
        (TIED, 0, 1, "7f5398a33cbe9f7e0e252f7fa4a987a2"),
        (TIED, 0, 2, "2e326dbba810f614cafb75b319eccb75"),
        (TIED, 1, 2, "b45184eb95402d0f4d25e86b88c06634"),
    ],
)
def test_initial_weights_do_not_change(model: ModelConfig, rank: int, size: int, digest: str) -> None:
    """A repeated run must start from the same weights."""
    found = hashlib.sha256()
    for name, parameter in build(model, rank, size).named_parameters():
        found.update(name.encode())
        found.update(parameter.detach().numpy().tobytes())
    assert found.hexdigest()[:32] == digest


@MODELS
def test_decay_groups_follow_the_table(model: ModelConfig) -> None:
    module = build(model)
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = decay_groups(module, OptimizerConfig(lr=1e-3, weight_decay=0.25), model, "all ")
    wanted = {
        (0.25, "all matrices"): [key for key, w in weights(model) if w.decays],
        (0.0, "all norms"): [key for key, w in weights(model) if not w.decays and w.cut is None],
        # Another group, because tensor-parallel ranks hold different parts: the gradient norm counts all of them.
        (0.0, "all biases"): [key for key, w in weights(model) if not w.decays and w.cut is not None],
    }
    assert {(g["weight_decay"], g["name"]): [key_of(names[p]) for p in g["params"]] for g in groups} == {
        group: keys for group, keys in wanted.items() if keys
    }


def test_decay_groups_of_one_layer_have_its_matrices_first() -> None:
    """The order of groups is the order of buffers in checkpoint files, although a layer's first weight is a norm."""
    groups = decay_groups(build(GQA).layers[1], OptimizerConfig(lr=1e-3), GQA, "layer 1 ")
    assert [(group["name"], len(group["params"])) for group in groups] == [
        ("layer 1 matrices", 7),
        ("layer 1 norms", 2),
    ]
    (table,) = decay_groups(build(TIED).layers[0], OptimizerConfig(lr=1e-3), TIED)
    assert table["weight_decay"] > 0


def test_a_parameter_is_looked_up_by_any_of_its_names() -> None:
    for prefix, layer in (("layers.3.", 3), ("3.", 3), ("12.", 12)):
        for weight in TABLE:
            assert weight_of(prefix + weight.name) is weight_of(weight.name) is weight
            assert key_of(prefix + weight.name) == (layer, weight.name)
    assert key_of("tied_modules.embed.weight") == (0, "weight")
    assert weight_of("tied_modules.embed.weight").role is Role.EMBEDDING
    with pytest.raises(ValueError, match="is not the name of a model parameter"):
        key_of("self_attn.q_proj.weight")


@pytest.mark.parametrize("model", [GQA, TIED, replace(GQA, attention_bias="qkvo", mlp_bias=True, qk_norm=True)])
def test_universal_patterns_shard_weights_as_the_table_does(model: ModelConfig) -> None:
    """DeepSpeed's ds_to_universal applies them with `re.match`, to names without a pipeline, in a pipeline and tied.

    It refuses a checkpoint if a pattern matches no weight.
    """
    info = universal_info(model)
    rows, whole = info["parameter_with_row_parallelism_patterns"], info["tp_replicated_parameter_patterns"]
    tables = info["vocabulary_parameter_patterns"]
    names = [f"{layer}.{weight.name}" for (layer, _), weight in weights(model)]
    for name in (*names, *(f"layers.{name}" for name in names)):
        assert any(re.match(pattern, name) for pattern in rows) == (weight_of(name).cut == 1), name
        assert any(re.match(pattern, name) for pattern in whole) == (weight_of(name).cut is None), name
        has_rows = weight_of(name).role in (Role.EMBEDDING, Role.HEAD)
        assert any(re.match(pattern, name) for pattern in tables) == has_rows, name
    assert all(any(re.match(pattern, name) for name in names) for pattern in (*rows, *whole, *tables))
    assert not any(re.match(pattern, "tied_modules.embed.weight") for pattern in (*rows, *whole))
    assert any(re.match(pattern, "tied_modules.embed.weight") for pattern in tables)
    assert info["original_vocab_size"] == model.vocab_size


def test_the_first_and_last_stage_hold_the_tables() -> None:
    held = stage_roles(GQA, boundaries(GQA, 16, 3, None), 2)
    layer = held_elements(decoder_layer(GQA), GQA, 2)
    table = 96 * 32 // 2
    assert held == [layer + Counter({Role.EMBEDDING: table}), layer, layer + Counter({Role.HEAD: table, Role.NORM: 32})]
    assert stage_roles(TIED, boundaries(TIED, 16, 3, None), 2)[2][Role.EMBEDDING] == table
    assert stage_roles(TIED, boundaries(TIED, 16, 1, None), 1)[0].total() == sum(
        torch.Size(shape).numel() for shape in weight_shapes(TIED).values()
    )


# Words that name a weight or identify a kind of weight.
WORDS = {part for weight in TABLE for part in weight.name.split(".") if "_" in part} - {"self_attn"} | {"embed_tokens"}
MODULES = {"RMSNorm", "ShardedLinear"}
OWNERS = ("llama_ds/layout/weights.py", "llama_ds/model/", "llama_ds/checkpoint/names.py")
FOREIGN_FILES = (
    *("gguf_model.py", "hf_folder.py", "huggingface.py", "meta.py", "torchtitan.py", "neox.py", "neox_writing.py"),
    *("megatron.py", "megatron_args.py", "megatron_deepspeed.py", "megatron_legacy.py", "megatron_tensors.py"),
    *("megatron_writing.py", "megatron_deepspeed_writing.py", "torchtitan_writing.py"),
)
FOREIGN = tuple(f"llama_ds/checkpoint/formats/{name}" for name in FOREIGN_FILES)


def weight_names(source: str) -> list[int]:
    """Return the lines that name a weight: in a string other than a docstring, as an attribute, or by its module."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in docstrings:
                words = re.findall(r"\w+", text)
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                words = [name]
            case _:
                continue
        if not (WORDS | MODULES).isdisjoint(words):
            found.append(node.lineno)
    return found


def test_only_the_table_the_modules_and_foreign_formats_name_weights() -> None:
    files = [p.relative_to(REPO).as_posix() for top in ("llama_ds", "tools") for p in (REPO / top).rglob("*.py")]
    others = [path for path in files if not path.startswith((*OWNERS, *FOREIGN))]
    assert len(others) > 200
    broken = [f"{path}:{line}" for path in others for line in weight_names((REPO / path).read_text())]
    assert not broken, "use llama_ds.layout.weights instead: " + ", ".join(broken)


@pytest.mark.parametrize(
    "code",
    [
        'ROW_PARALLEL = ("o_proj", "down_proj")',
        'pattern = r".*\\.(o_proj|down_proj)\\.weight"',
        'head = (layers + 2, "lm_head.weight")',
        "queries = layer.self_attn.q_proj.weight",
        "norms = [p for m in module.modules() if isinstance(m, RMSNorm) for p in m.parameters()]",
        "from llama_ds.model.linear import ShardedLinear",
    ],
)
def test_a_weight_named_elsewhere_is_caught(code: str) -> None:
    assert weight_names(code)


@pytest.mark.parametrize("code", ['"""Return "3.mlp.up_proj.weight"."""', "x = source.weight", "norm = total.norm()"])
def test_other_code_is_not(code: str) -> None:
    assert not weight_names(code)
