"""One process: log-likelihoods equal those of transformers, request by request, padded and packed.

Tolerance: 1e-4 nats of a sum over at most 64 tokens in fp32 (measured: below 2e-5).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoint"))

from hf_models import saved_llama
from transformers import LlamaForCausalLM

from llama_ds.checkpoint.load_model import load_model
from llama_ds.config.document_marks import DocumentMarks
from llama_ds.errors import UserError
from llama_ds.evaluation.branching import branched
from llama_ds.evaluation.packing import packed, padded, row_lengths
from llama_ds.evaluation.requests import Encoded, ScoringRequest, encode, rolling
from llama_ds.evaluation.scoring import ModelBackend, Scorer, why_unbranched
from tests.evaluation.letters import TEXT, Letters, some_requests

SEQ_LEN = 64
MARKS = DocumentMarks(1, 2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    shape = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 4}
    return saved_llama(tmp_path_factory.mktemp("hf"), **shape)


def scorer(exported: LlamaForCausalLM, document_mask: bool = False, micro_batch: int = 3) -> Scorer:
    model = load_model(exported.name_or_path, document_mask=document_mask)
    return Scorer(ModelBackend(model, micro_batch), Letters())  # type: ignore[arg-type]


def by_transformers(exported: LlamaForCausalLM, request: Encoded) -> tuple[float, bool]:
    ids = torch.tensor([request.ids])
    with torch.no_grad():
        found = exported(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)[-request.scored :]
    wanted = ids[0, -request.scored :]
    return found.gather(1, wanted[:, None]).sum().item(), bool((found.argmax(-1) == wanted).all())


@pytest.mark.parametrize("document_mask", [False, True], ids=["padded", "packed"])
def test_log_likelihoods_equal_transformers(exported: LlamaForCausalLM, document_mask: bool) -> None:
    """Packed behind each other, requests still see nothing of those before them."""
    requests = some_requests(30, SEQ_LEN)
    ours = scorer(exported, document_mask)
    assert (ours.log_likelihoods([]), ours.rolling_log_likelihoods([""])) == ([], [0.0])
    scores = ours.log_likelihoods(requests)
    for request, score in zip(requests, scores, strict=True):
        wanted, greedy = by_transformers(exported, encode(Letters(), request, SEQ_LEN))  # type: ignore[arg-type]
        assert score.log_likelihood == pytest.approx(wanted, abs=1e-4), request
        assert score.greedy == greedy, request


def test_texts_share_no_eos_that_a_masked_row_hides(exported: LlamaForCausalLM) -> None:
    """Without a bos of the tokenizer's own, eos ends a document, and document masks hide it from the text after it."""
    model = load_model(exported.name_or_path, document_mask=True)
    for marks, shared in ((MARKS, True), (DocumentMarks(None, 2), False)):
        model.context = replace(model.context, marks=marks)
        assert bool(ModelBackend(model, 3).shape.unbranched) is not shared
    assert not why_unbranched(replace(model.context, document_mask=False))


def test_a_greedy_continuation_is_found(exported: LlamaForCausalLM) -> None:
    """Of what the model itself would say every token is the argmax; another last token is not."""
    ids = exported.generate(
        torch.tensor([[1, 5]]), do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=2, eos_token_id=None
    )[0].tolist()
    other = [*ids[:-1], (ids[-1] + 1) % 96]
    scores = scorer(exported).scores([Encoded(tuple(ids), 4), Encoded(tuple(other), 4)])
    assert [score.greedy for score in scores] == [True, False]


def test_truncation_drops_the_left_of_the_context(exported: LlamaForCausalLM) -> None:
    """As lm-eval does, and it is counted; a continuation that itself is longer than a row is refused."""
    ours, long = scorer(exported), ScoringRequest(TEXT, " and then")
    (score,) = ours.log_likelihoods([long])
    ids = [1, *Letters().encode(long.context + long.continuation)][-SEQ_LEN - 1 :]
    assert score.log_likelihood == pytest.approx(by_transformers(exported, Encoded(tuple(ids), 9))[0], abs=1e-4)
    assert score.truncated and not ours.log_likelihoods([ScoringRequest("x", "y")])[0].truncated
    with pytest.raises(UserError, match="continuation of 100 tokens is longer than a row of 64"):
        ours.log_likelihoods([ScoringRequest("", "x" * 100)])


def test_rolling_windows_predict_each_token_once() -> None:
    """Windows as in lm-eval: full ones in a row, and the last one filled up with context."""
    text = "abcdefghij"
    windows = rolling(Letters(), text, 4)  # type: ignore[arg-type]
    a = Letters().encode(text)
    assert windows == [
        Encoded((1, *a[:4]), 4),
        Encoded(tuple(a[3:8]), 4),
        Encoded(tuple(a[5:10]), 2),
    ]


class Pairs(Letters):
    """Merges "ab" to id 95."""

    def encode(self, text: str) -> list[int]:
        first, *others = (super(Pairs, self).encode(part) for part in text.split("ab"))
        return first + [i for part in others for i in (95, *part)]


def test_white_space_and_merges_at_the_boundary_are_as_in_lm_eval() -> None:
    """A space after the context is predicted. If a token crosses the boundary, the context keeps its own ids, and the
    continuation is what the whole has after as many."""
    x, a, c, space = (Letters().encode(character)[0] for character in "xac ")
    assert encode(Pairs(), ScoringRequest("x ", "c"), SEQ_LEN) == Encoded((1, x, space, c), 2)  # type: ignore[arg-type]
    assert encode(Pairs(), ScoringRequest("xa", "bc"), SEQ_LEN) == Encoded((1, x, a, c), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "bos", "rule"),
    [(ScoringRequest("a", ""), 1, "adds no token"), (ScoringRequest("a", "b"), None, "names no bos")],
    ids=["empty continuation", "no bos"],
)
def test_impossible_requests_are_refused(request_: ScoringRequest, bos: int | None, rule: str) -> None:
    tokenizer = Letters()
    tokenizer.bos_id = bos
    with pytest.raises(UserError, match=rule):
        encode(tokenizer, request_, SEQ_LEN)  # type: ignore[arg-type]


def test_rows_are_short_or_full() -> None:
    """Padding takes the shortest row that holds a request; packing fills rows, where each request begins a document."""
    requests = [Encoded((1, *range(10, 10 + n)), 2) for n in (3, 60, 15, 16, 17)]
    rows = padded(requests, row_lengths(64), 2)
    assert {tokens: [slot.request for row in some for slot in row.slots] for tokens, some in rows.items()} == {
        64: [1],
        32: [4],
        16: [3, 2, 0],
    }
    (full, *more) = packed(requests, 64, MARKS)[64]
    assert [slot.request for slot in full.slots] == [1, 0]
    assert [slot.request for slot in more[0].slots] == [4, 3, 2]
    assert full.ids.tolist() == [~1, *(~i for i in range(10, 68)), 68, 69, ~1, ~10, 11, 12]
    cut = [Encoded(tuple(range(10, 15)), 2), Encoded(tuple(range(10, 14)), 2)]
    assert len(packed(cut, 64, MARKS)[64]) == 2, "without bos, the second would see the first"


def test_a_common_prefix_is_in_a_row_once() -> None:
    """Two questions behind one example: each choice begins with the id that predicts it, and no label is there twice.
    A row that is full ends where the next one shares least."""
    example, first, second = (1, *range(10, 20)), (20, 21), (30, 31)
    choices = [
        Encoded((*example, *first, 40, 41), 2),
        Encoded((*example, *first, 40, 50), 2),
        Encoded((*example, *second, 60), 1),
        Encoded((*example, *second), 2),
    ]
    (row,) = branched(choices, [16, 32], 2)[32]
    assert sorted(slot.request for slot in row.slots) == [0, 1, 2, 3]
    assert [len(columns) for columns in row.texts] == [len(choices[slot.request].ids) for slot in row.slots]
    assert (row.ids == ~1).sum() == 1, "the example is there once"
    for slot, columns in zip(row.slots, row.texts, strict=True):
        ids, labels = row.ids[columns], row.ids[slot.start + 1 : slot.stop + 1]
        assert tuple(np.where(ids < 0, ~ids, ids)) == choices[slot.request].ids
        assert tuple(labels) == choices[slot.request].ids[-choices[slot.request].scored :]
    assert [[slot.request for slot in row.slots] for row in branched(choices, [18], 2)[18]] == [[0, 1], [3, 2]]


def test_row_lengths_divide_by_sequence_parallel_ranks() -> None:
    assert row_lengths(96, 8) == [24, 48, 96]
    assert row_lengths(50) == [25, 50]
    assert row_lengths(50, few=False) == [16, 32, 48, 50]
