"""AutoTokenizer, loaded from an exported tokenizer.json, gives the same ids as training for every text."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import ODD, write_gpt_neox, write_llama3
from transformers import AutoTokenizer

from llama_ds.benchmarks.exported_tokenizer import exported
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

SPECIAL = " \t\n\r\u2581\u2585\u2047\ufffd\ufeff\u0301\u3000\x00\x7f<s>/unk0x4１é😀\U0010ffff"
PIECES = ["    ", "  ", " ", "self", "s", "e", "de", "def", "__", "_", "=", "==", '"""', "\n", "\u2581", "aa", "a", "0"]


def hf(model: str, folder: Path) -> Any:
    for name, content in exported(Tokenizer(model)).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))  # AutoTokenizer reads this first
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return hf(tokenizer, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def ours(tokenizer: str) -> Tokenizer:
    return Tokenizer(tokenizer)


@settings(max_examples=500)
@given(
    st.one_of(
        st.text(),
        st.text(alphabet=SPECIAL),
        st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
        st.text(alphabet="a =_", max_size=60),
    )
)
def test_ids_and_text_are_the_same(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == text


def test_source_files_have_the_same_ids(ours: Tokenizer, theirs: Any) -> None:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-c]*.py")):
        text = path.read_text(encoding="utf-8")
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text), path


def test_a_prompt_begins_with_bos_and_bos_has_no_text(ours: Tokenizer, theirs: Any) -> None:
    ids = theirs("def main")["input_ids"]
    assert ids == [ours.bos_id, *ours.encode("def main")]
    assert theirs.decode(ids, skip_special_tokens=True) == "def main"
    assert theirs("")["input_ids"] == [ours.bos_id]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def train(folder: Path, **settings: Any) -> str:
    texts = [line for p in (Path(sysconfig.get_paths()["stdlib"]) / "json").glob("*.py") for line in p.open()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "t"), vocab_size=600, minloglevel=2,
        byte_fallback=True, model_type="bpe", **settings,
    )  # fmt: skip
    return str(folder / "t.model")


@pytest.mark.parametrize("text", ["", "a", " a", "  a  b ", "def x", "\u2581a b\u2581", "é\n"])
def test_the_original_llama_models_space_before_a_text(tmp_path: Path, text: str) -> None:
    model = train(tmp_path, normalization_rule_name="identity", remove_extra_whitespaces=False)
    ours, theirs = Tokenizer(model), hf(model, tmp_path)
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == ours.decode(ids)


def test_a_model_that_normalises_is_not_imitated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a BPE model without normalisation"):
        exported(Tokenizer(train(tmp_path)))  # sentencepiece's default: NFKC


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Return tokenizers of the other kinds, and what AutoTokenizer makes of their exports."""
    root, found = tmp_path_factory.mktemp("others"), {}
    paths = dict(zip(("tiktoken", "llama3"), write_llama3(root), strict=True))
    for name, path in {**paths, "neox": write_gpt_neox(root)}.items():
        (root / f"out_{name}").mkdir()
        found[name] = Tokenizer(path), hf(path, root / f"out_{name}")
    return found


@given(st.one_of(st.text(), st.lists(st.sampled_from([*PIECES, " don't", "漢字", "。", "12", "é"])).map("".join)))
def test_exports_of_other_kinds_have_the_same_ids(others: dict[str, tuple[Tokenizer, Any]], text: str) -> None:
    for ours, theirs in others.values():
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", ["tiktoken", "llama3", "neox"])
def test_exports_of_other_kinds_mark_documents_as_training_does(
    others: dict[str, tuple[Tokenizer, Any]], kind: str
) -> None:
    ours, theirs = others[kind]
    before = [] if ours.marks.begin is None else [ours.marks.begin]
    assert theirs("def main")["input_ids"] == [*before, *ours.encode("def main")]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_names_of_special_tokens_stay_text_in_the_export_of_a_tiktoken_file(
    others: dict[str, tuple[Tokenizer, Any]],
) -> None:
    ours, theirs = others["tiktoken"]
    assert theirs(ODD, add_special_tokens=False)["input_ids"] == ours.encode(ODD)
