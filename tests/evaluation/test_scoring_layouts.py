"""Scores and texts on the engines equal those of plain torch under every kind of layout; the training stays as it was.

Training in float8 does not show in them.

Tolerance: 1e-4 nats of a sum over at most 99 tokens in fp32, where layouts differ in the order of sums (measured: below
2e-5).
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_ds.evaluation.generation import ModelDecoder, TextGenerator
from tests import warm
from tests.evaluation.letters import TEXT, Letters, some_prompts, some_requests
from tests.evaluation.scoring_worker import compares_training
from tests.parallel.layout_cases import SEQ_LEN, Case, reference_model

V = {"schedule": "dualpipe_v", "virtual_stages": 2}
CASES = [
    Case(2, 2, 1, sequence_parallel=True, micro_batch=4, fp8="delayed"),
    Case(2, 1, 2, document_mask=True, **V),
    Case(2, 1, 2, micro_batch=2, schedule="deepspeed"),
    Case(2, 1, 1, micro_batch=4, document_mask=True, cp=2, cp_method="ring", kv_heads=2, schedule="zb_h1"),
    Case(1, 2, 1, zero=3, micro_batch=4, sequence_parallel=True, cp=2, cp_method="all_to_all", kv_heads=2, vocab=97),
    Case(1, 1, 1, micro_batch=4, document_mask=True, cp=4, cp_method="hierarchical", cp_all_to_all=2),
    Case(1, 1, 2, micro_batch=2, document_mask=True, zero=3, cp=2, cp_method="ring"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("scores")
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in CASES]))
    words = (folder / "cases.json", folder / "out.json")
    done = warm.run("-m", "tests.evaluation.scoring_worker", *words, ranks=4, timeout_s=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return dict(zip(CASES, json.loads((folder / "out.json").read_text()), strict=True))


def token_log_probs(case: Case, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the ids after the first, and whether each is the argmax."""
    model = reference_model(case)
    products = contextlib.nullcontext()
    if case.fp8 != "off":
        products = model.layers[1].context.products_of_the_run()  # type: ignore[union-attr,operator]
    with torch.no_grad(), products:
        found = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    wanted = torch.tensor(ids[1:])
    return found.gather(1, wanted[:, None])[:, 0], found.argmax(-1) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scores_equal_plain_torch(case: Case, outcomes: dict[Case, dict[str, Any]]) -> None:
    """Under cp, rows of a request of their own are also cut over its ranks; the short ones branch on each rank."""
    outcome, letters = outcomes[case], Letters()
    assert ("plain" in outcome) == (case.cp > 1)
    both = [*outcome["scores"], *outcome.get("plain", [])]
    requests = some_requests(20, SEQ_LEN)
    for request, score in zip(requests * (len(both) // len(requests)), both, strict=True):
        ids = [1, *letters.encode(request.context + request.continuation)][-SEQ_LEN - 1 :]
        # The space before a continuation belongs to it, wherever the request has it.
        scored = len(request.context) - len(request.context.rstrip()) + len(request.continuation)
        log_probs, greedy = token_log_probs(case.reference, ids)
        assert score["log_likelihood"] == pytest.approx(log_probs[-scored:].sum().item(), abs=1e-4), request
        assert score["greedy"] == bool(greedy[-scored:].all()), request
    text = letters.encode(TEXT)
    first = token_log_probs(case.reference, [1, *text[:SEQ_LEN]])[0].sum()
    rest = sum(
        token_log_probs(case.reference, text[end - SEQ_LEN - 1 : end])[0][-new:].sum()
        for end, new in ((64, 32), (96, 32), (len(text), len(text) - 96))
    )
    assert outcome["rolling"][0] == pytest.approx(float(first + rest), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_texts_equal_those_of_one_process(case: Case, outcomes: dict[Case, dict[str, Any]]) -> None:
    """Greedy ones also equal the argmax of plain torch without a cache; drawn ones differ from them."""
    found = outcomes[case]["generated"]
    if case.schedule == "deepspeed":
        assert found == (
            "parallel.schedule = deepspeed: DeepSpeed's own pipeline cannot generate text; use another schedule"
        )
        return
    model = reference_model(case.reference).eval()
    wanted = TextGenerator(ModelDecoder(model, 4), Letters()).generate(some_prompts())  # type: ignore[arg-type]
    assert [tuple(ids) for ids in found] == [one.ids for one in wanted]
    greedy, drawn = found[: len(found) // 2], found[len(found) // 2 :]
    assert all(one != other for one, other in zip(greedy, drawn, strict=True))
    for prompt, new in zip(some_prompts(), greedy, strict=False):
        ids = [1, *Letters().encode(prompt.context)][-(SEQ_LEN - prompt.max_tokens) :]
        assert token_log_probs(case.reference, [*ids, *new])[1][-len(new) :].all(), prompt


@pytest.mark.slow
def test_an_engine_that_evaluates_only_holds_its_weights(outcomes: dict[Case, dict[str, Any]]) -> None:
    """Neither masters nor gradients on any rank; a quarter of the weights of a tiny model are tables and buffers."""
    for training, evaluating in outcomes[CASES[0]]["extra bytes"]:
        assert training > 0.9 and evaluating < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if compares_training(case)], ids=lambda case: case.name)
def test_training_goes_on_bit_for_bit(case: Case, outcomes: dict[Case, dict[str, Any]]) -> None:
    assert outcomes[case]["with"] == outcomes[case]["without"]
