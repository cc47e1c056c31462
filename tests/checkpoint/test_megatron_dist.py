"""Distributed checkpoints of Megatron-LM (torch_dist) are read exactly, in both of their layouts, or are refused."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dist_reference import save_distributed
from hf_models import saved_llama
from transformers import LlamaForCausalLM

from llama_ds.checkpoint.load_model import kind_of, open_model
from llama_ds.errors import UserError
from tools import convert


def args_of(model: LlamaForCausalLM, tp: int) -> argparse.Namespace:
    config = model.config
    return argparse.Namespace(
        num_layers=config.num_hidden_layers, hidden_size=config.hidden_size, ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads, group_query_attention=True, kv_channels=config.head_dim,
        num_query_groups=config.num_key_value_heads, normalization="RMSNorm", norm_epsilon=config.rms_norm_eps,
        swiglu=True, add_bias_linear=False, position_embedding_type="rope", vocab_size=config.vocab_size,
        rotary_base=int(config.rope_parameters["rope_theta"]), max_position_embeddings=config.max_position_embeddings,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings, tensor_model_parallel_size=tp,
        padded_vocab_size=-(-config.vocab_size // (128 * tp)) * 128 * tp, pipeline_model_parallel_size=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[str, Path]]:
    """Return the model in transformers' format and as a distributed checkpoint, tied where layers are not stacked."""
    root = tmp_path_factory.mktemp("dist")
    sizes = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 3, "head_dim": 8, "num_key_value_heads": 4}
    found = {}
    for stacked in (True, False):
        model = saved_llama(root / f"hf{stacked}", **sizes, tie_word_embeddings=not stacked)
        folder = save_distributed(model, args_of(model, 2), root / f"saved{stacked}", 2, stacked)
        found[stacked] = model.name_or_path, folder
    return found.__getitem__


@pytest.mark.parametrize("stacked", [True, False])
def test_a_distributed_checkpoint_is_read(saved: Callable[[bool], tuple[str, Path]], stacked: bool) -> None:
    hf, folder = saved(stacked)
    wanted = open_model(hf)
    for path in (folder, folder / "iter_0000010"):
        found = open_model(str(path))
        assert kind_of(str(path)) == "megatron" and (found.model, found.seq_len) == (wanted.model, wanted.seq_len)
        assert found.tensors.keys() == wanted.tensors.keys()
        assert all(torch.equal(found.tensors[key].whole(), wanted.tensors[key].whole()) for key in wanted.tensors)


def test_it_is_converted(saved: Callable[[bool], tuple[str, Path]], tmp_path: Path) -> None:
    """The blocks of two ranks become the files of four."""
    hf, folder = saved(True)
    assert convert.main([str(folder), str(tmp_path / "out"), "--to", "deepspeed", "--tp", "4", "--no-logits"]) == 0
    found, wanted = open_model(str(tmp_path / "out")), open_model(hf)
    assert all(torch.equal(found.tensors[key].whole(), wanted.tensors[key].whole()) for key in wanted.tensors)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("zarr", lambda at: (at / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"})), "--ckpt-convert-"),
    ("torch_dcp", lambda at: (at / "metadata.json").unlink(), "is not in the format torch_dist; save it in the format"),
    ("no args", lambda at: (at / "common.pt").unlink(), "common.pt: is missing, with the args"),
    ("two formats", lambda at: (at / "mp_rank_00").mkdir(), "holds mp_rank_00 and a distributed checkpoint"),
    ("truncated", lambda at: truncate(at / "__0_0.distcp"), "cannot be read as a file of torch tensors"),
    ("no data", lambda at: (at / "__0_0.distcp").unlink(), "__0_0.distcp: cannot be read (No such file"),
]


@pytest.mark.parametrize(("change", "named"), [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES])
def test_what_cannot_be_read_is_refused(
    saved: Callable[[bool], tuple[str, Path]], tmp_path: Path, change: Callable[[Path], object], named: str
) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(saved(True)[1], folder)
    change(folder / "iter_0000010")
    with pytest.raises(UserError) as error:
        open_model(str(folder))
    assert named in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
