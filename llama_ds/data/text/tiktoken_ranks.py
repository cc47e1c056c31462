"""Llama 3's tokenizer.model: one line "BASE64 RANK" for each token, encoded by tiktoken.

The pattern and the special tokens are constants of meta-llama/llama3, llama/tokenizer.py, which encodes a text as
`encode` does. (It also splits texts at every 400,000 characters, because earlier releases of tiktoken failed there.)
tiktoken's own loader is not used: it caches files by their path, and so returns an older file of the same path.
"""

from __future__ import annotations

import base64
import re
from binascii import a2b_base64
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import tiktoken

from llama_ds.data.text.cuts import PAIRS, PairCuts
from llama_ds.errors import UserError

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SPECIAL_TOKENS = (
    *(BOS, EOS, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|step_id|>", "<|eom_id|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(245)),
    "<|python_tag|>",
)
LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
BASE64 = re.compile(rb"[A-Za-z0-9+/=]+")
CUTS = PairCuts(re.compile("|".join(PAIRS)))  # PATTERN ends a match there, whatever stands around it
# Vocabularies in the same format whose patterns or special tokens differ, by their number of ranks.
OTHERS = {
    50256: "GPT-2",
    50280: "p50k_base",
    100256: "cl100k_base",
    151643: "Qwen",
    199998: "o200k_base",
    200000: "Llama 4",
}


def is_tiktoken(content: bytes) -> bool:
    """Return whether a file looks like tiktoken's."""
    return LINE.match(content) is not None


class TiktokenRanks:
    """Llama 3's tokenizer. Names of special tokens in a text are text."""

    KIND = "tiktoken"
    cuts = CUTS

    def __init__(self, path: str, content: bytes) -> None:
        """Parse the ranks.

        Raises:
            UserError: the file is damaged, or belongs to another model.
        """
        self.path = path
        self.ranks: Mapping[bytes, int] = _parse(path, content)
        if name := OTHERS.get(len(self.ranks)):
            raise UserError(
                f"{path}: {len(self.ranks)} ranks are {name}'s; of tiktoken's files only Llama 3's is supported, whose "
                "special tokens are known: name the model's tokenizer.json instead"
            )
        self._special = {name: len(self.ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = len(self.ranks) + len(self._special)
        self.bos_id: int | None = self._special[BOS]
        self.eos_id: int | None = self._special[EOS]

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        """The encoder: made when it is first needed, because processes that only name the tokenizer never need it."""
        return tiktoken.Encoding(
            "llama3", pat_str=PATTERN, mergeable_ranks=dict(self.ranks), special_tokens=self._special
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of `encode` without creating a Python object for each."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:  # the pattern's engine gives up on a million spaces in a row; not a Unicode error
            if isinstance(error, UnicodeError):
                raise
            raise UserError(
                f"{self.path}: tiktoken cannot encode a text of {len(text)} characters ({error}); shorten its longest "
                "run of white space"
            ) from None

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return self._encoding.decode([i for i in ids if i < len(self.ranks)])


def _parse(path: str, content: bytes) -> dict[bytes, int]:
    words = content.split()
    tokens, numbers = words[::2], words[1::2]
    try:
        if len(tokens) != len(numbers) or not BASE64.fullmatch(b"".join(tokens)):
            raise ValueError
        ranks = dict(zip(map(a2b_base64, tokens), map(int, numbers), strict=True))
    except ValueError:
        raise UserError(
            f'{path}: line {_bad_line(content)} is not "BASE64 RANK"; the file is damaged, copy it again'
        ) from None
    count = len(tokens)
    if sorted(ranks.values()) != list(range(count)):
        raise UserError(f"{path}: its {count} ranks are not 0 to {count - 1}; the file is damaged, copy it again")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{path}: has no rank for the byte 0x{missing[0]:02x}; the file is damaged, copy it again")
    return ranks


def _bad_line(content: bytes) -> int:
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            base64.b64decode(token, validate=True)
            int(rank)
        except ValueError:
            return number
    return 0
