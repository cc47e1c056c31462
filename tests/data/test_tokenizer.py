"""The tokenizer is lossless, splits digits as LLaMA's does, and its training is deterministic."""

from __future__ import annotations

from pathlib import Path

import pytest
from built_sources import VOCAB_SIZE, Built
from hypothesis import given
from hypothesis import strategies as st

from llama_ds.data.text.tokenizer import Tokenizer, train_tokenizer
from llama_ds.errors import UserError

SPECIAL = " \t\n\r\u2581\u2585\u2047\ufffd\ufeff\u0301\u2028\u3000\u00a0\x00\x01\x7f<s>/unk0x4１é😀\U0010ffff"


@pytest.fixture(scope="module")
def tokenizer(built: Built) -> Tokenizer:
    return Tokenizer(built.tokenizer)


@given(st.one_of(st.text(), st.text(alphabet=SPECIAL)))
def test_decode_of_encode_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["", "  a  b ", "\u2581", " \u2581 a\u2581\u2581", "\r\n\t x", "<s></s><0x41>"])
def test_spaces_marks_and_names_of_control_ids_survive(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@given(texts=st.lists(st.text(alphabet=SPECIAL + "abc ")))
def test_a_batch_equals_its_texts(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts, threads=2) == [tokenizer.encode(text) for text in texts]


def test_special_ids_and_digits_are_as_in_llama(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (VOCAB_SIZE, 1, 2)
    assert len(tokenizer.encode("2048")) == 4  # every digit on its own
    assert tokenizer.decode([1, *tokenizer.encode("x"), 2]) == "x"


def test_the_same_text_gives_the_same_model(built: Built, tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = Tokenizer(train_tokenizer([built.code, built.prose], str(tmp_path / "again"), VOCAB_SIZE))
    assert again.sha256 == tokenizer.sha256


@pytest.mark.parametrize(("filler", "size"), [("天地玄黄宇宙洪荒日月盈昃辰宿列张\n", 300), ("foo\tbar\tbaz\n", 275)])
def test_a_tokenizer_of_text_almost_without_spaces_keeps_its_spaces(tmp_path: Path, filler: str, size: int) -> None:
    text = filler * 2000 + "x y\n"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer(train_tokenizer([str(tmp_path / "text.txt")], str(tmp_path / "t"), size))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("天地 \u2581 b") != tokenizer.encode("天地 \u2581\u2581b")  # a mark is no space
    assert tokenizer.decode(tokenizer.encode("a \u2581b")) == "a \u2581b"  # "a" is no piece of this vocabulary


@pytest.mark.parametrize(
    ("line", "problem"), [(b'{"text": "caf\xe9"}', "invalid UTF-8"), (b"{}", 'no "text"'), (b"x", "not JSON")]
)
def test_training_names_a_bad_document(built: Built, tmp_path: Path, line: bytes, problem: str) -> None:
    good = Path(built.prose).read_bytes()
    (tmp_path / "bad.jsonl").write_bytes(good + line + b"\n" + good)
    with pytest.raises(UserError, match=rf"bad\.jsonl.*{problem}") as error:
        train_tokenizer([str(tmp_path / "bad.jsonl")], str(tmp_path / "t"), VOCAB_SIZE)
    assert "does not suit" not in str(error.value)
    assert not (tmp_path / "t.model").exists()


@pytest.mark.parametrize("content", [None, b"", b"not a model", "half"])
def test_missing_or_damaged_model_is_a_user_error(built: Built, tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "t.model"
    if content is not None:
        model = Path(built.tokenizer).read_bytes()
        path.write_bytes(model[: len(model) // 2] if isinstance(content, str) else content)
    with pytest.raises(UserError, match=r"t\.model: .*tools/tokenizer\.py train"):
        Tokenizer(str(path))


@pytest.mark.parametrize(("size", "fix"), [(260, "use more than"), (100000, "use at most")])
def test_an_unsuitable_vocabulary_size_is_refused(built: Built, tmp_path: Path, size: int, fix: str) -> None:
    with pytest.raises(UserError, match=f"vocab_size = {size} .*{fix}"):
        train_tokenizer([built.prose], str(tmp_path / "t"), size)
    assert not (tmp_path / "t.model").exists()
