"""Exports compute the same logits in Megatron core's architecture, and checkpoints of Megatron-LM are read exactly."""

from __future__ import annotations

import enum
import io
import os
import pickle
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import saved_llama
from megatron_reference import MegatronModel, load
from pickled_call import PickledCall
from transformers import LlamaForCausalLM

from llama_ds.checkpoint.formats.fused import Fused, Unfused
from llama_ds.checkpoint.formats.meta_params import Unsaid
from llama_ds.checkpoint.load_model import kind_of, open_model
from llama_ds.errors import UserError
from tools import convert

IDS = torch.randint(0, 200, (2, 32), generator=torch.Generator().manual_seed(3))
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 8, "rms_norm_eps": 1e-6},
    "gqa": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "gqa tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LlamaForCausalLM]:
    """transformers' models, saved in the folders that their `name_or_path` names."""
    root, sizes = (
        tmp_path_factory.mktemp("hf"),
        {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 4, "head_dim": 8},
    )
    return {name: saved_llama(root / name, **sizes | shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def written(models: dict[str, LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of a model, converted to Megatron-LM's format once for each layout."""
    root, folders = tmp_path_factory.mktemp("megatron"), {}

    def write(name: str, tp: int, pp: int, impl: str = "transformer_engine") -> Path:
        key = (name, tp, pp, impl)
        if key not in folders:
            folders[key] = root / str(len(folders))
            words = [models[name].name_or_path, str(folders[key]), "--to", "megatron", "--no-logits"]
            flags = ["--tp", str(tp), "--pp", str(pp), "--transformer-impl", impl]
            assert convert.main([*words, *flags]) == 0
        return folders[key]

    return write


def weights(folder: str | Path, **arguments: Any) -> dict[Any, torch.Tensor]:
    return {key: tensor.whole() for key, tensor in open_model(str(folder), **arguments).tensors.items()}


def assert_same(found: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_megatron_computes_the_same(
    models: dict[str, LlamaForCausalLM], written: Callable[..., Path], name: str, tp: int, pp: int
) -> None:
    folder = written(name, tp, pp, "local" if tp == 2 else "transformer_engine")
    # Tolerance for fp32 sums of 32 to 88 terms in another order, in four layers; logits are up to 3.
    with torch.no_grad():
        torch.testing.assert_close(MegatronModel(folder)(IDS), models[name](IDS).logits, atol=1e-5, rtol=0)
    source, found = open_model(models[name].name_or_path), open_model(str(folder))
    assert_same(weights(folder), weights(models[name].name_or_path))
    assert (found.model, found.seq_len, found.dtype) == (source.model, source.seq_len, source.dtype)
    assert found.initializer_range == 0.2 and kind_of(str(folder)) == "megatron"


def test_it_comes_back_to_hugging_face(
    models: dict[str, LlamaForCausalLM], written: Callable[..., Path], tmp_path: Path
) -> None:
    assert convert.main([str(written("gqa", 2, 2)), str(tmp_path / "hf"), "--to", "hf"]) == 0
    back = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert_same(back.state_dict(), models["gqa"].state_dict())
    assert back.config.rope_parameters == models["gqa"].config.rope_parameters


def test_the_flags_that_megatron_does_not_read_from_a_checkpoint_are_printed(
    models: dict[str, LlamaForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--to", "megatron", "--no-logits", "--tp", "2", "--dtype", "bf16"]
    assert convert.main([models["gqa"].name_or_path, str(tmp_path / "m"), *words]) == 0
    assert (
        "--use-checkpoint-args --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --transformer-impl "
        "transformer_engine --norm-epsilon 1e-06 --use-rope-scaling --rope-scaling-factor 8.0 --bf16\n"
    ) in capsys.readouterr().out
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text() == "release\n"
    state = load(tmp_path / "m" / "release" / "mp_rank_01" / "model_optim_rng.pt")
    assert state["args"].params_dtype == torch.bfloat16 and state["args"].padded_vocab_size == 256
    assert state["checkpoint_version"] == 3.0 and state["iteration"] == 0
    assert state["model"]["decoder.layers.3.mlp.linear_fc1._extra_state"] is None


# Of what load_args_from_checkpoint in megatron/training/checkpointing.py takes from the args, what describes a LLaMA.
TAKEN = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "seq_length", "num_attention_heads", "num_query_groups"),
    *("group_query_attention", "kv_channels", "max_position_embeddings", "position_embedding_type"),
    *("add_position_embedding", "use_rotary_position_embeddings", "rotary_base", "rotary_percent"),
    *("rotary_interleaved", "add_bias_linear", "add_qkv_bias", "squared_relu", "swiglu", "apply_layernorm_1p"),
    *("untie_embeddings_and_output_weights", "normalization", "apply_query_key_layer_scaling", "attention_dropout"),
    *("hidden_dropout", "padded_vocab_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
)


def test_args_hold_what_use_checkpoint_args_takes(written: Callable[..., Path]) -> None:
    """Megatron-LM falls back to its own default for one that is None."""
    args = load(written("gqa", 2, 2) / "release" / "mp_rank_00_000" / "model_optim_rng.pt")["args"]
    assert [name for name in TAKEN if getattr(args, name, None) is None] == []
    assert (args.attention_dropout, args.hidden_dropout, args.iteration) == (0.0, 0.0, 0)


@pytest.fixture
def saved(written: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint on two tensor-parallel ranks and two stages, as a training run of Megatron-LM saves it."""
    return as_training(written("gqa", 2, 2), tmp_path / "saved", pp=2)


def as_training(source: Path, folder: Path, pp: int) -> Path:
    (folder / "iter_0000100").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    for path in (source / "release").glob("*/*.pt"):
        state = load(path)
        (folder / "iter_0000100" / path.parent.name).mkdir()
        vars(state["args"]).update(params_dtype=torch.float32, lr=1e-4, load=None, data_path=["a", 1], iteration=100)
        for name in [name for name in state["model"] if name.endswith("_extra_state")]:
            state["model"][name] = io.BytesIO(b"scales")
        state["optimizer"] = {"state": {0: {"exp_avg": torch.ones(7)}}, "param_groups": [{"lr": 1e-4}]}
        state["rng_state"] = [{"random_rng_state": (3, (1, 2), None), "torch_rng_state": torch.get_rng_state()}]
        torch.save(state, folder / "iter_0000100" / path.parent.name / path.name)
    return folder


def change(folder: Path, edit: Callable[[dict[str, Any]], object], ranks: str = "*") -> None:
    """Edit the files of some ranks."""
    for path in folder.glob(f"*/mp_rank_{ranks}/*.pt"):
        with torch.serialization.safe_globals([io.BytesIO]):
            state = load(path)
        edit(state)
        torch.save(state, path)


@pytest.fixture
def megatron_classes() -> Iterator[types.ModuleType]:
    """A module with the classes that real args hold, while a file is written; it cannot be imported afterwards."""
    module = types.ModuleType("megatron_enums")
    sys.modules[module.__name__] = module
    module.AttnBackend = enum.Enum("AttnBackend", {"flash": 1, "auto": 5}, module=module.__name__)
    yield module
    sys.modules.pop(module.__name__, None)


def test_what_training_saves_is_read(
    saved: Path, models: dict[str, LlamaForCausalLM], megatron_classes: types.ModuleType
) -> None:
    """Args hold objects of classes that are not installed here; states of optimizer and random numbers are skipped."""
    change(saved, lambda state: setattr(state["args"], "attention_backend", megatron_classes.AttnBackend.auto))
    del sys.modules["megatron_enums"]
    expected = weights(models["gqa"].name_or_path)
    assert_same(weights(saved), expected)
    assert_same(weights(saved / "iter_0000100"), expected)


def test_chunks_of_a_virtual_pipeline_are_in_the_order_of_their_layers(
    saved: Path, models: dict[str, LlamaForCausalLM], written: Callable[..., Path]
) -> None:
    """Two stages with two chunks of one layer: stage 0 holds layers 0 and 2, stage 1 holds layers 1 and 3."""
    for rank in range(2):
        whole = load(written("gqa", 2, 1) / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")["model"]
        for stage in range(2):
            path = saved / "iter_0000100" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
            chunks = {}
            for chunk in range(2):
                layer = f"decoder.layers.{2 * chunk + stage}."
                chunks[f"model{chunk}"] = {
                    name.replace(layer, "decoder.layers.0."): tensor
                    for name, tensor in whole.items()
                    if name.startswith(layer)
                    or (name.startswith("embedding") and stage == chunk == 0)
                    or (name.startswith(("decoder.final", "output")) and stage == chunk == 1)
                }
            with torch.serialization.safe_globals([io.BytesIO]):
                state = load(path)
            del state["model"]
            torch.save({**state, **chunks}, path)
    assert_same(weights(saved), weights(models["gqa"].name_or_path))


def test_adjacent_rotary_pairs_are_reordered(saved: Path, models: dict[str, LlamaForCausalLM]) -> None:
    """rotary_interleaved computes with pairs of adjacent rows; the weights are the same, so the logits are not."""
    change(saved, lambda state: setattr(state["args"], "rotary_interleaved", True))
    files = open_model(str(saved))
    source = weights(models["gqa"].name_or_path)
    for name, heads in (("q_proj", 8), ("k_proj", 4)):
        key = (1, f"self_attn.{name}.weight")
        pairs = source[key].view(heads, 4, 2, 32).transpose(1, 2).reshape(-1, 32)
        assert torch.equal(files.tensors[key].whole(), pairs)


def test_the_size_of_the_vocabulary_is_asked_for(saved: Path) -> None:
    """Megatron-LM's args have it only where the tokenizer does not say it; rows beyond it are padding."""
    change(saved, lambda state: delattr(state["args"], "vocab_size"))
    with pytest.raises(UserError, match=r"args\.vocab_size is missing, and some of the 256 rows .* --vocab-size N"):
        open_model(str(saved))
    for size in (200, 256):
        assert open_model(str(saved), vocab_size=size).tensors[0, "weight"].shape == (size, 32)


def test_the_factor_of_the_rotary_scaling_is_asked_for(saved: Path) -> None:
    change(saved, lambda state: delattr(state["args"], "rope_scaling_factor"))
    with pytest.raises(UserError, match=r"args\.rope_scaling_factor is missing; convert with --rope-factor 8"):
        open_model(str(saved))
    assert open_model(str(saved), unsaid=Unsaid(rope_factor=32.0)).model.rope_scaling.factor == 32


UNSUPPORTED = [
    ({"normalization": "LayerNorm"}, "args.normalization = 'LayerNorm' makes a model that is not a plain LLaMA"),
    ({"swiglu": False}, "args.swiglu = False makes"),
    ({"add_bias_linear": True}, "args.add_bias_linear = True makes"),
    ({"position_embedding_type": "learned_absolute"}, "args.position_embedding_type = 'learned_absolute' makes"),
    ({"qk_layernorm": True}, "args.qk_layernorm = True makes"),
    ({"num_experts": 8}, "args.num_experts = 8 makes"),
    ({"rotary_percent": 0.5}, "args.rotary_percent = 0.5 makes"),
    ({"window_size": (128, 0)}, "args.window_size = (128, 0) makes"),
    ({"swiglu": None}, "args.swiglu is missing and has no default"),
    ({"norm_epsilon": None}, "args.norm_epsilon is missing and has no default"),
    ({"num_layers": "many"}, "args.num_layers = 'many' is not an integer"),
    ({"num_layers": 6}, "hold 4 layers, args.num_layers = 6"),
    ({"num_query_groups": 2}, "linear_qkv.weight has shape [64, 32], args implies [48, 32]"),
    ({"ffn_hidden_size": 80}, "linear_fc2.weight has shape [32, 44], args implies [32, 40]"),
    ({"vocab_size": 300}, "args.vocab_size = 300 is above padded_vocab_size = 256"),
    ({"tensor_model_parallel_size": 4}, "mp_rank_02_000 is missing (args say tensor_model_parallel_size = 4"),
    ({"tensor_model_parallel_size": 1}, "mp_rank_01_000 is of no rank of this checkpoint"),
]


@pytest.mark.parametrize(("args", "named"), UNSUPPORTED)
def test_args_of_another_model_are_refused(saved: Path, args: dict[str, Any], named: str) -> None:
    change(saved, lambda state: vars(state["args"]).update(args))
    with pytest.raises(UserError) as error:
        open_model(str(saved))
    assert named in str(error.value) and str(saved) in str(error.value) and "\n" not in str(error.value)


DAMAGES: list[tuple[Callable[[dict[str, Any]], object], str, str]] = [
    (lambda state: state.pop("args"), "*", "holds no args"),
    (lambda state: state.pop("model"), "*", "holds no state dict named model"),
    (lambda state: state.update(checkpoint_version=2.0), "*", "checkpoint_version = 2.0, this project reads 3 and"),
    (lambda state: setattr(state["args"], "norm_epsilon", 1e-5), "01_001", "its args differ from those of rank 0"),
    (lambda state: state["model"].pop("output_layer.weight"), "01_001", "1 tensor (output_layer.weight) is missing"),
    (lambda state: state["model"].update(more=torch.ones(2)), "00_000", "1 tensor (more) is unknown"),
    (lambda state: state["model"]["decoder.final_layernorm.weight"].add_(1), "01_001", "differs from that of"),
]


@pytest.mark.parametrize(("damage", "ranks", "named"), DAMAGES)
def test_files_that_do_not_belong_together_are_refused(
    saved: Path, damage: Callable[[dict[str, Any]], object], ranks: str, named: str
) -> None:
    change(saved, damage, ranks)
    with pytest.raises(UserError) as error:
        open_model(str(saved))
    assert named in str(error.value) and str(saved) in str(error.value)


def test_missing_files_are_named(saved: Path) -> None:
    where = saved / "iter_0000100"
    (where / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(UserError, match=r"mp_rank_01_001/model_optim_rng\.pt: cannot be read \(No such file"):
        open_model(str(saved))
    shutil.rmtree(where / "mp_rank_01_001")
    with pytest.raises(UserError, match=r"mp_rank_01_001 is missing \(args say tensor_model_parallel_size = 2"):
        open_model(str(saved))
    for path in where.iterdir():
        shutil.rmtree(path)
    with pytest.raises(UserError, match=r"iter_0000100: contains no mp_rank_00/model_optim_rng\.pt"):
        open_model(str(saved))
    (where / ".metadata").touch()
    with pytest.raises(UserError, match=r"is a distributed checkpoint .* --ckpt-convert-format torch"):
        open_model(str(saved))
    for text, named in (("200", "names iter_0000200, which is not there"), ("../x", "neither an iteration nor")):
        (saved / "latest_checkpointed_iteration.txt").write_text(text)
        with pytest.raises(UserError, match=named):
            open_model(str(saved))


@pytest.mark.parametrize("function", [os.system, exec, os.mkdir, pickle.loads])
@pytest.mark.parametrize("key", ["args", "model", "inside args"])
def test_nothing_in_a_pickle_is_executed(
    saved: Path, tmp_path: Path, function: Callable[..., object], key: str
) -> None:
    target = tmp_path / "executed"
    argument: object = {
        os.system: f"mkdir {target}",
        exec: f"import os; os.mkdir({str(target)!r})",
        os.mkdir: str(target),
        pickle.loads: pickle.dumps(PickledCall(os.mkdir, str(target))),
    }[function]
    attack = PickledCall(function, argument)
    change(saved, lambda state: state["args"].__setattr__("lr", attack) if " " in key else state.update({key: attack}))
    try:
        open_model(str(saved))
        assert key == "inside args"  # inert: this argument is not read
    except UserError as error:
        assert str(saved) in str(error)
    assert not target.exists()


def test_layers_that_stages_cannot_share_are_refused(
    models: dict[str, LlamaForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, named in ((["--pp", "3"], "use 1, 2 or 4"), (["--tp", "8"], "use 1, 2 or 4")):
        assert convert.main([models["gqa"].name_or_path, str(tmp_path / "m"), "--to", "megatron", *flags]) == 2
        assert named in capsys.readouterr().err


def test_any_range_of_a_fused_matrix_is_read() -> None:
    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), tensor.dtype

        def read(self, out: torch.Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
            begin = rank * (self.tensor.numel() // size) + start
            out.view(-1).copy_(self.tensor.view(-1)[begin : begin + out.numel()])

    lengths = (6, 2, 2)
    parts = [torch.randn(4 * length, 3, generator=torch.Generator().manual_seed(length)) for length in lengths]
    turns = [part.view(4, -1, 3) for part in parts]
    whole = torch.cat(turns, 1).reshape(-1, 3)
    views = [(Fused([Held(part) for part in parts], lengths), whole)]
    views += [(Unfused(Held(whole), lengths, index), part) for index, part in enumerate(parts)]
    for view, expected in views:
        for size in (1, 2, 4):
            for rank, part in enumerate(expected.chunk(size)):
                flat = part.reshape(-1)
                for start in range(len(flat)):
                    for count in {1, 2, 7, len(flat) - start}:
                        out = torch.empty(min(count, len(flat) - start))
                        view.read(out, rank, size, start)
                        assert torch.equal(out, flat[start : start + len(out)])
