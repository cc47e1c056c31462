"""Tokenizers of every kind give the ids of their own library, mark documents with their own ids, and build sources."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from source_files import manifest_of, write_lines
from tokenizer_files import ODD, RANKS, sample, write_gpt_neox, write_llama3

from llama_ds.config.document_marks import DocumentMarks
from llama_ds.data.building.build import build_source
from llama_ds.data.source.shards import open_source
from llama_ds.data.source.store import open_store
from llama_ds.data.source.verify import verify_source
from llama_ds.data.text.cuts import pieces_of
from llama_ds.data.text.tiktoken_ranks import PATTERN, SPECIAL_TOKENS
from llama_ds.data.text.tokenizer import Tokenizer, tokenizer_files, train_tokenizer
from llama_ds.errors import UserError

KINDS = ("sentencepiece", "tiktoken", "llama3_json", "neox_json")
ALPHABET = [
    *("a", "word", " ", "  ", "\n", "\r\n", "\t", ". ", "1", " 12", "é", "e\u0301", "漢", "字。", "，", "Б", "한"),
    *("'s", "don't", "((", '"', "_", "\u2581", "\u3000", "😀", "</s>", "<|endoftext|>", "<|end_of_text|>", "\u0301"),
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(ALPHABET), max_size=40).map("".join))


@dataclass(frozen=True)
class Files:
    """Paths of a tokenizer of each kind."""

    paths: dict[str, str]

    def of(self, kind: str) -> Tokenizer:
        return Tokenizer(self.paths[kind])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("kinds")
    meta, hf = write_llama3(folder)
    (folder / "text.txt").write_text("\n".join(sample()).replace("\0", ""), encoding="utf-8")
    trained = train_tokenizer([str(folder / "text.txt")], str(folder / "trained"), 900)
    return Files(dict(zip(KINDS, (trained, meta, hf, write_gpt_neox(folder)), strict=True)))


@pytest.fixture(scope="module")
def loaded(files: Files) -> dict[str, Tokenizer]:
    return {kind: files.of(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def libraries(files: Files) -> dict[str, Callable[[str], list[int]]]:
    """Return each library's own encode function; for tiktoken set up as Meta does."""
    ranks = {}
    for line in Path(files.paths["tiktoken"]).read_text().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    llama3 = tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    found: dict[str, Callable[[str], list[int]]] = {
        "tiktoken": lambda text: llama3.encode(text, allowed_special=set(), disallowed_special=())
    }
    for kind in ("llama3_json", "neox_json"):
        library = tokenizers.Tokenizer.from_file(files.paths[kind])
        library.encode_special_tokens = True
        found[kind] = lambda text, library=library: library.encode(text, add_special_tokens=False).ids  # type: ignore[misc]
    return found


@given(text=TEXTS)
def test_ids_are_those_of_the_library_and_decode_to_the_text(
    loaded: dict[str, Tokenizer], libraries: dict[str, Callable[[str], list[int]]], text: str
) -> None:
    for kind, encode in libraries.items():
        ids = encode(text)
        assert loaded[kind].encode(text) == ids == loaded[kind].encode_array(text).tolist()
        assert loaded[kind].decode([*ids, loaded[kind].vocab_size, loaded[kind].vocab_size + 99]) == text
    assert libraries["tiktoken"](text) == libraries["llama3_json"](text)  # two publications of one tokenizer


@pytest.mark.parametrize(
    ("kind", "name", "vocab_size", "marks", "begin"),
    [
        ("sentencepiece", "sentencepiece", 900, DocumentMarks(1, 2), 1),
        ("tiktoken", "tiktoken", RANKS + 256, DocumentMarks(RANKS, RANKS + 1), RANKS),
        ("llama3_json", "tokenizer.json", RANKS + 256, DocumentMarks(RANKS, RANKS + 1), RANKS),
        ("neox_json", "tokenizer.json", RANKS + 1, DocumentMarks(RANKS, RANKS), None),
    ],
)
def test_a_file_is_recognized_by_its_content(
    files: Files, tmp_path: Path, kind: str, name: str, vocab_size: int, marks: DocumentMarks, begin: int | None
) -> None:
    for path, content in tokenizer_files(files.paths[kind]).items():  # as a checkpoint holds them
        (tmp_path / path).write_bytes(content)
    (copy,) = tmp_path.glob("tokenizer.[jm]*")
    renamed = copy.rename(tmp_path / "any.name")
    for tokenizer in (files.of(kind), Tokenizer(str(renamed))):
        assert (tokenizer.kind, tokenizer.vocab_size) == (name, vocab_size)
        assert tokenizer.marks == marks and tokenizer.marks.begin == begin
    assert tokenizer.sha256 == files.of(kind).sha256


def test_names_of_special_tokens_in_a_text_are_text(loaded: dict[str, Tokenizer]) -> None:
    for tokenizer in loaded.values():
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(ODD))
        marked = [tokenizer.bos_id, *tokenizer.encode("x"), tokenizer.eos_id]
        assert tokenizer.decode([i for i in marked if i is not None]) == "x"


@given(text=st.lists(TEXTS, max_size=4).map("".join), chars=st.integers(1, 9))
def test_pieces_of_a_text_have_the_ids_of_the_whole(loaded: dict[str, Tokenizer], text: str, chars: int) -> None:
    for tokenizer in loaded.values():
        parts = [i for piece in pieces_of(text, tokenizer.cuts, chars) for i in tokenizer.encode(piece)]
        assert parts == tokenizer.encode(text)


def test_every_kind_can_cut_prose(loaded: dict[str, Tokenizer]) -> None:
    for prose in ("It was the first day of the voyage.\n" * 100, "天地玄黄。宇宙洪荒" * 100):
        for tokenizer in loaded.values():
            assert max(map(len, pieces_of(prose, tokenizer.cuts, 100))) < 120, tokenizer.kind


def rewritten(files: Files, folder: Path, beside: dict[str, object], **changes: object) -> str:
    """Write neox_json with changes to its tokenizer.json, and only the given files beside it."""
    content = json.loads(Path(files.paths["neox_json"]).read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    for name, value in beside.items():
        (folder / name).write_text(json.dumps(value))
    return str(folder / "tokenizer.json")


END, A = "<|endoftext|>", "a"


@pytest.mark.parametrize(
    ("beside", "bos", "eos"),
    [
        ({"tokenizer_config.json": {"bos_token": None, "eos_token": END}}, None, END),
        ({"tokenizer_config.json": {"bos_token": {"content": END}, "eos_token": {"content": END}}}, END, END),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": END}}, None, END),
        ({"config.json": {"eos_token_id": RANKS, "bos_token_id": None}}, None, END),
        # The tokenizer's own file wins over the model's.
        (
            {"tokenizer_config.json": {"eos_token": END}, "config.json": {"bos_token_id": 5, "eos_token_id": [1]}},
            None,
            END,
        ),
    ],
)
def test_bos_and_eos_come_from_the_files_beside(
    files: Files, tmp_path: Path, beside: dict[str, object], bos: str | None, eos: str
) -> None:
    tokenizer = Tokenizer(rewritten(files, tmp_path, beside))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (RANKS if bos else None, RANKS)


@pytest.mark.parametrize(
    ("beside", "problem"),
    [
        ({}, "names no eos id.*set eos_token in .*tokenizer_config.json"),
        ({"tokenizer_config.json": {"bos_token": END}}, "names no eos id.*set eos_token"),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, "eos_token = '</s>' is no token"),
        ({"tokenizer_config.json": {"eos_token": A}}, "the text 'a' encodes to the id"),
        ({"config.json": {"eos_token_id": [1, 2]}}, "names several ids.*eos_token"),
        ({"config.json": {"eos_token_id": RANKS + 1}}, f"eos_token_id = {RANKS + 1} is no id below {RANKS + 1}"),
    ],
)
def test_an_eos_that_is_not_known_is_asked_for(
    files: Files, tmp_path: Path, beside: dict[str, object], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        _ = Tokenizer(rewritten(files, tmp_path, beside)).marks


def test_settings_for_batches_neither_cut_nor_pad_documents(files: Files, tmp_path: Path) -> None:
    batches = {
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": END,
        },
    }  # fmt: skip
    tokenizer = Tokenizer(rewritten(files, tmp_path, {}, **batches))
    assert tokenizer.encode(ODD) == files.of("neox_json").encode(ODD)


def test_random_ids_are_refused(files: Files, tmp_path: Path) -> None:
    model = json.loads(Path(files.paths["neox_json"]).read_text("utf-8"))["model"]
    with pytest.raises(UserError, match=r"model\.dropout = 0\.1 makes ids random"):
        Tokenizer(rewritten(files, tmp_path, {}, model={**model, "dropout": 0.1}))


def lines(count: int) -> bytes:
    tokens = [bytes([i]) for i in range(256)] + [i.to_bytes(3, "big") for i in range(count - 256)]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (lines(300)[:-3] + b"x\n", r"line 300 is not \"BASE64 RANK\""),
        (lines(300).replace(b" 7\n", b" 700\n"), "its 300 ranks are not 0 to 299"),
        (lines(300).replace(b"BA== 4\n", b"BA= 4\n"), r"line 5 is not \"BASE64 RANK\""),
        (lines(300).replace(b"BA== 4\n", b"//// 4\n"), "has no rank for the byte 0x04"),
        (lines(100256), "100256 ranks are cl100k_base's"),
        (b'{"a": 1}', "not a tokenizer.json of Hugging Face's"),
        (b'{"a": ', "not a tokenizer.json of Hugging Face's"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(UserError, match=rf"t\.model: .*{problem}"):
        Tokenizer(str(tmp_path / "t.model"))


def test_a_folder_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder; name the tokenizer in it: tokenizer\.json or tokenizer\.model"):
        Tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_holds_the_documents_between_their_marks(files: Files, tmp_path: Path, kind: str) -> None:
    texts = [f"{i}: {ODD[i:]}".replace("\0", "") for i in range(40)]
    source = write_lines(tmp_path / "text.jsonl", texts)
    build_source("s", str(source), files.paths[kind], str(tmp_path), 64, 0.0, rows_per_shard=8)
    assert verify_source(open_store(str(tmp_path / "s"))) == []
    tokenizer = files.of(kind)
    marks, train = tokenizer.marks, manifest_of(tmp_path / "s").splits["train"]
    rows = open_source(str(tmp_path / "s"), "train").read(np.arange(train.rows))
    ids = np.concatenate([rows[:1, 0], rows[:, 1:].ravel()])
    before = [] if marks.begin is None else [marks.begin]
    assert ids[: train.ids].tolist() == [i for text in texts for i in (*before, *tokenizer.encode(text), marks.eos)]
    assert (ids[train.ids :] == marks.eos).all()


def test_what_tiktoken_cannot_encode_can_be_left_out(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its pattern gives up on a million spaces, here after pieces of the document that are encoded already."""
    spaces = " " * 1_200_000
    texts = ["the first", "many words, " * 25_000 + spaces, "the second", spaces + "x", "the third"]
    documents, words = write_lines(tmp_path / "texts.jsonl", texts), (files.paths["tiktoken"], str(tmp_path), 4, 0.0)
    with pytest.raises(
        UserError, match=r"texts\.jsonl:2: .* cannot encode .*, or leave such documents out with --skip"
    ):
        build_source("s", str(documents), *words, overwrite=True)
    build_source("s", str(documents), *words, overwrite=True, skip_bad=True)
    assert "documents left out, 2: the tokenizer cannot encode it, the first in line 2" in caplog.text
    tokenizer = files.of("tiktoken")
    marks = tokenizer.marks
    expected = [i for text in texts[::2] for i in (marks.begin, *tokenizer.encode(text), marks.eos)]
    rows = np.concatenate(list(open_source(str(tmp_path / "s"), "train").blocks()))
    assert [int(rows[0, 0]), *rows[:, 1:].ravel().tolist()][: len(expected)] == expected
    assert manifest_of(tmp_path / "s").splits["train"].documents == 3


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path: Path) -> None:
    (tmp_path / "large.model").write_bytes(lines(66_000))
    source = write_lines(tmp_path / "text.jsonl", ["abc"] * 20)
    manifest = build_source("s", str(source), str(tmp_path / "large.model"), str(tmp_path), 8, 0.0)
    assert (manifest.vocab_size, manifest.dtype) == (66_256, "<u4")
    row = open_source(str(tmp_path / "s"), "train").read(np.arange(1))[0]
    assert row.tolist() == [66_000, 97, 98, 99, 66_001, 66_000, 97, 98, 99]
