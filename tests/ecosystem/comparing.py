"""Comparison of a library's ids, logits and greedy continuations with this project's (see make_models.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

MODELS = ("sentencepiece", "sentencepiece-prefix", "llama3")
TOLERANCE = 1e-3  # relative to the largest logit: two libraries sum in other orders


class Expected:
    """What this project computes with one of the models."""

    def __init__(self, folder: Path) -> None:
        found = json.loads((folder / "expected.json").read_text())
        self.folder, self.bos, self.eos = folder, found["bos"], found["eos"]
        self.prompts, self.prompt_ids = found["prompts"], found["prompt_ids"]
        self.texts, self.ids = found["texts"], found["ids"]
        self.greedy, self.rolling, self.continuation = found["greedy"], found["rolling"], found["continuation"]
        self.logits = np.load(folder / "logits.npy")

    def check_ids(self, where: str, encode: Callable[[str], Sequence[int]]) -> None:
        """Compare the ids of all texts."""
        wrong = [text for text, ids in zip(self.texts, self.ids, strict=True) if list(encode(text)) != ids]
        _check(where, "ids", not wrong, f"{len(wrong)} of {len(self.texts)} texts differ, as {wrong[:1]!r}")
        print(f"{where}: ids of {len(self.texts)} texts equal")

    def check_begin(self, where: str, encode: Callable[[str], Sequence[int]]) -> None:
        """Compare the ids of the prompts, which begin with bos."""
        for prompt, ids in zip(self.prompts, self.prompt_ids, strict=True):
            found = list(encode(prompt))
            _check(where, "ids of a prompt", found == ids, f"{prompt!r} is {found}, not {ids}")

    def check_logits(self, where: str, logits: np.ndarray) -> None:
        """Compare the logits (T, V) of the first prompt."""
        difference, largest = np.abs(logits - self.logits).max(), np.abs(self.logits).max()
        _check(where, "logits", difference <= TOLERANCE * largest, f"differ by {difference:.3g} of {largest:.3g}")
        print(f"{where}: logits differ by at most {difference:.2g} of {largest:.3g}")

    def check_texts(self, where: str, decode: Callable[[Sequence[int]], str]) -> None:
        """Compare the texts that ids are decoded to."""
        wrong = [text for text, ids in zip(self.texts, self.ids, strict=True) if decode(ids) != text]
        _check(where, "decoding", not wrong, f"{len(wrong)} of {len(self.texts)} texts differ, as {wrong[:1]!r}")

    def check_greedy(self, where: str, continuation: Callable[[str, int], Sequence[int]]) -> None:
        """Compare greedy continuations of every prompt; the function is given the prompt and a length."""
        for prompt, ids in zip(self.prompts, self.greedy, strict=True):
            found = list(continuation(prompt, len(ids)))
            _check(where, "greedy ids", found == ids, f"after {prompt!r}: {found} not {ids}")
        print(f"{where}: {len(self.greedy[0])} greedy tokens after each of {len(self.prompts)} prompts equal")


def _check(where: str, what: str, holds: bool, how: str) -> None:
    if not holds:
        raise SystemExit(f"{where}: {what}: {how}")
