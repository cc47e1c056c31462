"""Generation with a cache in one process: the ids of transformers' generate, alone and in batches of many lengths."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoint"))

from hf_models import saved_llama
from transformers import LlamaForCausalLM

from llama_ds.checkpoint.load_model import load_model
from llama_ds.evaluation.generation import GenerationRequest, ModelDecoder, TextGenerator, cut_at
from llama_ds.layout.cache_memory import cache_bytes
from llama_ds.model.decoding_rule import DecodingRule
from llama_ds.model.key_value_cache import KeyValueCache
from llama_ds.model.next_token import Draw, kept_probabilities
from tests.evaluation.letters import TEXT, Letters

POSITIONS, NEW = 64, 20
PROMPTS = [TEXT[:n] for n in (1, 2, 7, 16, 17, 31, 40, 43)]  # the longest fills all positions, with bos and NEW


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    shape = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2}
    return saved_llama(tmp_path_factory.mktemp("hf"), **shape)


def generator(exported: LlamaForCausalLM, rows: int = 8, document_mask: bool = False) -> TextGenerator:
    model = load_model(exported.name_or_path, document_mask=document_mask)
    return TextGenerator(ModelDecoder(model.eval(), rows), Letters())  # type: ignore[arg-type]


def by_transformers(exported: LlamaForCausalLM, text: str, new: int = NEW) -> list[int]:
    """Return greedy ids up to the first of bos and eos."""
    ids = torch.tensor([[1, *Letters().encode(text)]])
    found = exported.generate(ids, do_sample=False, max_new_tokens=new, eos_token_id=[1, 2], pad_token_id=0)
    return found[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_greedy_ids_equal_transformers(exported: LlamaForCausalLM, rows: int) -> None:
    """Also behind the mark of a document in the prompt, and with rows that end early and leave their batch."""
    requests = [GenerationRequest(text, max_tokens=NEW) for text in PROMPTS]
    requests += [GenerationRequest(TEXT[:20], max_tokens=n) for n in (1, 2)]
    found = generator(exported, rows, document_mask=rows == 3).generate(requests)
    for request, one in zip(requests, found, strict=True):
        assert list(one.ids) == by_transformers(exported, request.context, request.max_tokens), request


def test_stop_strings_end_a_text(exported: LlamaForCausalLM) -> None:
    """The text ends before the first of them, the ids with the token that completes it."""
    ours = generator(exported)
    (free,) = ours.generate([GenerationRequest(TEXT[:30], max_tokens=NEW)])
    assert len(free.text) > 8
    stop = free.text[4:6]
    (cut,) = ours.generate([GenerationRequest(TEXT[:30], ("~~", stop), NEW)])
    at = free.text.index(stop)
    assert (cut.text, cut.ids) == (free.text[:at], free.ids[: at + 2])
    assert cut_at("a, b. c", (". ", ",")) == "a"


def test_draws_depend_on_their_request_only(exported: LlamaForCausalLM) -> None:
    """Samples differ; each is the same alone, in another batch and behind other requests. One seed, one text."""
    rule = DecodingRule(temperature=1.0, top_p=0.9, top_k=30, seed=5)
    wanted = [GenerationRequest(TEXT[:12], max_tokens=NEW, rule=rule, sample=n) for n in range(4)]
    together = generator(exported).generate(wanted)
    assert len({one.ids for one in together}) == 4
    others = [GenerationRequest(text, max_tokens=NEW, rule=rule) for text in PROMPTS]
    mixed = generator(exported, rows=3).generate([*others, GenerationRequest(TEXT[:9], max_tokens=NEW), *wanted])
    assert mixed[-4:] == together
    seeded = DecodingRule(temperature=1.0, top_p=0.9, top_k=30, seed=6)
    (other,) = generator(exported).generate([GenerationRequest(TEXT[:12], max_tokens=NEW, rule=seeded)])
    assert other.ids != together[0].ids


def test_draws_have_the_probabilities_of_the_rule() -> None:
    """top_k keeps the most likely, top_p the fewest that reach it, as transformers; frequencies within 4 sigma."""
    logits = np.log([0.4, 0.1, 0.3, 0.15, 0.05])
    kept = kept_probabilities(logits, DecodingRule(1.0, top_k=4, top_p=0.75))
    assert kept / kept.sum() == pytest.approx(np.array([0.4, 0, 0.3, 0.15, 0]) / 0.85)
    cold = kept_probabilities(logits, DecodingRule(0.5))
    assert cold / cold.sum() == pytest.approx(np.exp(2 * logits) / np.exp(2 * logits).sum())
    draw, count = Draw(DecodingRule(1.0, seed=3), (1, 5), 0), 2000
    shares = np.bincount([draw.choose(logits, step) for step in range(count)], minlength=5) / count
    assert np.all(np.abs(shares - np.exp(logits)) < 4 * np.sqrt(0.25 / count))


def test_long_contexts_lose_their_left(exported: LlamaForCausalLM) -> None:
    """A context gives way to the continuation, down to half of the positions; it is counted."""
    ours = generator(exported)
    long = [GenerationRequest(TEXT, max_tokens=NEW), GenerationRequest(TEXT, max_tokens=1000)]
    found = ours.generate(long)
    ids = [1, *Letters().encode(TEXT)]
    for one, new in zip(found, (NEW, POSITIONS // 2), strict=True):
        kept = torch.tensor([ids[-(POSITIONS - new) :]])
        wanted = exported.generate(kept, do_sample=False, max_new_tokens=new, eos_token_id=[1, 2], pad_token_id=0)
        assert list(one.ids) == wanted[0, kept.shape[1] :].tolist()
    assert [one.truncated for one in found] == [True, True]


def test_memory_of_the_cache_is_what_is_said(exported: LlamaForCausalLM) -> None:
    model = load_model(exported.name_or_path)
    cache = KeyValueCache(3, 40)
    cache.begin(5, model.context.rotary, torch.device("cpu"), torch.float32)
    with torch.no_grad(), model.context.caches.using(cache):
        model(torch.ones(3, 5, dtype=torch.long), None, torch.zeros(3, dtype=torch.long))
    assert cache.nbytes == cache_bytes(model.context.model, 2, 3, 40, tp=1, element_bytes=4)


def test_rows_keep_their_caches_when_others_leave() -> None:
    """`keep` moves keys, values and lengths together."""
    cache, layer = KeyValueCache(3, 4), torch.nn.Identity()
    keys = torch.randn(3, 1, 4, 2)
    cache._layers[layer] = keys, -keys
    cache.lengths = [1, 2, 3]
    cache.keep([2, 0])
    assert cache.lengths == [3, 1]
    assert torch.equal(cache._layers[layer][0], keys[[2, 0]]) and torch.equal(cache._layers[layer][1], -keys[[2, 0]])


def test_random_prompts_in_one_batch(exported: LlamaForCausalLM) -> None:
    rng = random.Random(4)
    texts = [TEXT[(start := rng.randrange(40)) : start + rng.randrange(1, 40)] for _ in range(12)]
    found = generator(exported, rows=12).generate([GenerationRequest(text, max_tokens=NEW) for text in texts])
    assert [list(one.ids) for one in found] == [by_transformers(exported, text) for text in texts]
