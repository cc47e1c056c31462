"""Validation losses in bits per byte, which are comparable between tokenizers, and their sum over sources."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llama_ds.benchmarks.evaluation import validation_loss
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.evaluation.validation import ValidationRows, text_bytes
from llama_ds.model.loss import IGNORED
from tests.tokenizer_files import ODD, write_llama3

TEXTS = ("It was", ODD, "漢字仮名。" * 5, " 한국어 العربية ", "x")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_llama3(tmp_path_factory.mktemp("tokenizer"))[0])


def packed(tokenizer: Tokenizer, seq_len: int) -> np.ndarray:
    """Return the texts as marked rows, of which each begins with the last id of the one before."""
    marks = tokenizer.marks
    ids = [i for text in TEXTS for i in (marks.begin, *tokenizer.encode(text), marks.eos)]
    ids += [~marks.eos] * (-(len(ids) - 1) % seq_len)
    return np.array([ids[start : start + seq_len + 1] for start in range(0, len(ids) - 1, seq_len)], np.int64)


@pytest.mark.parametrize("seq_len", [1, 3, 64])
def test_bytes_are_those_of_the_documents(tokenizer: Tokenizer, seq_len: int) -> None:
    """A character of three bytes in three rows counts once; marks and filler have no bytes."""
    assert text_bytes(packed(tokenizer, seq_len), tokenizer) == sum(len(text.encode()) for text in TEXTS)


def test_losses_add_up_by_their_labels_and_bytes(tokenizer: Tokenizer) -> None:
    """A model that needs one bit for every label: bits per byte is labels / bytes, in all as in each source."""
    rows = packed(tokenizer, 16)

    def one_bit(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert (labels != IGNORED).any()
        return torch.tensor(math.log(2), dtype=torch.float64)

    labels = int((rows[:, 1:] >= 0).sum())
    parts = [ValidationRows("a", rows[:2], 10), ValidationRows("b", rows[2:], 90)]
    first, rest = (validation_loss(one_bit, part, 3, torch.device("cpu"), lambda rows: None) for part in parts)
    assert first.values["bits_per_byte"] == pytest.approx(32 / 10)
    total = (first + rest).values
    assert total["bits_per_byte"] == pytest.approx(labels / 100)
    assert (total["rows"], total["loss"]) == (len(rows), pytest.approx(math.log(2)))
