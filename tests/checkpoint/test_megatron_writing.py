"""What is written for Megatron-DeepSpeed and for Megatron-LM's legacy model has their names, cuts and logits."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import saved_llama
from legacy_reference import EMBEDDING, HEAD, NORM, Rank, logits, split_groups, split_thirds
from megatron_reference import load
from transformers import LlamaForCausalLM

from llama_ds.checkpoint.load_model import kind_of, open_model
from tools import convert

IDS = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(3))
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 8},
    "gqa": {"num_key_value_heads": 4},
    "tied": {"num_key_value_heads": 8, "tie_word_embeddings": True},
}
STEP = Path("global_step0")
# Of a model of 32 hidden, 88 feed-forward, 8 heads of 4 rows, 4 groups and 200 ids (256 rows), on 2 ranks.
LAYER = {
    "input_layernorm.weight": (32,),
    "self_attention.query_key_value.weight": (32, 32),
    "self_attention.dense.weight": (32, 16),
    "post_attention_layernorm.weight": (32,),
    "mlp.dense_h_to_4h.weight": (88, 32),
    "mlp.dense_4h_to_h.weight": (32, 44),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LlamaForCausalLM]:
    """transformers' models, saved in the folders that their `name_or_path` names."""
    root, sizes = tmp_path_factory.mktemp("hf"), {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2}
    return {name: saved_llama(root / name, **sizes, head_dim=4, **shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def written(models: dict[str, LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of a model, converted with some flags."""
    root, folders = tmp_path_factory.mktemp("written"), {}

    def write(name: str, *flags: str) -> Path:
        if (name, flags) not in folders:
            folders[name, flags] = root / str(len(folders))
            words = [models[name].name_or_path, str(folders[name, flags]), "--no-logits", "--tp", "2"]
            assert convert.main([*words, *flags]) == 0
        return folders[name, flags]

    return write


def shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def assert_reads(folder: Path, model: LlamaForCausalLM) -> None:
    found, source = open_model(str(folder)), open_model(model.name_or_path)
    assert kind_of(str(folder)) == "megatron" and found.model == source.model and found.seq_len == source.seq_len
    assert found.tensors.keys() == source.tensors.keys() and found.initializer_range == 0.2
    assert all(torch.equal(found.tensors[key].whole(), source.tensors[key].whole()) for key in source.tensors)


def assert_computes(ranks: list[Rank], args: argparse.Namespace, split: Callable, model: LlamaForCausalLM) -> None:
    """Tolerance for fp32 sums of 32 to 88 terms in another order, in two layers; logits are up to 3."""
    with torch.no_grad():
        found, expected = logits(ranks, args, split, IDS)[..., :200], model(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def pipeline_ranks(folder: Path, layers: int) -> list[Rank]:
    """Return the ranks' weights as GPTModelPipe and PipelineModule.load_state_dir take them from the layer files."""
    ends = {
        1: ("word_embeddings.weight", EMBEDDING),
        layers + 2: ("weight", NORM),
        layers + 3: ("lm_head.weight", HEAD),
    }
    ranks: list[Rank] = [{}, {}]
    for index, rank in enumerate(ranks):
        for path in sorted((folder / STEP).glob(f"layer_*-model_{index:02d}-model_states.pt")):
            number, state = int(path.name[6:8]), torch.load(path, weights_only=True)
            if number in ends:
                rank[ends[number][1]] = state.pop(ends[number][0])
                assert not state
            rank |= {f"language_model.encoder.layers.{number - 2}.{name}": tensor for name, tensor in state.items()}
    return ranks


@pytest.mark.parametrize(
    ("name", "flags", "split"),
    [
        ("mha", (), split_thirds),
        ("mha", ("--to-qkv-order", "heads"), split_groups),
        ("gqa", (), split_groups),
        ("tied", (), split_thirds),
    ],
)
def test_megatron_deepspeed_computes_the_same(
    models: dict[str, LlamaForCausalLM],
    written: Callable[..., Path],
    name: str,
    flags: tuple[str, ...],
    split: Callable[..., Any],
) -> None:
    folder = written(name, "--to", "megatron_deepspeed", "--pp", "2", *flags)
    args = load(folder / STEP / "mp_rank_03_model_states.pt")["args"]
    assert_computes(pipeline_ranks(folder, 2), args, split, models[name])
    assert_reads(folder, models[name])


def test_the_files_of_a_pipeline_are_those_of_megatron_deepspeed(written: Callable[..., Path]) -> None:
    """Names and shapes of GPTModelPipe in megatron/model/gpt_model.py; its first layer is a cast without weights."""
    folder = written("gqa", "--to", "megatron_deepspeed", "--pp", "2")
    table = {
        1: {"word_embeddings.weight": (128, 32)},
        2: LAYER,
        3: LAYER,
        4: {"weight": (32,)},
        5: {"lm_head.weight": (128, 32)},
    }
    found = {path.name: path for path in (folder / STEP).iterdir()}
    for number, wanted in table.items():
        for rank in range(2):
            path = found.pop(f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
            assert shapes(torch.load(path, weights_only=True)) == wanted
    assert set(found) == {f"mp_rank_{rank:02d}_model_states.pt" for rank in range(4)}
    assert (folder / "latest").read_text() == "global_step0"
    tied = written("tied", "--to", "megatron_deepspeed", "--pp", "2")
    assert not list((tied / STEP).glob("layer_05*"))  # the head is the layer of the embedding, which has a file


def test_the_engine_file_has_what_megatron_deepspeed_reads(written: Callable[..., Path]) -> None:
    """`load_checkpoint` in megatron/checkpointing.py reads iteration and version, `check_checkpoint_args` these."""
    state = load(written("gqa", "--to", "megatron_deepspeed", "--pp", "2") / STEP / "mp_rank_00_model_states.pt")
    assert state["module"] is None and state["iteration"] == 0 and state["checkpoint_version"] == 3.0
    args = state["args"]
    found = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4,
        "add_position_embedding": False, "max_position_embeddings": 64, "make_vocab_size_divisible_by": 128,
        "padded_vocab_size": 256, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
        "normalization": "rmsnorm", "rope_theta": 10_000, "swiglu": True, "add_bias_linear": False,
    }  # fmt: skip
    assert {key: getattr(args, key) for key in found} == found
    assert not hasattr(args, "ds_sequence_parallel_fpdt")  # with it, our reader would take blocks


@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_without_a_pipeline_the_state_dict_is_nested(
    models: dict[str, LlamaForCausalLM], written: Callable[..., Path], name: str
) -> None:
    """GPTModel.load_state_dict: `language_model` holds the dicts of embedding, encoder and output layer."""
    folder = written(name, "--to", "megatron_deepspeed", "--pp", "0")
    assert {path.name for path in (folder / STEP).iterdir()} == {
        "mp_rank_00_model_states.pt",
        "mp_rank_01_model_states.pt",
    }
    ranks = []
    for rank in range(2):
        state = load(folder / STEP / f"mp_rank_{rank:02d}_model_states.pt")
        assert state["args"].no_pipeline_parallel and state["args"].pipeline_model_parallel_size == 1
        language = state["module"]["language_model"]
        assert set(state["module"]) == {"language_model"}
        assert set(language) == {"embedding", "encoder", *(["output_layer"] if name == "gqa" else [])}
        assert set(language["embedding"]) == {"word_embeddings"}
        wanted = {f"layers.{i}.{local}": shape for i in range(2) for local, shape in LAYER.items()}
        wanted["final_layernorm.weight"] = (32,)
        if name == "gqa":
            assert shapes(language["encoder"]) == wanted
        flat = {EMBEDDING: language["embedding"]["word_embeddings"]["weight"]}
        flat |= {f"language_model.encoder.{local}": tensor for local, tensor in language["encoder"].items()}
        flat |= {f"language_model.output_layer.{n}": t for n, t in language.get("output_layer", {}).items()}
        ranks.append(flat)
    assert_computes(ranks, state["args"], split_groups if name == "gqa" else split_thirds, models[name])
    assert_reads(folder, models[name])


@pytest.mark.parametrize(("name", "pp"), [("gqa", 1), ("tied", 2)])
def test_the_legacy_model_of_megatron_computes_the_same(
    models: dict[str, LlamaForCausalLM], written: Callable[..., Path], name: str, pp: int
) -> None:
    """megatron/legacy/model calls its norms input_norm, post_attention_norm and final_norm."""
    folder = written(name, "--to", "megatron_legacy", "--pp", str(pp))
    ranks: list[Rank] = [{}, {}]
    for index, rank in enumerate(ranks):
        for stage in range(pp):
            where = folder / "release" / (f"mp_rank_{index:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            state = load(where / "model_optim_rng.pt")
            args, language = state["args"], state["model"]["language_model"]
            wanted = {local.replace("layernorm", "norm"): shape for local, shape in LAYER.items()}
            encoder = {f"layers.{i}.{local}": shape for i in range(2 // pp) for local, shape in wanted.items()}
            encoder |= {"final_norm.weight": (32,)} if stage == pp - 1 else {}
            assert name != "gqa" or shapes(language["encoder"]) == encoder
            for local, tensor in language["encoder"].items():
                if local.startswith("layers."):
                    local = f"layers.{stage}{local[8:]}" if pp > 1 else local
                rank[f"language_model.encoder.{local.replace('_norm', '_layernorm')}"] = tensor
            if "embedding" in language:
                rank[EMBEDDING] = language["embedding"]["word_embeddings"]["weight"]
            if "output_layer" in language:
                rank[HEAD] = language["output_layer"]["weight"]
            if name == "tied" and stage == 1:
                assert torch.equal(state["model"]["word_embeddings_for_head"]["weight"], rank[EMBEDDING])
    values = {"num_key_value_heads": args.num_query_groups, "rope_theta": args.rotary_base}
    args = argparse.Namespace(**vars(args), **values, layernorm_epsilon=args.norm_epsilon)
    assert_computes(ranks, args, split_groups, models[name])
    assert_reads(folder, models[name])


REFUSED = [
    (
        ("--to", "megatron_deepspeed", "--to-qkv-order", "blocks"),
        "has grouped heads, computed by Megatron-DeepSpeed in",
    ),
    (("--to", "megatron", "--to-qkv-order", "heads"), "--to-qkv-order applies only to megatron_deepspeed"),
    (("--to", "megatron", "--pp", "0"), "--pp 0 is not in 1..2"),
    (("--to", "megatron_deepspeed", "--pp", "3"), "--pp 3 is not in 0..2"),
    (("--to", "deepspeed", "--pp", "0"), "--pp 0 is not in 1..2"),
    (("--to", "hf", "--pp", "0"), "--tp and --pp apply only to"),
]


@pytest.mark.parametrize(("flags", "named"), REFUSED)
def test_what_has_no_such_layout_is_refused(
    models: dict[str, LlamaForCausalLM],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    named: str,
) -> None:
    assert convert.main([models["gqa"].name_or_path, str(tmp_path / "out"), *flags]) == 2
    assert named in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "rope", "named"),
    [
        ("megatron_deepspeed", {"rope_type": "default", "rope_theta": 10_000.5}, "rope_theta = 10000.5, which is no"),
        ("megatron_deepspeed", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "rope_type = linear"),
        (
            "megatron_legacy",
            {"rope_type": "default", "rope_theta": 5e5},
            "rotates with base 10000; convert with --to m",
        ),
    ],
)
def test_rotary_embeddings_that_they_do_not_compute_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, rope: dict[str, Any], named: str
) -> None:
    saved_llama(tmp_path / "hf", vocab_size=64, hidden_size=16, num_hidden_layers=1, head_dim=2, rope_parameters=rope)
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "out"), "--to", to]) == 2
    assert named in capsys.readouterr().err
