"""Configuration, tokenizer and generation settings come through conversions, or their loss is printed."""

from __future__ import annotations

import json
import random
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizer_files import ODD, write_gpt_neox, write_llama3
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from written_ranks import SHAPES, Write

from llama_ds.benchmarks.exported_tokenizer import exported
from llama_ds.checkpoint.carried import carried_files
from llama_ds.checkpoint.formats.hf_config import read_config
from llama_ds.checkpoint.load_model import open_model
from llama_ds.checkpoint.manifest import describe
from llama_ds.data.text.tokenizer import Tokenizer, tokenizer_files
from llama_ds.errors import UserError
from tools import convert

TEMPLATE = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }} {{ m.content }}<|eot_id|>{% endfor %}"


def run(*words: object) -> int:
    return convert.main([str(word) for word in words] + ["--no-logits"])


def texts(count: int, names: list[str]) -> list[str]:
    """Return texts of spaces, words, odd Unicode and names of special tokens."""
    draw = random.Random(6)
    parts = [
        *ODD.split(),
        *names,
        " ",
        "  ",
        "\n",
        "\u2581",
        "def",
        "self",
        "é",
        "1",
        "\t",
        "漢",
        "\U0010ffff",
        "<0x0A>",
    ]
    return ["".join(draw.choice(parts) for _ in range(draw.randrange(12))) for _ in range(count)]


def save_model(folder: Path, **settings: Any) -> Path:
    config = LlamaConfig(
        vocab_size=1000, hidden_size=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, **settings,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with every file that a Hugging Face folder may have beside weights."""
    root = tmp_path_factory.mktemp("chat")
    ids = {"bos_token_id": 700, "eos_token_id": [701, 709], "pad_token_id": 704}
    folder = save_model(root / "model", **ids, use_cache=False, attention_dropout=0.1)
    source = Path(write_llama3(root)[1]).parent
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|fim_suffix|>"}
    config = json.loads((source / "tokenizer_config.json").read_text())
    shutil.copy(source / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings, "model_max_length": 64}))
    (folder / "special_tokens_map.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text(TEMPLATE + "tools")
    (folder / "generation_config.json").write_text(json.dumps({**ids, "temperature": 0.6, "top_p": 0.9}))
    return folder


def test_there_and_back_twice_changes_nothing(chat: Path, tmp_path: Path) -> None:
    source = chat
    for turn, kind in enumerate(("deepspeed", "hf", "deepspeed", "hf")):
        assert run(source, tmp_path / str(turn), "--to", kind) == 0
        source = tmp_path / str(turn)
    before, after = carried_files(str(chat)), carried_files(str(source))
    assert before.keys() == after.keys() and len(before) == 6
    assert {n: Path(p).read_bytes() for n, p in before.items()} == {n: Path(p).read_bytes() for n, p in after.items()}
    configs = [AutoConfig.from_pretrained(path).to_dict() for path in (chat, source)]
    assert [config.pop("_name_or_path") for config in configs] == [str(chat), str(source)]
    assert configs[0] == configs[1]
    assert configs[1]["eos_token_id"] == [701, 709] and configs[1]["pad_token_id"] == 704
    assert GenerationConfig.from_pretrained(chat) == GenerationConfig.from_pretrained(source)
    ours, theirs = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(chat)
    some = texts(300, ["<|eot_id|>", "<|begin_of_text|>", "</s>"])
    assert ours(some)["input_ids"] == theirs(some)["input_ids"]
    messages = [{"role": "user", "content": " hello"}]
    for template in ("default", "tools"):
        found = ours.apply_chat_template(messages, chat_template=ours.get_chat_template(template))
        assert found["input_ids"] == theirs.apply_chat_template(messages, chat_template=template)["input_ids"]


def test_an_id_without_a_row_is_refused(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers does not load a model whose padding has no row."""
    assert run(chat, tmp_path / "hf", "--to", "hf", "--vocab-size", 703) == 2
    assert "eos_token_id = 709 is not below vocab_size = 703; convert with --vocab-size 710" in capsys.readouterr().err


def test_a_damaged_file_beside_the_weights_is_not_carried_on(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(chat, tmp_path / "ours", "--to", "deepspeed") == 0
    path = tmp_path / "ours" / "generation_config.json"
    path.write_text(path.read_text().replace("0.6", "0.7"))
    assert run(tmp_path / "ours", tmp_path / "hf", "--to", "hf") == 2
    assert "generation_config.json" in capsys.readouterr().err


def test_what_metas_format_has_no_place_for_is_printed(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(chat, tmp_path / "meta", "--to", "meta") == 0
    assert (
        "dropped, meta has no place for it: the sequence length 64, bos_token_id 700, eos_token_id [701, 709], "
        "pad_token_id 704, special_tokens_map.json, generation_config.json, additional_chat_templates/tools.jinja\n"
    ) in capsys.readouterr().out


def test_a_run_keeps_the_padding_token_that_special_tokens_map_names(chat: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "special_tokens_map.json"):
        shutil.copy(chat / name, tmp_path)
    config = json.loads(tokenizer_files(str(tmp_path / "tokenizer.json"))["tokenizer_config.json"])
    names = (config["bos_token"], config["eos_token"], config["pad_token"])
    assert names == ("<|begin_of_text|>", "<|eot_id|>", "<|fim_suffix|>")


def train(folder: Path, **settings: Any) -> str:
    """Train a sentencepiece model; by default LLaMA's kind, with a space before every text."""
    lines = [line for p in (Path(sysconfig.get_paths()["stdlib"]) / "json").glob("*.py") for line in p.open()]
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=600, minloglevel=2,
        byte_fallback=True, model_type="bpe", **settings,
    )  # fmt: skip
    return str(folder / "tokenizer.model")


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "no space": {"add_dummy_prefix": False},
    "no bos": {"add_dummy_prefix": False, "bos_id": -1},
    "bos is eos": {"add_dummy_prefix": False, "eos_piece": "<end>"},
    "other names": {"bos_piece": "<bos>", "eos_piece": "<eos>", "unk_piece": "<u>", "pad_id": 3, "pad_piece": "<p>"},
    "symbols": {
        **{"add_dummy_prefix": False, "user_defined_symbols": ["<mask>", "a\u2581b", "x y"]},
        **{"control_symbols": ["<ctl>"]},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_tokenizer_model_alone_gets_what_auto_tokenizer_needs(tmp_path: Path, kind: str) -> None:
    folder = save_model(tmp_path / "model")
    path = train(folder, **KINDS[kind])
    if kind == "bos is eos":  # sentencepiece does not train it
        model = sentencepiece_model_pb2.ModelProto.FromString(Path(path).read_bytes())
        model.trainer_spec.bos_piece = "<end>"
        Path(path).write_bytes(model.SerializeToString())
    ours = Tokenizer(path)
    assert run(folder, tmp_path / "hf", "--to", "hf") == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    some = texts(200, ["<s>", "</s>", "<unk>", "<end>", "<bos>", "<p>", "<mask>", "a b", "<ctl>", "x y"])
    assert theirs(some, add_special_tokens=False)["input_ids"] == [ours.encode(text) for text in some]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    begin = None if ours.bos_id == ours.eos_id else ours.bos_id
    assert theirs("def")["input_ids"] == ([] if begin is None else [begin]) + ours.encode("def")
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] == (kind in ("llama", "other names"))  # llama.cpp's converter reads both
    assert config["add_bos_token"] == (begin is not None)
    with pytest.raises(AttributeError, match="model conflicts with"):  # other ids otherwise
        LlamaTokenizer.from_pretrained(tmp_path / "hf")


def test_the_settings_beside_tokenizer_model_are_kept(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", pad_token_id=0)
    train(folder)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": "<unk>", "chat_template": "{{ 1 }}"}
    settings |= {"add_bos_token": False, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **settings}))
    assert run(folder, tmp_path / "ours", "--to", "deepspeed") == 0
    assert run(tmp_path / "ours", tmp_path / "hf", "--to", "hf") == 0
    found = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (found.pad_token, found.chat_template) == ("<unk>", "{{ 1 }}")
    ids = found("<s> a")["input_ids"]
    assert ids[0] == 1 != ids[1] and ids[-1] == 2  # a chat template spells its special tokens


def test_auto_tokenizer_fails_where_it_would_give_other_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model")
    train(folder, normalization_rule_name="nmt_nfkc")
    assert run(folder, tmp_path / "meta", "--to", "meta") == 0
    assert run(tmp_path / "meta", tmp_path / "hf", "--to", "hf") == 0
    assert "transformers would give other ids" in capsys.readouterr().err
    with pytest.raises(AttributeError, match="encode conflicts with"):
        AutoTokenizer.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("which", ["llama3", "neox"])
def test_tokenizers_of_other_kinds_refuse_llama_tokenizer_too(tmp_path: Path, which: str) -> None:
    path = write_llama3(tmp_path)[0] if which == "llama3" else write_gpt_neox(tmp_path)
    (tmp_path / "out").mkdir()
    for name, content in exported(Tokenizer(path)).items():
        (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(AttributeError, match="model conflicts with"):
        LlamaTokenizer.from_pretrained(tmp_path / "out")


def test_token_ids_of_a_checkpoint_without_them_are_read(write: Write) -> None:
    """Checkpoints of earlier versions have no hf_config."""
    folder = Path(write(1, True)) / "checkpoints" / "step_00000007"
    assert describe(str(folder)).hf_config == {} and not open_model(str(folder)).from_hf


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"architectures": ["GraniteForCausalLM"]}, "architectures"),
        ({"attention_multiplier": 0.0078125}, "attention_multiplier = 0.0078125"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"scale_emb": 12}, "scale_emb"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"is_causal": False}, "is_causal"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"eos_token_id": ["2"]}, 'eos_token_id = ["2"]'),
        ({"bos_token_id": [1]}, "bos_token_id = [1]"),
        ({"pad_token_id": True}, "pad_token_id = true"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **change}))
    with pytest.raises(UserError) as error:
        read_config(str(tmp_path))
    assert named in str(error.value) and str(tmp_path) in str(error.value)


def test_settings_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    neutral = {
        **{"attention_multiplier": None, "residual_multiplier": 1.0, "layer_types": ["full_attention"] * 2},
        **{"clip_qkv": None, "use_qk_norm": False, "num_local_experts": 0, "is_causal": True, "no_rope_layers": []},
        **{"eos_token_id": [1, 2], "pad_token_id": -1, "architectures": None, "pretraining_tp": 2, "use_cache": True},
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **neutral}))
    assert read_config(str(tmp_path))["pretraining_tp"] == 2


def test_a_config_with_the_defaults_left_out_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    save_model(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for key in ("num_key_value_heads", "rope_parameters", "rms_norm_eps", "max_position_embeddings", "dtype"):
        config.pop(key, None)
    path.write_text(json.dumps({**config, "head_dim": None, "vocab_size": "1000"}))
    files = open_model(str(tmp_path))
    assert (files.model.num_key_value_heads, files.model.head_dim, files.model.rope_theta) == (2, 8, 10_000.0)
    assert (files.model.rms_norm_eps, files.seq_len, files.model.vocab_size) == (1e-6, 2048, 1000)


def test_flags_for_metas_folders_are_refused_elsewhere(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(1, True, model=SHAPES["mha"])
    for flag in (("--rope-factor", 8), ("--seq-len", 4096), ("--bos-id", 1), ("--eos-id", 1, 2)):
        assert run(source, tmp_path / "hf", "--to", "hf", *flag) == 2
        assert f"{flag[0]}" in (text := capsys.readouterr().err) and "apply only to Meta folders" in text
