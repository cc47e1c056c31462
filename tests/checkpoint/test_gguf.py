"""GGUF files hold what llama.cpp expects, as the package gguf reads them; what it cannot do is refused.

Names, metadata keys and the permutation are those of llama.cpp's conversion/llama.py and src/llama-vocab.cpp.
`.ci/ecosystem` runs the same files in llama.cpp itself.
"""

from __future__ import annotations

import json
import math
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from tokenizer_files import byte_level, write_gpt_neox, write_json, write_llama3
from tokenizers import Regex, normalizers, pre_tokenizers
from written_ranks import SHAPES, Write

from llama_ds.benchmarks.gguf_tokenizer import gguf_vocabulary
from llama_ds.checkpoint.formats import gguf_model
from llama_ds.checkpoint.formats.plan import Target
from llama_ds.checkpoint.load_model import open_model
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError
from tools import convert

UNUSED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 5, 1, 2, 3, 4, 6


def to_gguf(source: object, path: Path, *words: object) -> gguf.GGUFReader:
    assert convert.main([str(source), str(path), "--to", "gguf", "--no-logits", *map(str, words)]) == 0
    return gguf.GGUFReader(path)


def fields(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {key: field.contents() for key, field in reader.fields.items()}


def values(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """Return the tensors in fp32."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of query or key heads as llama.cpp's converter orders them (LlamaModel.permute)."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [*((name, "fp32", "F32") for name in SHAPES), ("gqa", "bf16", "BF16"), ("llama3", "fp16", "F16")],
)
def test_every_weight_has_its_name_dtype_and_value(
    write: Write, tmp_path: Path, name: str, dtype: str, kind: str
) -> None:
    model = SHAPES[name]
    source = write(2, by_layer=True, model=model)
    reader = to_gguf(source, tmp_path / "model.gguf", "--dtype", dtype)
    found, files = values(reader), open_model(source)
    for (layer, local), tensor in files.tensors.items():
        wanted = tensor.whole(torch.float32)
        if "q_proj" in local or "k_proj" in local:
            heads = model.num_attention_heads if "q_proj" in local else model.num_key_value_heads
            wanted = permuted(wanted, heads)
        if wanted.ndim > 1:
            torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
            wanted = wanted.to(torch_dtype).float()
        assert np.array_equal(found.pop(gguf_model.gguf_name(layer, local)), wanted.numpy()), local
    assert set(found) == ({"rope_freqs.weight"} if model.rope_scaling else set())
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.2.attn_q.weight"] == kinds["token_embd.weight"] == kind
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"  # llama.cpp multiplies norms in fp32
    assert ("output.weight" in kinds) != model.tie_word_embeddings


def test_metadata_says_how_the_model_computes(write: Write, tmp_path: Path) -> None:
    model = replace(SHAPES["llama3"], head_dim=16, rms_norm_eps=3e-6)
    found = fields(to_gguf(write(1, True, model=model), tmp_path / "small.gguf"))
    wanted = {
        "general.architecture": "llama", "general.name": "small", "general.file_type": 0, "llama.vocab_size": 800,
        "llama.context_length": 32, "llama.embedding_length": 32, "llama.block_count": 3,
        "llama.feed_forward_length": 112, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16, "llama.attention.value_length": 16, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500_000.0, "llama.attention.layer_norm_rms_epsilon": np.float32(3e-6).item(),
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted


def test_rotary_scaling_is_a_tensor_of_divisors(write: Write, tmp_path: Path) -> None:
    """The factors of llama.cpp's converter (LlamaModel.generate_extra_tensors), to a rounding of fp32."""
    model = replace(SHAPES["llama3"], head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    found = values(to_gguf(write(1, True, model=model), tmp_path / "m.gguf"))["rope_freqs.weight"]
    scaling, wanted = model.rope_scaling, []
    assert scaling
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    for i in range(0, 64, 2):
        wavelength = 2 * math.pi * model.rope_theta ** (i / 64)
        smooth = (context / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / scaling.factor + smooth)
        wanted.append(1 if wavelength < context / high else scaling.factor if wavelength > context / low else between)
    assert 1 < sorted(set(wanted))[1] < scaling.factor  # the interpolation is covered
    np.testing.assert_allclose(found, np.array(wanted), rtol=1e-6)


def test_q8_0_rounds_by_half_a_step_and_says_what_it_cannot_hold(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(1, True, model=SHAPES["gqa"])
    path = tmp_path / "q.gguf"
    assert convert.main([source, str(path), "--to", "gguf", "--dtype", "q8_0"]) == 0
    out = capsys.readouterr().out
    assert "3 matrices (blk.0.ffn_down.weight, ...) are fp16: their rows are no multiple of q8_0's 32" in out
    source_hash, result_hash, logits = out.splitlines()[-3:]
    assert "source as q8_0" in source_hash and source_hash.split()[-1] == result_hash.split()[-1]
    assert 0 < float(logits.split()[5]) < 0.1 * float(logits.split()[7])
    reader = gguf.GGUFReader(path)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert kinds["token_embd.weight"] == "Q8_0" and fields(reader)["general.quantization_version"] == 2
    table = open_model(source).tensors[0, "weight"].whole(torch.float32).numpy().reshape(-1, 32)
    step = np.abs(table).max(1, keepdims=True) / 127
    # Half a step, and the rounding of the step to fp16 (2^-11 of it, 2^-25 where that is subnormal), times up to 127.
    bound = step / 2 + 127 * np.maximum(step * 2.0**-11, 2.0**-25)
    assert (np.abs(values(reader)["token_embd.weight"].reshape(-1, 32) - table) <= bound).all()


def test_what_the_file_cannot_say_of_a_model_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A property that a later version of the model has must not be left out without a word."""
    source = write(1, True, model=SHAPES["llama3"])
    for table, name in (("EXPRESSED", "rms_norm_eps"), ("SCALING", "factor")):
        monkeypatch.setattr(gguf_model, table, tuple(n for n in getattr(gguf_model, table) if n != name))
        model = replace(open_model(source).model, rms_norm_eps=1e-3)
        files = replace(open_model(source), model=model)
        with pytest.raises(UserError, match=f"{name} = .* cannot be written as GGUF by this tool"):
            gguf_model.plan_gguf(files, Target("fp32"), "m.gguf", None)
        monkeypatch.undo()


def test_a_wrong_value_in_the_file_fails_the_proof(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(1, True, model=SHAPES["mha"])
    monkeypatch.setattr(gguf_model, "ROTATED", ("self_attn.q_proj.weight",))  # k is written, and read, unpermuted
    assert convert.main([source, str(tmp_path / "a.gguf"), "--to", "gguf"]) == 0
    original = gguf_model.gguf_name

    def exchanged(layer: int, name: str) -> str:
        return original(layer, {"mlp.up_proj.weight": "mlp.gate_proj.weight"}.get(name, name))

    reads = gguf_model.read_back_gguf

    def reading(*arguments: Any) -> Any:
        monkeypatch.setattr(gguf_model, "gguf_name", exchanged)
        return reads(*arguments)

    monkeypatch.setattr(gguf_model, "read_back_gguf", reading)
    assert convert.main([source, str(tmp_path / "b.gguf"), "--to", "gguf"]) == 2
    assert "mlp.up_proj.weight differs from that of" in capsys.readouterr().err
    assert not (tmp_path / "b.gguf").exists()


def test_the_result_is_one_file_and_never_half_of_one(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, path = write(1, True, model=SHAPES["tied"]), tmp_path / "out" / "m.gguf"
    to_gguf(source, path)
    assert [p.name for p in path.parent.iterdir()] == ["m.gguf"]
    before = path.read_bytes()
    assert convert.main([source, str(path), "--to", "gguf", "--dtype", "bf16"]) == 2
    assert path.read_bytes() == before and "exists already" in capsys.readouterr().err
    to_gguf(source, path, "--dtype", "bf16", "--overwrite")
    assert [p.name for p in path.parent.iterdir()] == ["m.gguf"] and len(path.read_bytes()) < len(before)
    to_gguf(source, path, "--overwrite")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--to", "gguf"], "x: a GGUF model is one file; give a name that ends in .gguf"),
        (
            ["x.gguf", "--to", "gguf", "--tp", "2"],
            "--tp and --pp apply only to deepspeed, meta, neox and the three of megatron",
        ),
        (["x", "--to", "hf", "--dtype", "q8_0"], "--dtype q8_0 applies only to gguf; use fp32, bf16, fp16"),
        (["x.gguf", "--to", "gguf", "--vocab-size", "700"], "its tokenizer has 800 ids, its tables have 700 rows"),
    ],
)
def test_wrong_options_are_refused(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert convert.main([write(1, True, model=SHAPES["mha"]), *words]) == 2
    assert message in capsys.readouterr().err


def test_the_tokenizer_of_training_is_written_with_its_scores_and_types(
    write: Write, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(1, True, model=SHAPES["mha"])
    found = fields(to_gguf(source, tmp_path / "m.gguf", "--vocab-size", 803))
    model = sentencepiece.SentencePieceProcessor(tokenizer)
    tokens = [model.id_to_piece(i) for i in range(800)]
    assert found["tokenizer.ggml.tokens"] == [*tokens, "[PAD800]", "[PAD801]", "[PAD802]"]
    assert found["tokenizer.ggml.scores"][:800] == [model.get_score(i) for i in range(800)]
    types = found["tokenizer.ggml.token_type"]
    assert types[:3] == [UNKNOWN, CONTROL, CONTROL] and types[3:259] == [BYTE] * 256
    assert set(types[259:800]) == {NORMAL} and types[800:] == [UNUSED] * 3
    keys = ("model", "pre", "bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token", "add_eos_token")
    assert [found[f"tokenizer.ggml.{key}"] for key in keys] == ["llama", "default", 1, 2, 0, True, False]
    assert found["tokenizer.ggml.add_space_prefix"] is False  # llama.cpp's default is True
    assert "note: llama.cpp reads the character U+2581 in a text as a space" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_says_so(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(1, True, model=SHAPES["mha"])
    assert convert.main([source, str(tmp_path / "hf"), "--to", "hf", "--no-logits"]) == 0
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / "hf" / name).unlink()
    found = fields(to_gguf(tmp_path / "hf", tmp_path / "m.gguf"))
    assert found["tokenizer.ggml.model"] == "none" and "tokenizer.ggml.tokens" not in found
    assert f"no tokenizer was written: {tmp_path / 'hf'} has no" in capsys.readouterr().out


def test_tokens_and_template_that_a_folder_adds_are_carried_along(write: Write, tmp_path: Path) -> None:
    source = write(1, True, model=SHAPES["mha"])
    assert convert.main([source, str(tmp_path / "hf"), "--to", "hf", "--no-logits", "--vocab-size", "803"]) == 0
    path = tmp_path / "hf" / "tokenizer_config.json"
    added = {"800": {"content": "<|im_start|>", "special": True}, "801": {"content": "<x>", "special": False}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    found = fields(to_gguf(tmp_path / "hf", tmp_path / "m.gguf"))
    assert found["tokenizer.ggml.tokens"][800:] == ["<|im_start|>", "<x>", "[PAD802]"]
    assert found["tokenizer.ggml.token_type"][800:] == [CONTROL, USER_DEFINED, UNUSED]
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def trained(folder: Path, more: Sequence[str] = (), **settings: Any) -> Tokenizer:
    lines = [line for p in (Path(sysconfig.get_paths()["stdlib"]) / "json").glob("*.py") for line in p.open()]
    options = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "vocab_size": 600, **settings}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *more]), model_prefix=str(folder / "t"), minloglevel=2, **options
    )
    return Tokenizer(str(folder / "t.model"))


def test_the_space_of_llamas_own_tokenizer_is_kept(tmp_path: Path) -> None:
    found, differences = gguf_vocabulary(trained(tmp_path))
    assert found.add_space_prefix and not differences


def test_pieces_that_merge_to_a_reserved_name_are_told(tmp_path: Path) -> None:
    """llama.cpp merges to any token of the text: with a piece "s>", the text "<s>" becomes the id of bos."""
    found, differences = gguf_vocabulary(trained(tmp_path, ["xs> ys> zs>"] * 99, split_by_unicode_script=False))
    assert found.types[found.tokens.index("s>")] == NORMAL
    assert "llama.cpp reads <s> in a text as the id of that name, this project as text" in differences


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes texts (nmt_nfkc)"),
        ({"remove_extra_whitespaces": True}, "removes white space"),
        ({"model_type": "unigram"}, "is no BPE model"),
        ({"byte_fallback": False}, "has no pieces for bytes"),
    ],
)
def test_sentencepiece_models_that_llama_cpp_does_not_imitate_are_refused(
    tmp_path: Path, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=r"llama\.cpp would give other ids") as error:
        gguf_vocabulary(trained(tmp_path, **settings))
    assert f"it {why}; convert to hf" in str(error.value)


def test_llama_3s_tokenizer_becomes_merges_of_bytes(tmp_path: Path) -> None:
    meta, hf = write_llama3(tmp_path)
    found, differences = gguf_vocabulary(Tokenizer(meta))
    assert (found.model, found.pre, found.add_bos, differences) == ("gpt2", "llama-bpe", True, [])
    bos, eos = (found.tokens.index(name) for name in ("<|begin_of_text|>", "<|end_of_text|>"))
    assert (found.bos, found.eos) == (bos, eos) and found.types[bos] == CONTROL and found.types[bos - 1] == NORMAL
    published = json.loads(Path(hf).read_text())["model"]["merges"]
    # Of Meta's file transformers derives every pair that makes a token; those of training are among them, in order.
    assert [m for m in found.merges if m.split(" ") in published] == [" ".join(m) for m in published]
    again, _ = gguf_vocabulary(Tokenizer(hf))
    assert (again.tokens, again.types, again.bos, again.eos) == (found.tokens, found.types, found.bos, found.eos)


def test_llama_3s_file_is_not_beside_the_weights_of_an_export(write: Write, tmp_path: Path) -> None:
    """llama.cpp's converter, and transformers' LlamaTokenizer, read a tokenizer.model there as sentencepiece's."""
    meta, _ = write_llama3(tmp_path)
    source = Path(write(1, True, model=replace(SHAPES["llama3"], vocab_size=Tokenizer(meta).vocab_size)))
    assert convert.main([str(source), str(tmp_path / "a"), "--to", "meta", "--no-logits"]) == 0
    shutil.copyfile(meta, tmp_path / "a" / "tokenizer.model")
    for before, after, kind in (("a", "b", "hf"), ("b", "c", "hf"), ("c", "d", "meta")):
        words = [str(tmp_path / before), str(tmp_path / after), "--to", kind, "--no-logits"]
        assert convert.main(words) == 0
    for name in ("b", "c"):
        assert not (tmp_path / name / "tokenizer.model").exists() and (tmp_path / name / "tokenizer.json").exists()
        assert (tmp_path / name / "original" / "tokenizer.model").read_bytes() == Path(meta).read_bytes()
    assert (tmp_path / "d" / "tokenizer.model").read_bytes() == Path(meta).read_bytes()


def test_a_tokenizer_whose_bos_is_its_eos_begins_no_text_with_it(tmp_path: Path) -> None:
    found, _ = gguf_vocabulary(Tokenizer(write_gpt_neox(tmp_path)))
    assert (found.pre, found.add_bos, found.eos) == ("gpt-2", False, found.tokens.index("<|endoftext|>"))


def test_other_pre_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    names = {"bos_token": None, "eos_token": "<e>"}
    split = pre_tokenizers.Split(Regex(r"\w+"), "isolated")
    tokenizer = byte_level(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]))
    tokenizer.add_special_tokens(["<e>"])
    with pytest.raises(UserError, match=r"it splits texts by Split \\w\+ \+ ByteLevel; convert to hf"):
        gguf_vocabulary(Tokenizer(write_json(tmp_path / "a", tokenizer, names)))
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_special_tokens(["<e>"])
    tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(UserError, match=r"it normalizes texts \(NFC\)"):
        gguf_vocabulary(Tokenizer(write_json(tmp_path / "b", tokenizer, names)))
