"""Checkpoints of Megatron-DeepSpeed and of Megatron-LM before Megatron core are read exactly, in each order of rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from legacy_reference import (
    EMBEDDING,
    HEAD,
    NORM,
    QKV,
    Rank,
    args_of,
    logits,
    nested,
    ranks_of,
    save_pipeline,
    split_groups,
    split_thirds,
    transposed,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama_ds.checkpoint.formats.meta_params import Unsaid
from llama_ds.checkpoint.load_model import kind_of, open_model
from llama_ds.errors import UserError

IDS = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(3))
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 8},
    "gqa": {"num_key_value_heads": 4},
    "gqa tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}
SINCE = {"ds_sequence_parallel_fpdt": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LlamaForCausalLM]:
    """transformers' models, saved in the folders that their `name_or_path` names."""
    root, found = tmp_path_factory.mktemp("hf"), {}
    for name, shape in SHAPES.items():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=200, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=8,
            head_dim=4, max_position_embeddings=64, initializer_range=0.2,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, **shape,
        )  # fmt: skip
        found[name] = LlamaForCausalLM(config).eval()
        found[name].name_or_path = str(root / name)
        found[name].save_pretrained(root / name)
    return found


def by_groups(qkv: list[Tensor]) -> Tensor:
    groups = len(qkv[1])
    return torch.cat([t.reshape(groups, -1, t.shape[-1]) for t in qkv], 1)


def in_blocks(qkv: list[Tensor]) -> Tensor:
    return torch.cat(qkv)


def alternating(qkv: list[Tensor]) -> Tensor:
    return torch.stack(qkv, 2)


def assert_reads(folder: Path, model: LlamaForCausalLM, **unsaid: Any) -> None:
    found = open_model(str(folder), vocab_size=200, unsaid=Unsaid(**unsaid))
    source = open_model(model.name_or_path)
    assert kind_of(str(folder)) == "megatron" and found.model == source.model and found.seq_len == source.seq_len
    assert found.tensors.keys() == source.tensors.keys()
    assert all(torch.equal(found.tensors[key].whole(), source.tensors[key].whole()) for key in source.tensors)


def assert_computes(ranks: list[Rank], args: argparse.Namespace, split: Callable, model: LlamaForCausalLM) -> None:
    """Tolerance for fp32 sums of 32 to 88 terms in another order, in two layers; logits are up to 3."""
    with torch.no_grad():
        found, expected = logits(ranks, args, split, IDS)[..., :200], model(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("name", "since"), [("mha", {}), ("mha", SINCE), ("gqa", {}), ("gqa tied", {})], ids=["mha", "new", "gqa", "tied"]
)
def test_megatron_deepspeed_is_read(
    models: dict[str, LlamaForCausalLM], tmp_path: Path, name: str, since: dict[str, Any], tp: int
) -> None:
    """The code of 2024-12-04 orders query, key and value of the same matrix in another way."""
    model, args = models[name], args_of(models[name], tp, 2, **since)
    ranks = ranks_of(model, tp, in_blocks if since else by_groups)
    assert_computes(ranks, args, split_thirds if since else split_groups, model)
    folder = save_pipeline(ranks, args, tmp_path / "saved")
    assert_reads(folder, model)
    assert_reads(folder / "global_step10", model)
    notes = open_model(str(folder), vocab_size=200).notes
    assert [note for note in notes if "in blocks, as Megatron-DeepSpeed computes since 2024-12-04" in note] or not since
    if since:
        other = open_model(str(folder), vocab_size=200, unsaid=Unsaid(qkv_order="heads"))
        key = (1, "self_attn.k_proj.weight")
        assert not torch.equal(other.tensors[key].whole(), open_model(model.name_or_path).tensors[key].whole())


def test_megatron_deepspeed_without_a_pipeline_is_read(models: dict[str, LlamaForCausalLM], tmp_path: Path) -> None:
    where = tmp_path / "saved" / "global_step10"
    where.mkdir(parents=True)
    (tmp_path / "saved" / "latest").write_text("global_step10")
    args = args_of(models["gqa"], 2, 1)
    for index, flat in enumerate(ranks_of(models["gqa"], 2, by_groups)):
        state = {"module": nested(flat), "args": args, "checkpoint_version": 3.0}
        torch.save(state, where / f"mp_rank_{index:02d}_model_states.pt")
    assert_reads(tmp_path / "saved", models["gqa"])


def save_megatron(
    ranks: list[Rank], args: argparse.Namespace, folder: Path, version: float | None, spell: Callable[[str], str]
) -> Path:
    """Write what Megatron-LM saved before Megatron core, with one layer on each of two stages or both on one."""
    pp, layers = args.pipeline_model_parallel_size, args.num_layers
    for index, flat in enumerate(ranks):
        for stage in range(pp):
            own = {}
            for name, tensor in flat.items():
                layer = name.partition(".layers.")[2].partition(".")[0]
                if layer and int(layer) // (layers // pp) == stage:
                    local = name.replace(f".layers.{layer}.", f".layers.{int(layer) % (layers // pp)}.")
                    own[spell(local)] = tensor
                elif not layer and (stage == 0 if name == EMBEDDING else stage == pp - 1):
                    own[spell(name)] = tensor
            state = nested(own)
            if HEAD not in flat and pp > 1 and stage == pp - 1:
                state["word_embeddings_for_head"] = {"weight": flat[EMBEDDING]}
            where = folder / "iter_0000010" / (f"mp_rank_{index:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            where.mkdir(parents=True)
            content = {"args": args, "model": state} | ({} if version is None else {"checkpoint_version": version})
            torch.save(content, where / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


@pytest.mark.parametrize(
    ("version", "fuse"), [(None, in_blocks), (0, in_blocks), (1.0, alternating), (2.0, by_groups), (3.0, by_groups)]
)
def test_each_checkpoint_version_has_its_order(
    models: dict[str, LlamaForCausalLM], tmp_path: Path, version: float | None, fuse: Callable[[list[Tensor]], Tensor]
) -> None:
    ranks, args = ranks_of(models["mha"], 2, fuse), args_of(models["mha"], 2, 2)
    folder = save_megatron(ranks, args, tmp_path / "saved", version, lambda name: name)
    if (version or 0) < 2:
        for rank in ranks:
            for name in [name for name in rank if name.endswith(QKV)]:
                rank[name] = transposed(rank[name], 4, splits_first=not version)
    assert_computes(ranks, args, split_groups, models["mha"])
    assert_reads(folder, models["mha"])


@pytest.mark.parametrize(("name", "pp"), [("gqa", 1), ("gqa tied", 2)])
def test_other_spellings_are_read(models: dict[str, LlamaForCausalLM], tmp_path: Path, name: str, pp: int) -> None:
    """Megatron-LM called its norms input_norm for a while, and the encoder transformer before that."""
    args, old = args_of(models[name], 2, pp), pp == 2
    pairs = [("self_attention", "attention")] if old else [("_layernorm", "_norm")]

    def spell(local: str) -> str:
        for before, after in pairs:
            local = local.replace(before, after) if local != NORM or not old else local
        return local

    folder = save_megatron(ranks_of(models[name], 2, by_groups), args, tmp_path / "saved", 3.0, spell)
    assert_reads(folder, models[name])


@pytest.mark.parametrize(
    ("extra", "flag"),
    [({"rotary_base": 500_000}, "--rope-theta 10000"), ({"use_rope_scaling": True}, "--rope-factor 1")],
)
def test_a_rotary_embedding_that_the_model_ignores_is_asked_for(
    models: dict[str, LlamaForCausalLM], tmp_path: Path, extra: dict[str, Any], flag: str
) -> None:
    """Megatron-LM before Megatron core always rotates with 10000: its `RotaryEmbedding(` gets no other base."""
    args = args_of(models["gqa"], 1, 1, **extra)
    del args.rope_theta
    folder = save_megatron(ranks_of(models["gqa"], 1, by_groups), args, tmp_path / "saved", 3.0, lambda name: name)
    with pytest.raises(UserError, match=f"is ignored by the model with these names.*convert with {flag} "):
        open_model(str(folder), vocab_size=200)
    name = flag.split()[0][2:].replace("-", "_")
    assert_reads(folder, models["gqa"], **{name: float(flag.split()[1])})
    found = open_model(str(folder), vocab_size=200, unsaid=Unsaid(**{name: 32.0})).model
    assert (found.rope_theta, found.rope_scaling and found.rope_scaling.factor) in ((32, None), (10_000, 32))
    args.rotary_base, args.use_rope_scaling = 10_000, False  # as an export of ours has it
    folder = save_megatron(ranks_of(models["gqa"], 1, by_groups), args, tmp_path / "plain", 3.0, lambda name: name)
    assert_reads(folder, models["gqa"])
    with pytest.raises(UserError, match="command line: --rope-theta does not apply to"):
        open_model(str(folder), vocab_size=200, unsaid=Unsaid(rope_theta=10_000.0))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


DAMAGES: list[tuple[str, Callable[[Any], object], str]] = [
    ("mp_rank_00", lambda s: setattr(s["args"], "normalization", None), "args.normalization = 'LayerNorm' makes a"),
    ("mp_rank_00", lambda s: setattr(s["args"], "num_experts", [8]), "args.num_experts = [8] makes a"),
    ("mp_rank_00", lambda s: setattr(s["args"], "use_rotary_position_embeddings", False), "'learned_absolute' makes"),
    ("mp_rank_00", lambda s: setattr(s["args"], "num_layers", 3), "layer 6 of 6 is missing"),
    (
        "mp_rank_00",
        lambda s: setattr(s["args"], "num_layers", 1),
        "layer 5 is none of a model with args.num_layers = 1",
    ),
    (
        "mp_rank_00",
        lambda s: setattr(s["args"], "tensor_model_parallel_size", 4),
        "holds files of 2 ranks, args.tensor",
    ),
    ("mp_rank_00", lambda s: s.pop("args"), "holds no args"),
    ("layer_03-model_01", lambda s: s.pop("mlp.dense_4h_to_h.weight"), "layers.1.mlp.linear_fc2.weight) is missing"),
    ("layer_03-model_01", lambda s: s.update({"mlp.bias": torch.ones(2)}), "layers.1.mlp.bias) is unknown"),
    ("layer_03-model_00", lambda s: s.update({QKV: torch.ones(8, 32)}), "has shape [8, 32], args implies [32, 32]"),
    ("layer_04-model_01", lambda s: s["weight"].add_(1), "final_layernorm.weight differs from that of"),
]


@pytest.mark.parametrize(("name", "change", "named"), DAMAGES)
def test_other_models_and_damage_are_refused(
    models: dict[str, LlamaForCausalLM], tmp_path: Path, name: str, change: Callable[[Any], object], named: str
) -> None:
    ranks = ranks_of(models["gqa"], 2, by_groups)
    folder = save_pipeline(ranks, args_of(models["gqa"], 2, 1), tmp_path / "saved")
    (path,) = (folder / "global_step10").glob(f"{name}*")
    edit(path, change)
    with pytest.raises(UserError) as error:
        open_model(str(folder), vocab_size=200)
    assert named in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_the_size_of_the_vocabulary_is_asked_for(models: dict[str, LlamaForCausalLM], tmp_path: Path) -> None:
    ranks = ranks_of(models["gqa"], 1, by_groups)
    folder = save_pipeline(ranks, args_of(models["gqa"], 1, 1), tmp_path / "saved")
    with pytest.raises(UserError, match=r"args\.vocab_size is missing, and some of the 256 rows .* --vocab-size N"):
        open_model(str(folder))
