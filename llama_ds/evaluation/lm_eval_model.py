"""This project's models in lm-evaluation-harness (package lm-eval, the extra [eval])."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.model import LM

from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError, listed
from llama_ds.evaluation.generation import GenerationRequest, cut_at
from llama_ds.evaluation.one_process import open_scorer
from llama_ds.evaluation.requests import TRUNCATED, ScoringRequest
from llama_ds.evaluation.scoring import Backend, Scorer
from llama_ds.log import logger
from llama_ds.model.decoding_rule import GREEDY, DecodingRule

MAX_TOKENS = 256  # length of a continuation without max_gen_toks, as in the harness
SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class HarnessModel(LM):
    """A scorer as the harness wants it; under an engine every rank makes the same calls and gets all results."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.scorer = Scorer(backend, tokenizer)
        self.seed = 0  # seed of the draws of sampled continuations

    @classmethod
    def from_folder(cls, path: str, dtype: str | None = None, rows: int = 8) -> HarnessModel:
        """Return the model of a run, a checkpoint or a folder of another format, in this process.

        Args:
            path: what `open_model` accepts.
            dtype: dtype of weights and computation; None: that of training.
            rows: rows of a forward pass.
        """
        scorer = open_scorer(path, dtype, rows)
        return cls(scorer.backend, scorer.tokenizer)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is greedy; args: context, continuation."""
        scores = self.scorer.log_likelihoods([ScoringRequest(*request.args) for request in requests])
        _say_truncated([score.truncated for score in scores])
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text; args: the text."""
        return self.scorer.rolling_log_likelihoods([request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context up to its stop strings; args: context, settings of the harness.

        Equal requests, as a task with `repeats` makes them, are samples that are drawn independently.

        As in the harness the text is that of the new ids alone, of which some tokenizers drop the first space.

        Raises:
            UserError: a setting is unknown.
        """
        tokenizer = self.scorer.tokenizer
        wanted, seen = [], Counter[GenerationRequest]()
        for asked in (self.wanted(*request.args) for request in requests):
            wanted.append(replace(asked, sample=seen[asked]))
            seen[asked] += 1
        found = self.scorer.generator.generate(wanted)
        _say_truncated([one.truncated for one in found])
        return [cut_at(tokenizer.decode(one.ids), asked.until) for asked, one in zip(wanted, found, strict=True)]

    def wanted(self, context: str, settings: Mapping[str, Any]) -> GenerationRequest:
        """Return what a request of the harness asks for.

        Raises:
            UserError: a setting is unknown.
        """
        if unknown := sorted(settings.keys() - SETTINGS):
            raise UserError(f"lm-eval: generation_kwargs: {unknown[0]}: unknown; there are {listed(sorted(SETTINGS))}")
        until = settings.get("until") or ()
        temperature = float(settings.get("temperature") or 0.0)
        if settings.get("do_sample", temperature > 0):
            rule = DecodingRule(temperature or 1.0, settings.get("top_p") or 1.0, settings.get("top_k") or 0, self.seed)
        else:
            rule = GREEDY
        return GenerationRequest(
            context,
            (until,) if isinstance(until, str) else tuple(stop for stop in until if stop),
            int(settings.get("max_gen_toks") or MAX_TOKENS),
            rule,
        )


def _say_truncated(truncated: Sequence[bool]) -> None:
    if any(truncated):
        logger.warning("evaluation: %d of %d requests %s", sum(truncated), len(truncated), TRUNCATED)
