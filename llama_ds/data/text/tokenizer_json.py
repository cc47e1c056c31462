"""Hugging Face's tokenizer.json: any fast tokenizer, encoded by the package tokenizers.

The file names no bos and eos. They come from the first of these files beside it that names one of them:
tokenizer_config.json, special_tokens_map.json (bos_token, eos_token), config.json (bos_token_id, eos_token_id).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from llama_ds.data.text.cuts import PairCuts, pairs_of_bpe
from llama_ds.errors import UserError

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKEN_NAMES = (CONFIG, "special_tokens_map.json")
TOKEN_IDS = "config.json"
TEMPLATE = "chat_template.jinja"


def is_json(content: bytes) -> bool:
    """Return whether a file looks like JSON."""
    return content.lstrip()[:1] == b"{"


class TokenizerJson:
    """A fast tokenizer. Names of its special tokens in a text are text, as with split_special_tokens."""

    KIND = "tokenizer.json"

    def __init__(self, path: str, content: bytes) -> None:
        """Load the tokenizer, and find its bos and eos.

        Raises:
            UserError: the file is damaged or no tokenizer.json, or a file beside it contradicts it.
        """
        self.path = path
        self._tokenizer = _load(path, content)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.eos_id = _special_ids(path, self._tokenizer, self.vocab_size)
        for name in self.special_names().values():
            if (index := self._tokenizer.token_to_id(name)) in self.encode(name):
                raise UserError(
                    f"{path}: the text {name!r} encodes to the id {index} that marks documents; mark this token as "
                    '"special": true in "added_tokens"'
                )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of `encode` as an array."""
        return np.array(self.encode(text), np.uint32)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def special_names(self) -> dict[str, str]:
        """Return bos_token and eos_token, as far as they are known."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        return {key: str(self._tokenizer.id_to_token(index)) for key, index in ids.items() if index is not None}

    @cached_property
    def cuts(self) -> PairCuts | None:
        """Where a text may be cut without a change of its ids; None: nowhere that is certain."""
        if not isinstance(self._tokenizer.model, tokenizers.models.BPE):
            return None
        return pairs_of_bpe(self.encode, self._tokenizer.get_vocab(with_added_tokens=True))


def files_beside(path: str, names: Mapping[str, str]) -> dict[str, bytes]:
    """Return the files that AutoTokenizer reads beside a tokenizer.json; `names` are its bos_token and eos_token."""
    folder = os.path.dirname(path)
    config = _object(os.path.join(folder, CONFIG)) or {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    names = {**_other_names(os.path.join(folder, TOKEN_NAMES[1])), **names}
    config = {**config, **{key: name for key, name in names.items() if config.get(key) is None}}
    found = {CONFIG: json.dumps(config, indent=2, ensure_ascii=False).encode()}
    if os.path.exists(template := os.path.join(folder, TEMPLATE)):
        with open(template, "rb") as file:
            found[TEMPLATE] = file.read()
    return found


def _other_names(path: str) -> dict[str, str]:
    """Return the names of the padding and unknown tokens that special_tokens_map.json alone may hold."""
    found = {key: (_object(path) or {}).get(key) for key in ("pad_token", "unk_token")}
    contents = {key: token.get("content") if isinstance(token, dict) else token for key, token in found.items()}
    return {key: name for key, name in contents.items() if isinstance(name, str)}


def _load(path: str, content: bytes) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises no narrower class
        raise UserError(
            f"{path}: not a tokenizer.json of Hugging Face's tokenizers ({error}); name that file of the model, or "
            "copy it again"
        ) from None
    if dropout := getattr(tokenizer.model, "dropout", None):
        raise UserError(f"{path}: model.dropout = {dropout:g} makes ids random; set it to null")
    if not tokenizer.get_vocab_size():
        raise UserError(f"{path}: its vocabulary is empty; name the tokenizer.json of the model")
    # Settings for batches of short texts, which would cut or pad documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # else a document could spell the end of a document
    return tokenizer


def _special_ids(path: str, tokenizer: tokenizers.Tokenizer, vocab_size: int) -> tuple[int | None, int | None]:
    folder = os.path.dirname(path)
    for name in TOKEN_NAMES:
        config = _object(where := os.path.join(folder, name)) or {}
        ids = [_id_of(where, key, config.get(key), tokenizer) for key in ("bos_token", "eos_token")]
        if ids != [None, None]:
            return ids[0], ids[1]
    config = _object(where := os.path.join(folder, TOKEN_IDS)) or {}
    bos, eos = (_checked(where, key, config.get(key), vocab_size) for key in ("bos_token_id", "eos_token_id"))
    return bos, eos


def _id_of(where: str, key: str, token: Any, tokenizer: tokenizers.Tokenizer) -> int | None:
    name = token.get("content") if isinstance(token, dict) else token
    if name is None:
        return None
    index = tokenizer.token_to_id(name) if isinstance(name, str) else None
    if index is None:
        raise UserError(
            f"{where}: {key} = {name!r} is no token of the {FILE} beside it; copy both files from one release"
        )
    return index


def _checked(where: str, key: str, index: Any, vocab_size: int) -> int | None:
    if isinstance(index, list):  # a chat model that ends turns as well as documents
        raise UserError(
            f"{where}: {key} = {index} names several ids; say in a {CONFIG} beside it which token ends a document: "
            '{"eos_token": "..."}'
        )
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < vocab_size:
        raise UserError(f"{where}: {key} = {index!r} is no id below {vocab_size}; copy both files from one release")
    return index


def _object(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError(f"holds {type(content).__name__}, not an object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); copy it again") from None
    return content
