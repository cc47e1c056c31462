"""Of several weight files in a folder those are read that transformers reads, or the folder is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llama_ds.benchmarks.generation import load_exported
from llama_ds.checkpoint.load_model import load_model, open_model
from llama_ds.checkpoint.names import hf_name
from llama_ds.errors import UserError
from tools import convert

SINGLE, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
Folder = Callable[[], Path]


def small_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1 << 20, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of one configuration: `new` and `old` weights in one file, `shards` and `more` in several."""
    root = tmp_path_factory.mktemp("saved")
    for seed, name in enumerate(("new", "old", "shards", "more")):
        small_model(seed).save_pretrained(
            root / name, max_shard_size={"shards": "12KB", "more": "6KB"}.get(name, "1GB")
        )
    return root


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "new", tmp_path / "hf"))


def add(folder: Path, source: Path) -> None:
    for file in source.iterdir():
        if file.name != "config.json":
            shutil.copy(file, folder)


def check_as_transformers(folder: Path) -> tuple[str, ...]:
    """Check that the tensors are those that transformers loads; return the notes."""
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    files = open_model(str(folder))
    found = {hf_name(*key, files.model.num_hidden_layers): t.whole() for key, t in files.tensors.items()}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
    return files.notes


def as_bin(folder: Path, seed: int) -> None:
    torch.save(small_model(seed).state_dict(), folder / BIN)


@pytest.mark.parametrize("others", [("shards",), ("bin",), ("shards", "more", "bin"), ("consolidated",)])
def test_one_file_counts_more_than_all_others(saved: Path, folder: Path, others: tuple[str, ...]) -> None:
    """An index left beside a newer model.safetensors, or an export over an older one, must not win."""
    for other in others:
        if other == "bin":
            as_bin(folder, 7)
        elif other == "consolidated":
            shutil.copy(saved / "old" / SINGLE, folder / "consolidated.safetensors")
        else:
            add(folder, saved / other)
    (note,) = check_as_transformers(folder)
    assert note.startswith(f"{folder / SINGLE}: is read, as transformers does; not read: ")


def test_the_files_of_an_index_count_more_than_other_shards_and_pickles(saved: Path, folder: Path) -> None:
    (folder / SINGLE).unlink()
    add(folder, saved / "more")
    add(folder, saved / "shards")  # its index replaces the other's, and the shards of both remain
    as_bin(folder, 7)
    (note,) = check_as_transformers(folder)
    assert note.startswith(f"{folder / INDEX}: is read") and "model-00001-of-0000" in note
    for file in folder.glob("model*"):
        file.unlink()
    (folder / (BIN + ".index.json")).write_text('{"weight_map": {"a": "b.bin"}}')
    (note,) = check_as_transformers(folder)
    assert note.startswith(f"{folder / BIN}: is read") and note.endswith(f"not read: {BIN}.index.json")


def test_a_tensor_in_two_shards_is_refused(saved: Path, folder: Path) -> None:
    """transformers takes the later file's, whatever the index says; a partly overwritten export looks like this."""
    (folder / SINGLE).unlink()
    add(folder, saved / "shards")
    first, second = sorted(folder.glob("model-*"))[:2]
    twice = load_file(second) | {"model.embed_tokens.weight": torch.ones(64, 16)}
    assert "model.embed_tokens.weight" in load_file(first)
    save_file(twice, second, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensor \(model.embed_tokens.weight\) is also in model-00001"):
        open_model(str(folder))


def test_the_report_of_a_conversion_names_the_files_not_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_bin(folder, 7)
    assert convert.main([str(folder), str(tmp_path / "out"), "--to", "deepspeed"]) == 0
    out = capsys.readouterr().out
    assert f"{folder / SINGLE}: is read, as transformers does; not read: {BIN}\n" in out
    assert "proof   logits  max abs difference 0 " in out


def test_a_million_positions_take_no_memory(folder: Path) -> None:
    """Rotary tables of all of them would take gigabytes at a usual head size."""
    model = load_model(str(folder))
    longest = model.logits([[3, 1, 4, 1, 5]])
    assert all(len(table) == 8 for table in model.context.rotary.on(torch.device("cpu"), 5))
    rows = [model.logits([[3, 1, 4, 1, 5] + [0] * more])[:, :5] for more in (0, 4, 60)]  # tables of 8, 16 and 128
    assert all(torch.allclose(row, longest, atol=1e-6) for row in rows)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["global_step500", "latest", "zero_to_fp32.py"], "global_step500: holds DeepSpeed's ZeRO shards"),
        (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "optim_states.pt: holds DeepSpeed's ZeRO shards"),
        (["pytorch_model_fsdp_0"], "pytorch_model_fsdp_0: holds FSDP's shards"),
    ],
)
def test_shards_of_an_optimizer_are_no_model(folder: Path, files: list[str], named: str) -> None:
    (folder / SINGLE).unlink()
    for name in files:
        (folder / name).mkdir()
    with pytest.raises(UserError, match=named):
        open_model(str(folder))


def test_a_trainers_folder_is_read(folder: Path) -> None:
    """A Trainer with DeepSpeed leaves `latest` and ZeRO shards beside the model."""
    (folder / "latest").write_text("global_step500")
    (folder / "global_step500").mkdir()
    assert check_as_transformers(folder) == ()
    save_file({name: torch.empty(0) for name in load_file(folder / SINGLE)}, folder / SINGLE)
    with pytest.raises(UserError, match="global_step500: holds DeepSpeed's ZeRO shards"):
        open_model(str(folder))  # ZeRO-3 without gathering: a model file of empty tensors
    shutil.rmtree(folder / "global_step500")
    for name in (SINGLE, "config.json"):
        (folder / name).unlink()
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(UserError, match=r"run its zero_to_fp32\.py"):
        open_model(str(folder))


@pytest.mark.parametrize("complete", [True, False])
def test_an_adapter_is_refused(folder: Path, complete: bool) -> None:
    (folder / "adapter_config.json").write_text("{}")
    if not complete:
        for name in (SINGLE, "config.json"):
            (folder / name).unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json: belongs to an adapter"):
        open_model(str(folder))


def test_a_folder_with_two_formats_is_refused(folder: Path) -> None:
    (folder / "consolidated.00.pth").touch()
    with pytest.raises(
        UserError,
        match=r"contains config\.json \(hf\) and params\.json or .* \(meta\).* with --from",
    ):
        open_model(str(folder))
    assert len(open_model(str(folder), "hf").tensors) == 21
    (folder / "consolidated.00.pth").rename(folder / "llama_ds.json")
    with pytest.raises(UserError, match=r"contains a checkpoint of llama_ds \(deepspeed\) and config\.json"):
        open_model(str(folder))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.{name}",
        lambda name: name.replace("layers.", "_fsdp_wrapped_module.layers.").replace(
            ".self_attn", "._checkpoint_wrapped_module.self_attn"
        ),
        lambda name: name.removeprefix("model."),
    ],
)
def test_prefixes_of_wrappers_are_removed(folder: Path, rename: Callable[[str], str]) -> None:
    wanted = {key: t.whole() for key, t in open_model(str(folder)).tensors.items()}
    state = load_file(folder / SINGLE)
    save_file({rename(name): tensor for name, tensor in state.items()}, folder / SINGLE)
    files = open_model(str(folder))
    assert all(torch.equal(files.tensors[key].whole(), wanted[key]) for key in wanted)
    assert "prefixes of wrappers were removed" in files.notes[0]
    save_file({**{rename(name): tensor for name, tensor in state.items()}, "lm_head.weight": torch.ones(64, 16),
               "module.lm_head.weight": torch.ones(64, 16)}, folder / SINGLE)  # fmt: skip
    with pytest.raises(UserError, match=r"are both lm_head\.weight"):
        open_model(str(folder))


def test_transformers_makes_no_weights_up(folder: Path) -> None:
    """It would generate and evaluate with random weights where it does not know the names."""
    state = load_file(folder / SINGLE)
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"transformers finds no weights for .*tools/convert\.py --to hf"):
        load_exported(str(folder), "auto")


@pytest.mark.parametrize(("name", "content"), [("config.json", b"null"), ("config.json", b"{}"), (SINGLE, b"cut")])
def test_a_folder_that_transformers_cannot_load_is_one_line(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"transformers cannot load it \(\w+: .*\); export the model again") as found:
        load_exported(str(folder), "auto")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("how", ["legacy", "legacy transposed", "transposed", "slices of one storage"])
def test_every_layout_of_a_torch_file_is_read(folder: Path, how: str) -> None:
    (folder / SINGLE).unlink()
    state = small_model(3).half().state_dict()
    if "transposed" in how:
        state = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in state.items()}
    if how == "slices of one storage":
        both = torch.cat([state["model.embed_tokens.weight"], state["lm_head.weight"]], 1)
        state["model.embed_tokens.weight"], state["lm_head.weight"] = both.chunk(2, 1)
    torch.save(state, folder / BIN, _use_new_zipfile_serialization="legacy" not in how)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert check_as_transformers(folder) == ()
