"""Exports compute the same logits in GPT-NeoX's architecture, and its checkpoints, old and new, are read exactly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import saved_llama
from neox_reference import NeoxModel, load
from pickled_call import PickledCall
from transformers import LlamaForCausalLM

from llama_ds.checkpoint.formats.meta_params import Unsaid
from llama_ds.checkpoint.load_model import kind_of, open_as_found, open_model
from llama_ds.checkpoint.model_shape import model_in
from llama_ds.errors import UserError
from tools import convert

IDS = torch.randint(0, 192, (2, 32), generator=torch.Generator().manual_seed(3))
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 8, "rms_norm_eps": 1e-6},
    "gqa": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "gqa tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}
PATH = "global_step0/layer_{:02d}-model_{:02d}-model_states.pt"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LlamaForCausalLM]:
    """transformers' models, saved in the folders that their `name_or_path` names."""
    root, sizes = tmp_path_factory.mktemp("hf"), {"vocab_size": 192, "hidden_size": 64, "num_hidden_layers": 2}
    return {name: saved_llama(root / name, **sizes | shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def written(models: dict[str, LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of a model, converted to GPT-NeoX's format once for each number of ranks."""
    root, folders = tmp_path_factory.mktemp("neox"), {}

    def write(name: str, tp: int, pp: int = 1) -> Path:
        if (name, tp) not in folders:
            folders[name, tp] = root / str(len(folders))
            words = [models[name].name_or_path, str(folders[name, tp]), "--to", "neox", "--no-logits"]
            assert convert.main([*words, "--tp", str(tp), "--pp", str(pp)]) == 0
        return folders[name, tp]

    return write


def weights(folder: str | Path, **arguments: Any) -> dict[Any, torch.Tensor]:
    return {key: tensor.whole() for key, tensor in open_model(str(folder), **arguments).tensors.items()}


def assert_same(found: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Tolerance for fp32 sums of 64 to 88 terms in another order, in two layers; logits are up to 5."""
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_gpt_neox_computes_the_same(
    models: dict[str, LlamaForCausalLM], written: Callable[..., Path], name: str, tp: int
) -> None:
    folder = written(name, tp, pp=2)
    with torch.no_grad():
        assert_close(NeoxModel(folder)(IDS), models[name](IDS).logits)
    source, found = open_model(models[name].name_or_path), open_model(str(folder))
    assert_same(weights(folder), weights(models[name].name_or_path))
    assert (found.model, found.seq_len, found.dtype) == (source.model, source.seq_len, source.dtype)
    assert found.initializer_range == 0.2 and kind_of(str(folder)) == "neox"
    assert len(list((folder / "global_step0").glob("mp_rank_*"))) == 2 * tp


def test_without_a_pipeline_each_rank_has_one_file(
    models: dict[str, LlamaForCausalLM], written: Callable[..., Path], tmp_path: Path
) -> None:
    """`to_sequential` in megatron/model/gpt2_model.py numbers the layers like the pipeline."""
    words = [models["gqa"].name_or_path, str(tmp_path / "n"), "--to", "neox", "--tp", "2", "--pp", "0", "--no-logits"]
    assert convert.main(words) == 0
    where = tmp_path / "n" / "global_step0"
    assert json.loads((where / "configs" / "llama_ds.yml").read_text())["pipe_parallel_size"] == 0
    assert not list(where.glob("layer_*"))
    for rank in range(2):
        module = torch.load(where / f"mp_rank_{rank:02d}_model_states.pt", weights_only=True)["module"]
        layers = {}
        for path in written("gqa", 2).glob(f"global_step0/layer_*-model_{rank:02d}-*"):
            number = int(path.name[6:8])
            layers |= {f"sequential.{number}.{n}": t for n, t in torch.load(path, weights_only=True).items()}
        assert_same(module, layers)
        assert {"sequential.0.word_embeddings.weight", "sequential.5.norm.scale"} <= module.keys()
    assert_same(weights(tmp_path / "n"), weights(models["gqa"].name_or_path))


def test_it_comes_back_to_hugging_face(
    models: dict[str, LlamaForCausalLM], written: Callable[..., Path], tmp_path: Path
) -> None:
    assert convert.main([str(written("gqa", 2)), str(tmp_path / "hf"), "--to", "hf"]) == 0
    back = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert_same(back.state_dict(), models["gqa"].state_dict())


def split(t: torch.Tensor, ranks: int, dim: int) -> tuple[torch.Tensor, ...]:
    return torch.chunk(t, ranks, dim)


def old_checkpoint(model: LlamaForCausalLM, folder: Path, tp: int, sequential: bool) -> Path:
    """Write what convert_raw_llama_weights_to_neox.py writes: w1, w2 and w3, and keys in shares of each head."""
    state, config = model.state_dict(), model.config
    heads, hidden, layers = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    ranks: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in range(tp)]

    def put(layer: int, name: str, parts: tuple[torch.Tensor, ...]) -> None:
        for rank, part in zip(ranks, parts, strict=True):
            rank.setdefault(layer, {})[name] = part.clone()

    put(0, "word_embeddings.weight", split(state["model.embed_tokens.weight"], tp, 0))
    put(layers + 3, "norm.scale", (state["model.norm.weight"],) * tp)
    put(layers + 4, "final_linear.weight", split(state["lm_head.weight"], tp, 0))
    for layer in range(layers):
        own = {n.removeprefix(f"model.layers.{layer}."): t for n, t in state.items() if f".{layer}." in n}
        qkv = [own[f"self_attn.{name}_proj.weight"].view(heads, -1, hidden) for name in "qkv"]
        put(layer + 2, "attention.query_key_value.weight", split(torch.cat(qkv, 1).view(-1, hidden), tp, 0))
        put(layer + 2, "attention.dense.weight", split(own["self_attn.o_proj.weight"], tp, 1))
        put(layer + 2, "attention.rotary_emb.inv_freq", (10_000.0 ** (-torch.arange(0, 8, 2) / 8),) * tp)
        for name, old, dim in (("gate", "w1", 0), ("down", "w2", 1), ("up", "w3", 0)):
            put(layer + 2, f"mlp.{old}.weight", split(own[f"mlp.{name}_proj.weight"], tp, dim))
        for name in ("input_layernorm", "post_attention_layernorm"):
            put(layer + 2, f"{name}.scale", (own[f"{name}.weight"],) * tp)
    where = folder / "global_step0"
    (where / "configs").mkdir(parents=True)
    (folder / "latest").write_text("global_step0")
    for index, layered in enumerate(ranks):
        module = {f"sequential.{i}.{name}": t for i, part in layered.items() for name, t in part.items()}
        args = {"num_layers": layers, "hidden_size": hidden, "padded_vocab_size": 192, "tokenizer_type": "SPM"}
        state = {"module": module if sequential else {}, "args": args, "iteration": 1, "ds_config": {"a": 1}}
        torch.save(state, where / f"mp_rank_{index:02d}_model_states.pt")
        for layer, part in {} if sequential else layered.items():
            torch.save(part, folder / PATH.format(layer, index))
    text = {
        "num-layers": layers, "hidden-size": hidden, "num-attention-heads": heads, "model-parallel-size": tp,
        "num_kv_heads": config.num_key_value_heads, "max-position-embeddings": 64, "pos-emb": "rotary",
        "rotary-pct": 1, "norm": "rmsnorm", "rms_norm_epsilon": config.rms_norm_eps, "no-weight-tying": True,
        "rotary_emb_base": config.rope_parameters["rope_theta"], "mlp_type": "llama", "activation": "silu",
        "attention-config": [[["flash"], layers]], "use_bias_in_attn_linear": False,
    }  # fmt: skip
    (where / "configs" / "llama.yml").write_text(json.dumps(text))
    return folder


class Old(NeoxModel):
    """The reference of an old checkpoint, whose configuration has other spellings."""

    def __init__(self, folder: Path) -> None:
        super().__init__(link(folder), present=False)


def link(folder: Path) -> Path:
    """Return a copy of a checkpoint with underscores in its configuration."""
    copy = folder.with_name(folder.name + "_copy")
    shutil.copytree(folder, copy)
    path = copy / "global_step0" / "configs" / "llama.yml"
    path.write_text(json.dumps({key.replace("-", "_"): value for key, value in json.loads(path.read_text()).items()}))
    return copy


@pytest.mark.parametrize(("tp", "sequential"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_checkpoints_of_earlier_code_are_read(
    models: dict[str, LlamaForCausalLM], tmp_path: Path, name: str, tp: int, sequential: bool
) -> None:
    folder = old_checkpoint(models[name], tmp_path / "old", tp, sequential)
    with torch.no_grad():
        assert_close(Old(folder)(IDS), models[name](IDS).logits)
    assert_same(weights(folder), weights(models[name].name_or_path))
    found = open_model(str(folder / "global_step0"))
    assert found.model == open_model(models[name].name_or_path).model and kind_of(str(folder)) == "neox"
    assert "rotary frequencies, which follow from rope_theta: dropped" in found.notes[0]


@pytest.fixture
def saved(written: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of GPT-NeoX's present code on two ranks, of grouped heads, which this project did not write."""
    shutil.copytree(written("gqa", 2), tmp_path / "saved")
    for path in (tmp_path / "saved").glob("*/mp_rank_*"):
        torch.save({**load(path), "llama_ds": None, "args": {"num_layers": 2, "model_parallel_size": 2}}, path)
    return tmp_path / "saved"


def test_the_order_of_grouped_heads_is_asked_for(saved: Path, models: dict[str, LlamaForCausalLM]) -> None:
    """Code before and after 2024-11-13 computes other things with the same files, which say nothing of their age."""
    with pytest.raises(UserError, match=r"does not say how the rows .* --qkv-order blocks if .* 2024-11-13"):
        open_model(str(saved))
    expected = weights(models["gqa"].name_or_path)
    assert_same(weights(saved, unsaid=Unsaid(qkv_order="blocks")), expected)
    other = weights(saved, unsaid=Unsaid(qkv_order="heads"))
    assert not torch.equal(other[1, "self_attn.k_proj.weight"], expected[1, "self_attn.k_proj.weight"])


def test_flags_that_do_not_apply_are_refused(
    written: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(written("gqa", 2)), str(tmp_path / "x"), "--to", "hf"]
    for flags, named in (
        (["--qkv-order", "heads"], "mp_rank_00_model_states.pt has blocks; omit it"),
        (["--rope-factor", "8"], "--rope-factor does not apply"),
    ):
        assert convert.main([*words, *flags]) == 2
        assert named in capsys.readouterr().err


def set_config(folder: Path, **values: Any) -> None:
    (path,) = (folder / "global_step0" / "configs").iterdir()
    path.write_text(json.dumps({k: v for k, v in {**json.loads(path.read_text()), **values}.items() if v is not None}))


UNSUPPORTED = [
    ({"norm": "layernorm"}, "norm = 'layernorm' makes a model that is not a plain LLaMA (of a LLaMA: rmsnorm)"),
    ({"norm": None}, "norm is missing, and its default makes another model"),
    ({"pos_emb": "alibi"}, "pos_emb = 'alibi' makes"),
    ({"rotary_pct": 0.25}, "rotary_pct = 0.25 makes"),
    ({"activation": "geglu"}, "activation = 'geglu' makes"),
    ({"use_bias_in_mlp": True}, "use_bias_in_mlp = True makes"),
    ({"gpt_j_residual": True}, "gpt_j_residual = True makes"),
    ({"moe_num_experts": 8}, "moe_num_experts = 8 makes"),
    ({"sliding_window_width": 128}, "sliding_window_width = 128 makes"),
    ({"attention_config": [[["global", "local"], 1]]}, "attention_config has local"),
    ({"hidden_size": None}, "hidden_size is missing and has no default"),
    ({"num_attention_heads": 7}, "num_attention_heads = 7 does not divide hidden_size = 64"),
    ({"num_kv_heads": 8}, "query_key_value.weight has shape [64, 64], the configuration implies [96, 64]"),
    ({"num_layers": 3}, "args.num_layers = 2, "),
    ({"model_parallel_size": 4}, "model_parallel_size = 4, the files are those of 2 ranks"),
    ({"no_weight_tying": False}, "layer 6 (final_linear.weight) is not one of a model of this"),
]


@pytest.mark.parametrize(("values", "named"), UNSUPPORTED)
def test_configurations_of_another_model_are_refused(saved: Path, values: dict[str, Any], named: str) -> None:
    set_config(saved, **values)
    with pytest.raises(UserError) as error:
        open_model(str(saved), unsaid=Unsaid(qkv_order="blocks"))
    assert named in str(error.value) and str(saved) in str(error.value) and "\n" not in str(error.value)


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load(path)
    edit(state)
    torch.save(state, path)


def test_damaged_folders_are_refused(saved: Path) -> None:
    def refused(named: str) -> None:
        with pytest.raises(UserError, match=named):
            open_model(str(saved), unsaid=Unsaid(qkv_order="blocks"))

    layer = saved / PATH.format(2, 1)
    change(layer, lambda state: state.update({"mlp.linear1.bias": torch.ones(88)}))
    refused(r"layer_02-model_01.*1 tensor \(mlp\.linear1\.bias\) is unknown")
    change(layer, lambda state: state.pop("mlp.linear1.bias"))
    change(layer, lambda state: state["input_layernorm.scale"].add_(1))
    refused(r"mp_rank_01.*layer 2 input_layernorm\.scale differs from that of .* by up to 1: parts of two models")
    change(layer, lambda state: state["input_layernorm.scale"].sub_(1).add_(1e-3))
    notes = open_model(str(saved), unsaid=Unsaid(qkv_order="blocks")).notes
    assert "1 of 5 differ in the files of other ranks, by at most 0.001" in notes[0]
    layer.unlink()
    refused(r"layer_02-model_01-model_states\.pt: cannot be read")
    (saved / PATH.format(2, 0)).unlink()
    refused("has no layer 2; copy the checkpoint again")
    (saved / "latest").write_text("../global_step0")
    with pytest.raises(UserError, match=r"latest: names '\.\./global_step0', which is not there"):
        open_model(str(saved), "neox")
    with pytest.raises(UserError, match=r"latest: names '\.\./global_step0', which is not there"):
        open_model(str(saved))


def test_the_configuration_is_asked_for(saved: Path) -> None:
    configs = saved / "global_step0" / "configs"
    shutil.copy(configs / "llama_ds.yml", configs / "more.yml")
    with pytest.raises(UserError, match=r"more\.yml: pipe_parallel_size is set in .*llama_ds\.yml, too"):
        open_model(str(saved))
    shutil.rmtree(configs)
    with pytest.raises(UserError, match=r"contains no configs/\*\.yml, which describe the model; copy"):
        open_model(str(saved))


def test_nothing_in_a_pickle_is_executed(saved: Path, tmp_path: Path) -> None:
    for path in (saved / PATH.format(2, 0), saved / "global_step0" / "mp_rank_00_model_states.pt"):
        before = load(path)
        torch.save({**before, "more": PickledCall(os.mkdir, str(tmp_path / "executed"))}, path)
        with pytest.raises(UserError, match=rf"{path.name}: holds posix\.mkdir, which is neither a tensor .* executed"):
            open_model(str(saved), unsaid=Unsaid(qkv_order="blocks"))
        torch.save(before, path)
    assert not (tmp_path / "executed").exists()


def test_what_it_cannot_compute_is_refused(
    tmp_path: Path, models: dict[str, LlamaForCausalLM], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(models["mha"].name_or_path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert convert.main([str(folder), str(tmp_path / "x"), "--to", "neox"]) == 2
    assert "GPT-NeoX computes llama3 only" in capsys.readouterr().err


def test_an_incomplete_checkpoint_of_this_project_is_not_taken_for_one(
    tmp_path: Path, models: dict[str, LlamaForCausalLM]
) -> None:
    """It has files of the same names."""
    folder = tmp_path / "ds"
    assert convert.main([models["mha"].name_or_path, str(folder), "--to", "deepspeed", "--no-logits"]) == 0
    (folder / "llama_ds.json").unlink()
    with pytest.raises(UserError, match=r"contains none of llama_ds\.json"):
        kind_of(str(folder))


def test_where_no_flag_can_be_given_the_command_that_takes_it_is_named(
    models: dict[str, LlamaForCausalLM], written: Callable[..., Path], tmp_path: Path
) -> None:
    """checkpoint.start_from and model.from have no --qkv-order."""
    folder = tmp_path / "neox"
    shutil.copytree(written("gqa", 1), folder)
    path = folder / "global_step0" / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(path, weights_only=True), "llama_ds": {}}, path)
    for opened in (open_as_found, model_in):
        with pytest.raises(
            UserError, match=r"heads\. The command is: tools/convert\.py \S+/neox NEW --to deepspeed --qkv"
        ):
            opened(str(folder))
    words = ["--to", "deepspeed", "--qkv-order", "blocks", "--no-logits"]
    assert convert.main([str(folder), str(tmp_path / "new"), *words]) == 0
    assert_same(weights(tmp_path / "new"), weights(models["gqa"].name_or_path))
    assert open_as_found(str(tmp_path / "new")).model == model_in(str(tmp_path / "new"))
