"""Exports compute the same logits in Meta's own architecture, and releases of Meta in this project's model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_reference import MetaModel
from written_ranks import MODEL, SHAPES, Write, build

from llama_ds.checkpoint.formats.meta_params import inner_size, params_of
from llama_ds.checkpoint.load_model import load_model, open_model
from llama_ds.config.schema import ModelConfig, RunConfig
from llama_ds.errors import UserError
from tools import convert

CPU = torch.device("cpu")
IDS = torch.randint(0, 800, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_metas_model_computes_the_same(write: Write, run: RunConfig, tmp_path: Path, name: str, size: int) -> None:
    words = [write(2, True, model=SHAPES[name]), str(tmp_path / "meta"), "--to", "meta", "--tp", str(size)]
    assert convert.main([*words, "--no-logits"]) == 0
    model = MetaModel(tmp_path / "meta")
    assert len(model.ranks) == size
    # Tolerance for fp32 sums of 32 to 112 terms in another order, in three layers; logits are up to 3.
    torch.testing.assert_close(model(IDS), build(replace(run, model=SHAPES[name]))(IDS), atol=1e-5, rtol=0)


def release(folder: Path, size: int, **params: Any) -> None:
    """Write a model with random weights in Meta's release format: LLaMA 2, or 3 by `params`, on `size` ranks."""
    torch.manual_seed(2)
    folder.mkdir()
    p = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 16, "norm_eps": 1e-6, "vocab_size": -1, **params}
    (folder / "params.json").write_text(json.dumps(p))
    heads, width, inner = 32, 32 * p.get("n_kv_heads", 4) // 4, inner_size(32, 16, p.get("ffn_dim_multiplier"))
    by_rows = p.get("rope_theta", 0) >= 500_000
    norms = {
        f"layers.{i}.{n}_norm.weight": 1 + torch.rand(32).bfloat16() for i in range(2) for n in ("attention", "ffn")
    }
    norms["norm.weight"] = torch.rand(32).bfloat16()
    for rank in range(size):
        shapes = {"tok_embeddings.weight": (800 // size, 32) if by_rows else (800, 32 // size)}
        for i in range(2):
            shapes |= {f"layers.{i}.attention.{n}.weight": (w // size, 32) for n, w in
                       (("wq", heads), ("wk", width), ("wv", width))}  # fmt: skip
            shapes |= {f"layers.{i}.feed_forward.{n}.weight": (inner // size, 32) for n in ("w1", "w3")}
            shapes[f"layers.{i}.attention.wo.weight"] = (32, heads // size)
            shapes[f"layers.{i}.feed_forward.w2.weight"] = (32, inner // size)
        shapes["output.weight"] = (800 // size, 32)
        tensors = {name: (torch.randn(shape) * 0.2).bfloat16() for name, shape in shapes.items()}
        torch.save({**tensors, **norms, "rope.freqs": torch.ones(4)}, folder / f"consolidated.{rank:02d}.pth")


RELEASES = [
    {},
    {"n_kv_heads": 2},
    {"n_kv_heads": 2, "rope_theta": 500_000.0, "ffn_dim_multiplier": 1.3, "vocab_size": 800},
    {"rope_theta": 500_000.0, "use_scaled_rope": True, "rope_scaling_factor": 8.0},
]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("params", RELEASES)
def test_what_meta_releases_is_read(tmp_path: Path, params: dict[str, Any], size: int) -> None:
    size = min(size, params.get("n_kv_heads", 4))
    release(tmp_path / "meta", size, **params)
    found = load_model(open_model(str(tmp_path / "meta")), CPU, torch.float32)(IDS)
    # The same reason as above; logits are up to 10.
    torch.testing.assert_close(found, MetaModel(tmp_path / "meta")(IDS), atol=5e-5, rtol=0)
    assert found.abs().max() > 1
    assert convert.main([str(tmp_path / "meta"), str(tmp_path / "hf"), "--to", "hf"]) == 0


def test_the_sequence_length_is_that_of_the_release(tmp_path: Path) -> None:
    """params.json does not hold it, and Meta's code accepts no such key."""
    for i, params in enumerate((RELEASES[0], RELEASES[2], RELEASES[3])):
        release(tmp_path / str(i), 1, **params)
    assert [open_model(str(tmp_path / str(i))).seq_len for i in range(3)] == [2048, 8192, 131_072]


def test_a_head_equal_to_the_embedding_is_tied(tmp_path: Path) -> None:
    release(tmp_path / "meta", 2, rope_theta=500_000.0)
    assert not open_model(str(tmp_path / "meta")).model.tie_word_embeddings
    for path in (tmp_path / "meta").glob("*.pth"):
        state = torch.load(path, weights_only=True)
        torch.save({**state, "output.weight": state["tok_embeddings.weight"].clone()}, path)
    files = open_model(str(tmp_path / "meta"))
    assert files.model.tie_word_embeddings and (4, "lm_head.weight") not in files.tensors
    state["output.weight"][-1, -1] += 1  # only the last element of the last file differs
    torch.save(state, path)
    assert not open_model(str(tmp_path / "meta")).model.tie_word_embeddings


PUBLISHED = [  # (hidden size, intermediate size) of LLaMA 1 7B to 65B, 2 70B, 3 8B, 3.1 405B; then synthetic sizes
    *((4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (8192, 28672), (4096, 14336), (16384, 53248)),
    *((32, 88), (32, 112), (64, 64), (100, 333), (256, 1)),
]


@pytest.mark.parametrize(("dim", "inner"), PUBLISHED)
def test_params_give_the_intermediate_size(dim: int, inner: int) -> None:
    heads = {"num_attention_heads": 2, "head_dim": dim // 2}
    model = replace(MODEL, rope_scaling=None, hidden_size=dim, intermediate_size=inner, **heads)
    params = params_of(model, "here")
    assert inner_size(dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == inner
    assert ("ffn_dim_multiplier" in params) == (inner in (28672, 14336, 53248, 112, 64, 333, 1))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (replace(SHAPES["gqa"], head_dim=16), "head_dim = 16"),
        (MODEL, "rope_scaling = [8.0, 1.0, 4.0, 16], Meta's code has [8.0, 1.0, 4.0, 8192]"),
    ],
)
def test_a_model_that_metas_code_does_not_support_is_refused(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: ModelConfig, named: str
) -> None:
    assert convert.main([write(1, True, model=model), str(tmp_path / "meta"), "--to", "meta"]) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.glob("meta*"))


def damage_params(folder: Path, **change: Any) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ({"moe": {"num_experts": 8}}, "moe is not a known key"),
        ({"dim": "wide"}, "dim = 'wide' is not an integer"),
        ({"n_heads": 5}, "n_heads = 5 does not divide dim = 32"),
        ({"n_kv_heads": 3}, "num_key_value_heads = 3 does not divide"),
        ({"n_kv_heads": 2}, "tensor layers.0.attention.wk.weight has shape [32, 32], params.json implies [16, 32]"),
        ({"dim": 64}, "tensor tok_embeddings.weight has shape [800, 32], params.json implies [800, 64]"),
        ({"multiple_of": 64}, "tensor layers.0.feed_forward.w1.weight has shape [96, 32]"),
        ({"multiple_of": 0}, "multiple_of = 0"),
        ({"n_layers": 3}, "9 tensors (layers.2.attention_norm.weight, layers.2."),
        ({"n_layers": 1}, "9 tensors (layers.1."),
        ({"vocab_size": 832}, "has 800 rows, params.json has vocab_size = 832; convert with --vocab-size 800"),
    ],
)
def test_params_of_another_model_are_refused(tmp_path: Path, damage: dict[str, Any], named: str) -> None:
    release(tmp_path / "meta", 2)
    damage_params(tmp_path / "meta", **damage)
    with pytest.raises(UserError) as error:
        open_model(str(tmp_path / "meta"))
    assert named in str(error.value) and str(tmp_path / "meta") in str(error.value)


def test_parts_must_be_complete_and_of_one_model(tmp_path: Path) -> None:
    release(tmp_path / "meta", 4)
    first, last = tmp_path / "meta" / "consolidated.00.pth", tmp_path / "meta" / "consolidated.03.pth"
    state = torch.load(last, weights_only=True)
    state["layers.1.ffn_norm.weight"][3] += 1
    torch.save(state, last)
    with pytest.raises(UserError, match=r"consolidated\.03\.pth: layers.1.ffn_norm.weight differs"):
        open_model(str(tmp_path / "meta"))
    last.unlink()
    with pytest.raises(UserError, match=r"tensor tok_embeddings.weight has shape \[800, 24\], params.json implies"):
        open_model(str(tmp_path / "meta"))
    first.unlink()
    with pytest.raises(UserError, match=r"consolidated\.00\.pth: cannot be read \(No such file"):
        open_model(str(tmp_path / "meta"))
