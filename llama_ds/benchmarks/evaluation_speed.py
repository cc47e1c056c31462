"""Scoring and generation of an exported model beside its own forward-only pass, lm-eval and transformers."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from llama_ds.benchmarks.generation import load_exported
from llama_ds.benchmarks.step import Step, time_interleaved
from llama_ds.errors import UserError
from llama_ds.evaluation.generation import GenerationRequest
from llama_ds.evaluation.miniature import WORDS
from llama_ds.evaluation.requests import ScoringRequest, encode, prefix
from llama_ds.evaluation.scoring import Scorer
from llama_ds.layout.flops import parameter_count
from llama_ds.machine import cpu_name
from llama_ds.parallel import world
from llama_ds.training.device_batches import MicroBatch
from llama_ds.training.engines.scoring import EngineBackend
from llama_ds.training.evaluation_job import EvaluationJob, EvaluationSettings

CHOICES = 4  # completions of a context
CONTEXT_WORDS, CHOICE_WORDS = 40, 8
TOLERANCE = 1e-3  # nats of a request: ours beside lm-eval's, in fp32


@dataclass(frozen=True)
class SpeedSettings:
    """How evaluation is measured, in fp32."""

    requests: int = 1000
    rows: int = 8  # rows of a forward pass, ours and theirs
    prompt_words: int = 120
    new_tokens: int = 64
    batches: Sequence[int] = (1, 16)  # prompts that are continued together
    threads: int = 1
    repeats: int = 5
    # Requests with shared contexts, requests that share nothing, texts.
    only: Sequence[str] = ("choices", "separate", "generation")


def measure(folder: str, settings: SpeedSettings) -> dict[str, Any]:
    """Time all of it on the export in `folder`, in this process.

    Raises:
        UserError: the folder is no export with a tokenizer, its rows are too short, or results differ.
    """
    torch.set_num_threads(settings.threads)
    with world.failing_together():
        rank_info = world.find_rank_info()
        world.join(rank_info)
        scorer = EvaluationJob(EvaluationSettings("fp32", settings.rows), rank_info).scorer(folder)
        backend = scorer.backend
        assert isinstance(backend, EngineBackend)
        scoring = {
            name: _scoring(folder, scorer, backend, requests, settings)
            for name, requests in requests_of(settings.requests).items()
            if name in settings.only
        }
        batches = settings.batches if "generation" in settings.only else ()
        generation = {str(batch): _generation(folder, scorer, batch, settings) for batch in batches}
    packages = ["torch", "transformers", *(["lm-eval"] if _has_lm_eval() else [])]
    return {
        "parameters": parameter_count(backend.run.model),
        "seq_len": backend.run.data.seq_len,
        **asdict(settings),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), **{name: version(name) for name in packages}},
        "scoring": scoring,
        "generation": generation,
    }


def requests_of(count: int) -> dict[str, list[ScoringRequest]]:
    """Return requests as of questions with choices, and as many that share nothing."""
    rng = random.Random(1)

    def words(number: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(number))

    contexts = [words(CONTEXT_WORDS) for _ in range(count)]
    return {
        "choices": [
            ScoringRequest(context, f" {words(CHOICE_WORDS)}")
            for context in contexts[: -(-count // CHOICES)]
            for _ in range(CHOICES)
        ][:count],
        "separate": [ScoringRequest(context, f" {words(CHOICE_WORDS)}") for context in contexts],
    }


def _scoring(
    folder: str, scorer: Scorer, backend: EngineBackend, requests: Sequence[ScoringRequest], settings: SpeedSettings
) -> dict[str, Any]:
    """Time scores of requests, the bare pass over as many tokens in full rows, and lm-eval's scores."""
    seq_len, rows = backend.run.data.seq_len, settings.rows
    tokens = sum(len(encode(scorer.tokenizer, one, seq_len).ids) - 1 for one in requests)
    batch = np.random.default_rng(0).integers(3, backend.run.model.vocab_size, (rows, seq_len + 1))
    count = max(1, tokens // (rows * seq_len))
    found: dict[str, list[float]] = {}

    def score() -> float:
        found["llama_ds"] = [one.log_likelihood for one in scorer.log_likelihoods(requests)]
        return sum(found["llama_ds"])

    def forward() -> float:
        return backend.engine.evaluate(iter([MicroBatch(batch, 1.0)] * count), count)

    steps: dict[str, Step] = {"llama_ds": score, "forward": forward}
    done = {"llama_ds": tokens, "forward": count * rows * seq_len}
    if _has_lm_eval():
        theirs = _lm_eval(folder, requests, rows)

        def harness() -> float:
            found["lm_eval"] = theirs()
            return sum(found["lm_eval"])

        steps["lm_eval"], done["lm_eval"] = harness, tokens
    scorer.log_likelihoods(requests[:rows])  # a whole turn of warm-up would take as long as one that counts
    backend.engine.evaluate(iter([MicroBatch(batch, 1.0)]), 1)
    timings = time_interleaved(steps, settings.repeats, warmup=0)
    if "lm_eval" in found:
        largest = max(abs(a - b) for a, b in zip(found["llama_ds"], found["lm_eval"], strict=True))
        if largest > TOLERANCE:
            raise UserError(f"{folder}: lm-eval's log-likelihoods differ by {largest:.3g} nats; its times mean nothing")
    return {"tokens": tokens, **_rates({name: (done[name], timing.seconds) for name, timing in timings.items()})}


def _generation(folder: str, scorer: Scorer, batch: int, settings: SpeedSettings) -> dict[str, Any]:
    """Time greedy continuations of a batch of prompts, ours and transformers'."""
    tokenizer, rng = scorer.tokenizer, random.Random(2)
    marks, new = tokenizer.marks, settings.new_tokens
    words = [rng.choice(WORDS) for _ in range(settings.prompt_words - 1)]
    # The same words in other orders behind one that has no space before it: prompts of one length.
    texts = [" ".join(["The", *rng.sample(words, len(words))]) for _ in range(batch)]
    prompts = [[*prefix(tokenizer), *tokenizer.encode(text)] for text in texts]
    length = max(map(len, prompts))
    if min(map(len, prompts)) < length or length + new > scorer.generator.decoder.positions:
        raise UserError(
            f"{folder}: prompts of {length} tokens and {new} new ones do not fit its rows of "
            f"{scorer.generator.decoder.positions}; lower --prompt-words or --new-tokens"
        )
    model = load_exported(folder, torch.float32).eval()
    ends = [marks.eos] if marks.begin is None else [marks.begin, marks.eos]
    context = torch.tensor(prompts)
    found: dict[str, list[list[int]]] = {}

    def ours() -> float:
        requests = [GenerationRequest(text, max_tokens=new) for text in texts]
        found["llama_ds"] = [list(one.ids) for one in scorer.generator.generate(requests)]
        return 0.0

    @torch.no_grad()
    def theirs() -> float:
        written = model.generate(
            input_ids=context, attention_mask=torch.ones_like(context), do_sample=False, max_new_tokens=new,
            eos_token_id=ends, pad_token_id=marks.eos,
        )  # fmt: skip
        found["transformers"] = [_until(row, ends) for row in written[:, context.shape[1] :].tolist()]
        return 0.0

    timings = time_interleaved({"llama_ds": ours, "transformers": theirs}, settings.repeats, warmup=1)
    if found["llama_ds"] != found["transformers"]:
        raise UserError(f"{folder}: transformers writes other texts; its times mean nothing")
    tokens = sum(map(len, found["llama_ds"]))
    return {"tokens": tokens, **_rates({name: (tokens, timing.seconds) for name, timing in timings.items()})}


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Return the ids up to the first that ends a text: behind it the library fills the batch."""
    at = next((i for i, one in enumerate(ids) if one in ends), len(ids) - 1)
    return ids[: at + 1]


def _rates(times: dict[str, tuple[int, list[float]]]) -> dict[str, Any]:
    """Return median seconds and tokens/s, and how fast ours is beside each of the others, as the median of pairs."""
    ours_tokens, ours = times["llama_ds"]
    found = {
        name: {
            "median_s": float(np.median(seconds)),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "tokens_per_s": tokens / float(np.median(seconds)),
        }
        for name, (tokens, seconds) in times.items()
    }
    ratios = {
        name: float(np.median([ours_tokens / a / (tokens / b) for a, b in zip(ours, seconds, strict=True)]))
        for name, (tokens, seconds) in times.items()
        if name != "llama_ds"
    }
    return {"contestants": found, "speed_over": ratios}


def _has_lm_eval() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def _lm_eval(folder: str, requests: Sequence[ScoringRequest], rows: int) -> Callable[[], list[float]]:
    """Return what scores the requests with lm-eval's model hf."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=rows)
    instances = [Instance("loglikelihood", {}, (one.context, one.continuation), 0) for one in requests]
    return lambda: [float(value) for value, _ in model.loglikelihood(instances, disable_tqdm=True)]


def table(results: dict[str, Any]) -> str:
    """Return the results as text."""
    lines = [
        f"{results['parameters'] / 1e6:.1f} M parameters, rows of {results['seq_len']} tokens, {results['rows']} rows, "
        f"fp32, {results['threads']} threads, medians of {results['repeats']}"
    ]
    kinds = [(f"scoring, {results['requests']} requests, {name}", one) for name, one in results["scoring"].items()]
    kinds += [(f"generation, batch {batch}", one) for batch, one in results["generation"].items()]
    for name, found in kinds:
        lines.append(f"{name}: {found['tokens']:,} tokens")
        for contestant, one in found["contestants"].items():
            ratio = found["speed_over"].get(contestant)
            beside = f"   llama_ds is {ratio:.2f} x as fast" if ratio else ""
            lines.append(f"  {contestant:14} {one['median_s']:8.3f} s {one['tokens_per_s']:10,.0f} tokens/s{beside}")
    return "\n".join(lines)
