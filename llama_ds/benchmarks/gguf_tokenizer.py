"""A tokenizer of any kind as llama.cpp reads it in a GGUF file, with equal ids; refused where llama.cpp's would differ.

What llama.cpp does is read off its src/llama-vocab.cpp: for "llama" it merges characters by the pieces' scores and
normalizes nothing; for "gpt2" it splits texts as the pre-tokenizer of the given name does, and merges bytes by rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from gguf import TokenType

from llama_ds.benchmarks.exported_tokenizer import exported
from llama_ds.checkpoint.carried import TOKENIZER_CONFIG, TOKENIZER_JSON
from llama_ds.checkpoint.formats.gguf_model import GgufVocabulary
from llama_ds.checkpoint.formats.hf_config import read_object
from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.data.text.sentencepiece_model import SentencepieceModel
from llama_ds.data.text.tiktoken_ranks import PATTERN
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

TEMPLATE = "chat_template.jinja"
ADDED_SCORE = -1000.0  # score of a token that no merge makes; llama.cpp's converter writes the same
# Pre-tokenizers by the steps in tokenizer.json, as llama.cpp names them.
PRE_TOKENIZERS = {
    ("ByteLevel with GPT-2's pattern",): "gpt-2",
    (f"Split {PATTERN}", "ByteLevel"): "llama-bpe",
    ("Digits", "ByteLevel with GPT-2's pattern"): "smollm",
}
WHOLE_WORDS = ("llama-bpe",)  # llama.cpp takes a word that is a token without merging it, whatever the merges say


def model_vocabulary(files: ModelFiles) -> tuple[GgufVocabulary | None, list[str]]:
    """Return `gguf_vocabulary` of a model's tokenizer; None if it has none.

    Raises:
        UserError: the tokenizer is damaged, or llama.cpp has none that gives its ids.
    """
    return (None, []) if files.tokenizer is None else gguf_vocabulary(Tokenizer(files.tokenizer))


def gguf_vocabulary(tokenizer: Tokenizer) -> tuple[GgufVocabulary, list[str]]:
    """Return the tokenizer, and what is to know about texts whose ids differ.

    Raises:
        UserError: llama.cpp has no tokenizer that gives these ids.
    """
    if isinstance(tokenizer.vocabulary, SentencepieceModel):
        return _sentencepiece(tokenizer, tokenizer.vocabulary)
    files = exported(tokenizer)
    content, config = (json.loads(files[name]) for name in (TOKENIZER_JSON, TOKENIZER_CONFIG))
    template = files[TEMPLATE].decode() if TEMPLATE in files else config.get("chat_template")
    return _byte_level(tokenizer, content, template if isinstance(template, str) else None), []


def _sentencepiece(tokenizer: Tokenizer, model: SentencepieceModel) -> tuple[GgufVocabulary, list[str]]:
    if others := model.beyond_merges():
        raise _refused(tokenizer, " and ".join(others))
    pieces = model.pieces()
    tokens, types = [piece.text for piece in pieces], model.piece_types()
    scores = [piece.score for piece in pieces]
    for text, special in _added_tokens(os.path.dirname(tokenizer.path), len(tokens)):
        tokens.append(text)
        types.append(int(TokenType.CONTROL if special else TokenType.USER_DEFINED))
        scores.append(ADDED_SCORE)
    vocabulary = GgufVocabulary(
        "llama",
        "default",
        tuple(tokens),
        tuple(types),
        tokenizer.bos_id,
        tokenizer.eos_id,
        _begins_with_bos(tokenizer),
        scores=tuple(scores),
        unknown=model.unk_id,
        add_space_prefix=model.prefixed,
        chat_template=_template(os.path.dirname(tokenizer.path)),
    )
    return vocabulary, _differences(vocabulary)


def _differences(vocabulary: GgufVocabulary) -> list[str]:
    """Return the texts that llama.cpp encodes otherwise than sentencepiece, in words."""
    pieces, user_defined = list(zip(vocabulary.tokens, vocabulary.types, strict=True)), int(TokenType.USER_DEFINED)
    known = {text for text, kind in pieces if kind != user_defined}  # those are split off before any merge
    found = []
    reserved = (int(TokenType.UNKNOWN), int(TokenType.CONTROL), int(TokenType.BYTE))
    merged = [text for text, kind in pieces if kind in reserved and _can_be_merged(text, known)]
    if merged:
        names = ", ".join(merged[:3]) + (", ..." if len(merged) > 3 else "")
        found.append(f"llama.cpp reads {names} in a text as the id of that name, this project as text")
    if user_defined in vocabulary.types and vocabulary.add_space_prefix:
        found.append("llama.cpp puts a space after every user-defined token, sentencepiece does not")
    if not vocabulary.add_space_prefix:
        found.append("llama.cpp reads the character U+2581 in a text as a space, this project as itself")
    return found


def _can_be_merged(text: str, known: set[str]) -> bool:
    """Return whether a merge can make this text: any two neighbours, of which each is a token or one character."""
    cuts = ((text[:i], text[i:]) for i in range(1, len(text)))
    return any(all(len(part) == 1 or part in known for part in cut) for cut in cuts)


def _added_tokens(folder: str, first: int) -> Iterator[tuple[str, bool]]:
    """Yield (text, special) of the tokens that a Hugging Face folder adds after the pieces, without a gap."""
    path = os.path.join(folder, TOKENIZER_CONFIG)
    added = read_object(path).get("added_tokens_decoder", {}) if os.path.exists(path) else {}
    by_id = {int(i): (str(t["content"]), bool(t.get("special"))) for i, t in added.items() if int(i) >= first}
    path = os.path.join(folder, "added_tokens.json")
    if not by_id and os.path.exists(path):
        by_id = {int(i): (text, True) for text, i in read_object(path).items() if int(i) >= first}
    while first in by_id:
        yield by_id[first]
        first += 1


def _template(folder: str) -> str | None:
    path = os.path.join(folder, TEMPLATE)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return file.read()
    path = os.path.join(folder, TOKENIZER_CONFIG)
    found = read_object(path).get("chat_template") if os.path.exists(path) else None
    return found if isinstance(found, str) else None


def _byte_level(tokenizer: Tokenizer, content: Mapping[str, Any], template: str | None) -> GgufVocabulary:
    model = content["model"]
    _check_model(tokenizer, content)
    steps = tuple(_steps(content.get("pre_tokenizer")))
    pre = PRE_TOKENIZERS.get(steps)
    if pre is None:
        raise _refused(tokenizer, f"splits texts by {' + '.join(steps) or 'nothing'}")
    if bool(model.get("ignore_merges")) != (pre in WHOLE_WORDS):
        _check_merges(tokenizer, model)
    texts = {index: text for text, index in model["vocab"].items()}
    types = dict.fromkeys(texts, int(TokenType.NORMAL))
    for token in content.get("added_tokens", []):
        texts[token["id"]] = token["content"]
        types[token["id"]] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    for gap in set(range(tokenizer.vocab_size)) - set(texts):
        texts[gap], types[gap] = f"[UNUSED{gap}]", int(TokenType.UNUSED)
    ids = range(len(texts))
    return GgufVocabulary(
        "gpt2",
        pre,
        tuple(texts[i] for i in ids),
        tuple(types[i] for i in ids),
        tokenizer.bos_id,
        tokenizer.eos_id,
        _begins_with_bos(tokenizer),
        merges=tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]),
        chat_template=template,
    )


def _check_model(tokenizer: Tokenizer, content: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp's byte-level BPE does not do."""
    model, normalizer = content["model"], content.get("normalizer") or {}
    if model.get("type") != "BPE":
        raise _refused(tokenizer, f"is a {model.get('type')} model")
    if model.get("byte_fallback"):
        fix = "put the model's tokenizer.model beside this file"
        raise _refused(tokenizer, "is sentencepiece's in another form, without its scores", fix)
    if normalizer.get("type", "Sequence") != "Sequence" or normalizer.get("normalizers"):
        raise _refused(tokenizer, f"normalizes texts ({normalizer['type']})")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(tokenizer, f"has a {key}")


def _check_merges(tokenizer: Tokenizer, model: Mapping[str, Any]) -> None:
    """Refuse merges by which it matters whether a word that is a token is merged."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(str(left), str(right)) for left, right in pairs]
    bpe = tokenizers.models.BPE(model["vocab"], merges)
    if other := next((text for text in model["vocab"] if len(bpe.tokenize(text)) > 1), None):
        raise _refused(tokenizer, f"has merges that do not make its token {other!r}")


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the steps of a pre-tokenizer, named by all that changes the pieces."""
    if pre_tokenizer is None:
        return
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        for step in pre_tokenizer["pretokenizers"]:
            yield from _steps(step)
    elif kind == "ByteLevel":
        space = " after a space" if pre_tokenizer.get("add_prefix_space") else ""
        yield f"ByteLevel{space}" + (" with GPT-2's pattern" if pre_tokenizer.get("use_regex", True) else "")
    elif kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        yield f"Split {next(iter(pre_tokenizer['pattern'].values()))}"
    elif kind == "Digits" and pre_tokenizer.get("individual_digits"):
        yield "Digits"
    else:
        yield json.dumps(pre_tokenizer, ensure_ascii=False)


def _begins_with_bos(tokenizer: Tokenizer) -> bool:
    return tokenizer.bos_id is not None and tokenizer.bos_id != tokenizer.eos_id


def _refused(tokenizer: Tokenizer, why: str, fix: str = "convert to hf, whose tools read this tokenizer") -> UserError:
    return UserError(f"{tokenizer.path}: llama.cpp would give other ids, because it {why}; {fix}")
