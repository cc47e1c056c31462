"""Checkpoints of torchtitan, as torch's DCP saves them from several ranks, are read exactly."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hf_models import saved_llama
from pickled_call import PickledCall
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from transformers import LlamaForCausalLM

from llama_ds.checkpoint.formats.meta_params import Unsaid
from llama_ds.checkpoint.load_model import kind_of, open_model
from llama_ds.errors import UserError
from tools import convert

PARAMS = {"n_heads": 8, "n_kv_heads": 4, "rope_theta": 5e5, "use_scaled_rope": False, "norm_eps": 1e-6}
PARAMS |= {"max_seq_len": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    """transformers' model, saved in the folder that its `name_or_path` names."""
    return saved_llama(
        tmp_path_factory.mktemp("hf"), vocab_size=200, hidden_size=32, num_hidden_layers=2, num_key_value_heads=4,
        head_dim=4, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip


def reverse_permute(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows as `Llama3StateDictAdapter.from_hf` orders them."""
    return w.view(heads, 2, w.shape[0] // heads // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def titan_state(model: LlamaForCausalLM, present: bool = True) -> dict[str, Any]:
    """Return the state dict of torchtitan's model: `from_hf` of its adapter, in present or earlier spellings."""
    attention = "attention.qkv_linear" if present else "attention"
    names = {
        "self_attn.q_proj": f"{attention}.wq", "self_attn.k_proj": f"{attention}.wk", "mlp.up_proj": "feed_forward.w3",
        "self_attn.v_proj": f"{attention}.wv", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "lm_head" if present else "output",
    }  # fmt: skip
    state = {}
    for name, tensor in model.state_dict().items():
        local, layer = name.removesuffix(".weight"), ""
        if ".layers." in name:
            _, _, number, local = local.split(".", 3)
            layer = f"layers.{number}."
        if local.endswith(("q_proj", "k_proj")):
            tensor = reverse_permute(tensor, 8 if "q_proj" in local else 4)
        state[f"{layer}{names[local]}.weight"] = tensor.clone()
    return state


def save_blocks(state: dict[str, torch.Tensor], folder: Path, cuts: Callable[[torch.Tensor], list[list[int]]]) -> None:
    """Write what several ranks save with DCP: each tensor cut along its dimensions at the rows and columns given."""
    folder.mkdir(parents=True)
    entries: dict[str, Any] = {"train_state": BytesStorageMetadata()}
    storage = {MetadataIndex("train_state"): _StorageInfo("__0_0.distcp", 0, 0)}
    for number, (name, tensor) in enumerate(state.items()):
        chunks = []
        edges = [[0, *cut, length] for cut, length in zip(cuts(tensor), tensor.shape, strict=True)]
        spans = [list(pairwise(edge)) for edge in edges]
        blocks = [(a,) for a in spans[0]] if len(spans) == 1 else [(a, b) for a in spans[0] for b in spans[1]]
        for rank, block in enumerate(blocks):
            path = folder / f"__{rank}_{number % 2}.distcp"
            part = tensor[tuple(slice(*span) for span in block)].clone()
            begin = torch.Size(span[0] for span in block)
            with open(path, "ab") as file:
                offset = file.tell()
                torch.save(part, file)
                storage[MetadataIndex(name, begin, rank)] = _StorageInfo(path.name, offset, file.tell() - offset)
            chunks.append(ChunkStorageMetadata(begin, part.shape))
        entries[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks[::-1])
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(entries, planner_data={"a": 1}, storage_data=storage)))


def assert_reads(folder: Path, model: LlamaForCausalLM) -> None:
    found, source = open_model(str(folder)), open_model(model.name_or_path)
    assert kind_of(str(folder)) == "torchtitan" and found.model == source.model and found.seq_len == 64
    assert found.tensors.keys() == source.tensors.keys()
    for key, tensor in source.tensors.items():
        assert torch.equal(found.tensors[key].whole(), tensor.whole()), key


def test_what_dcp_saves_is_read(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Of several checkpoints the newest complete one is taken; the state of the training is skipped."""
    state = titan_state(model) | {"freqs_cis": torch.ones(4, dtype=torch.complex64)}
    state |= {"optimizer.state.norm.weight.exp_avg": torch.ones(32), "train_state": {"step": torch.tensor(3)}}
    for step in (2, 10):
        dcp.save(
            {**state, "norm.weight": state["norm.weight"] + 10 - step}, checkpoint_id=str(tmp_path / f"step-{step}")
        )
    (tmp_path / "step-12").mkdir()
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    assert_reads(tmp_path, model)
    assert "freqs_cis: rotary frequencies, which follow from rope_theta: dropped" in open_model(str(tmp_path)).notes[0]


def by_rows(tensor: torch.Tensor) -> list[list[int]]:
    """FSDP on three ranks, of which the last has fewer rows."""
    length = -(-tensor.shape[0] // 3)
    return [[length, 2 * length], *([[]] * (tensor.ndim - 1))]


def by_both(tensor: torch.Tensor) -> list[list[int]]:
    """FSDP beside tensor parallelism: rows and columns are cut."""
    return [[tensor.shape[0] // 4 * 3]] if tensor.ndim == 1 else [[tensor.shape[0] // 2], [tensor.shape[1] // 4]]


@pytest.mark.parametrize("cuts", [by_rows, by_both])
@pytest.mark.parametrize("present", [False, True])
def test_blocks_of_several_ranks_are_put_together(
    model: LlamaForCausalLM, tmp_path: Path, cuts: Callable[[torch.Tensor], list[list[int]]], present: bool
) -> None:
    state = titan_state(model, present)
    save_blocks(state if present else {f"model.{n}": t for n, t in state.items()}, tmp_path / "step-1", cuts)
    (tmp_path / "step-1" / "params.json").write_text(json.dumps(PARAMS))
    assert_reads(tmp_path / "step-1", model)
    assert_reads(tmp_path, model)


def test_it_converts_to_hugging_face_in_any_layout(model: LlamaForCausalLM, tmp_path: Path) -> None:
    save_blocks(titan_state(model), tmp_path / "step-1", by_both)
    (tmp_path / "step-1" / "params.json").write_text(json.dumps(PARAMS))
    assert convert.main([str(tmp_path), str(tmp_path / "hf"), "--to", "hf"]) == 0
    back = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    words = [str(tmp_path), str(tmp_path / "ds"), "--to", "deepspeed", "--tp", "4", "--no-logits"]
    assert convert.main(words) == 0  # its proof compares the hashes


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_loads_with_torch(model: LlamaForCausalLM, tmp_path: Path, tied: bool) -> None:
    """torchtitan gives DCP the state dict of its model, in which a tied head is an entry of its own."""
    source = model
    if tied:
        source = saved_llama(
            tmp_path / "tied", vocab_size=200, hidden_size=32, num_hidden_layers=2, num_key_value_heads=4, head_dim=4,
            tie_word_embeddings=True,
        )  # fmt: skip
    assert convert.main([source.name_or_path, str(tmp_path / "out"), "--to", "torchtitan"]) == 0
    expected = titan_state(source)
    found = {name: torch.full_like(tensor, 7) for name, tensor in expected.items()}
    dcp.load(found, checkpoint_id=str(tmp_path / "out" / "step-0"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    metadata = dcp.FileSystemReader(str(tmp_path / "out" / "step-0")).read_metadata()
    assert metadata.state_dict_metadata.keys() == expected.keys()
    assert metadata.planner_data == {name: (name,) for name in expected}
    assert_reads(tmp_path / "out", source)


def test_the_names_and_shapes_are_those_of_torchtitan(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Literal names of `from_hf_map` in torchtitan/models/llama3/state_dict_adapter.py."""
    assert convert.main([model.name_or_path, str(tmp_path / "out"), "--to", "torchtitan", "--dtype", "bf16"]) == 0
    metadata = dcp.FileSystemReader(str(tmp_path / "out" / "step-0")).read_metadata()
    found = {name: (tuple(e.size), e.properties.dtype) for name, e in metadata.state_dict_metadata.items()}
    layer = {
        "attention.qkv_linear.wq.weight": (32, 32), "attention.qkv_linear.wk.weight": (16, 32),
        "attention.qkv_linear.wv.weight": (16, 32), "attention.wo.weight": (32, 32), "feed_forward.w1.weight": (88, 32),
        "feed_forward.w2.weight": (32, 88), "feed_forward.w3.weight": (88, 32), "attention_norm.weight": (32,),
        "ffn_norm.weight": (32,),
    }  # fmt: skip
    names = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    names |= {"tok_embeddings.weight": (200, 32), "norm.weight": (32,), "lm_head.weight": (200, 32)}
    assert found == {name: (shape, torch.bfloat16) for name, shape in names.items()}


def test_it_is_not_written_for_ranks(
    model: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main([model.name_or_path, str(tmp_path / "out"), "--to", "torchtitan", "--tp", "2"]) == 2
    assert (
        "leave them out for torchtitan, which loads its checkpoints on any number of ranks" in capsys.readouterr().err
    )


def test_a_tied_head_is_recognised(model: LlamaForCausalLM, tmp_path: Path) -> None:
    state = titan_state(model)
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    for name, tied in (
        ("step-1", {**state, "lm_head.weight": state["tok_embeddings.weight"].clone()}),
        ("step-2", state),
    ):
        if name == "step-2":
            del tied["lm_head.weight"]
        save_blocks(tied, tmp_path / name, by_rows)
        found = open_model(str(tmp_path))
        assert found.model.tie_word_embeddings and len(found.tensors) == len(state) - (name == "step-1")


@pytest.fixture
def saved(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    save_blocks(titan_state(model), tmp_path / "step-1", by_both)
    (tmp_path / "step-1" / "params.json").write_text(json.dumps(PARAMS))
    return tmp_path / "step-1"


PARAMETERS = [
    ({"n_heads": None}, r"params\.json: n_heads is missing, and the checkpoint does not say it; for example \{"),
    ({"use_scaled_rope": None}, "use_scaled_rope is missing, and the checkpoint does not say it"),
    ({"rope_theta": None}, "rope_theta is missing"),
    ({"max_seq_len": None}, "max_seq_len is missing"),
    ({"use_scaled_rope": True}, "the factor of the scaling is not in the file"),
    ({"dim": 64}, "dim = 64, the tensors have 32"),
    ({"n_kv_heads": 8}, r"wk\.weight has shape \[16, 32\], params\.json implies \[32, 32\]"),
]


@pytest.mark.parametrize(("values", "named"), PARAMETERS)
def test_settings_are_asked_for(saved: Path, values: dict[str, Any], named: str) -> None:
    params = {key: value for key, value in {**PARAMS, **values}.items() if value is not None}
    (saved / "params.json").write_text(json.dumps(params))
    with pytest.raises(UserError, match=named):
        open_model(str(saved))
    if "max_seq_len" in values:
        assert open_model(str(saved), unsaid=Unsaid(seq_len=99)).seq_len == 99


def test_a_folder_without_settings_asks_for_them(saved: Path) -> None:
    (saved / "params.json").unlink()
    with pytest.raises(UserError, match=r"does not say the heads, .* write them to .*params\.json: \{"):
        open_model(str(saved))


def change_metadata(folder: Path, edit: Callable[[Any], object]) -> None:
    path, saved = folder / ".metadata", folder / "saved"
    if not saved.exists():
        shutil.copy(path, saved)
    metadata = pickle.loads(saved.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def place(metadata: Any, name: str) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


DAMAGES: list[tuple[Callable[[Any], object], str]] = [
    (lambda m: m.state_dict_metadata.pop("norm.weight"), r"1 tensor \(norm\.weight\) is missing"),
    (lambda m: m.state_dict_metadata.update(more=m.state_dict_metadata["norm.weight"]), "cannot be read as metadata"),
    (lambda m: m.state_dict_metadata["norm.weight"].chunks.pop(), "blocks of norm.weight do not cover its shape"),
    (lambda m: setattr(place(m, "norm.weight"), "relative_path", "../x"), "'../x' is no file of the folder"),
    (lambda m: setattr(place(m, "norm.weight"), "relative_path", "x.distcp"), "x.distcp: cannot be read"),
    (lambda m: setattr(place(m, "norm.weight"), "offset", 1), "cannot be read as a file of torch tensors"),
    (lambda m: setattr(place(m, "norm.weight"), "length", 100), "cannot be read as a file of torch tensors"),
    (lambda m: setattr(m.state_dict_metadata["norm.weight"], "size", torch.Size([-3])), "is no shape"),
]


@pytest.mark.parametrize(("edit", "named"), DAMAGES)
def test_damaged_checkpoints_are_refused(saved: Path, edit: Callable[[Any], object], named: str) -> None:
    change_metadata(saved, edit)
    with pytest.raises(UserError, match=named) as error:
        open_model(str(saved))
    assert str(saved) in str(error.value) and "\n" not in str(error.value)


def test_nothing_in_a_pickle_is_executed(saved: Path, tmp_path: Path) -> None:
    change_metadata(saved, lambda m: setattr(m, "planner_data", PickledCall(os.mkdir, str(tmp_path / "executed"))))
    assert open_model(str(saved)).model.hidden_size == 32
    change_metadata(
        saved,
        lambda m: m.state_dict_metadata.update({"norm.weight": PickledCall(os.mkdir, str(tmp_path / "executed"))}),
    )
    with pytest.raises(UserError, match=r"1 tensor \(norm\.weight\) is missing"):
        open_model(str(saved))
    (saved / ".metadata").write_bytes(pickle.dumps(PickledCall(os.mkdir, str(tmp_path / "executed"))))
    with pytest.raises(UserError, match="cannot be read as metadata of torch's DCP"):
        open_model(str(saved))
    (saved / ".metadata").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read as metadata of torch's DCP"):
        open_model(str(saved))
    assert not (tmp_path / "executed").exists()


def test_a_block_that_is_no_tensor_is_refused(saved: Path, tmp_path: Path) -> None:
    for value, named in (
        (PickledCall(os.mkdir, str(tmp_path / "executed")), "holds posix.mkdir"),
        ({"a": 1}, "holds no contiguous tensor"),
    ):
        torch.save(value, saved / "bad.distcp")
        size = (saved / "bad.distcp").stat().st_size

        def edit(metadata: Any, size: int = size) -> None:
            vars(place(metadata, "norm.weight")).update(relative_path="bad.distcp", offset=0, length=size)

        change_metadata(saved, edit)
        with pytest.raises(UserError, match=named):
            open_model(str(saved))
    assert not (tmp_path / "executed").exists()


def test_a_distributed_checkpoint_of_megatron_is_named(saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "params.json", saved / "common.pt")
    (saved / "metadata.json").write_text("{}")
    (saved / "params.json").unlink()
    with pytest.raises(UserError, match=r"distributed checkpoint of Megatron-LM .* --ckpt-convert-format torch"):
        open_model(str(saved))
