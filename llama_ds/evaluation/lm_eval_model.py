"""This project's models in lm-evaluation-harness (package lm-eval, the extra [eval]), for its log-likelihood tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError
from llama_ds.evaluation.one_process import open_scorer
from llama_ds.evaluation.requests import ScoringRequest
from llama_ds.evaluation.scoring import Backend, Scorer


class HarnessModel(LM):
    """A scorer as the harness wants it; under an engine every rank makes the same calls and gets all results."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.scorer = Scorer(backend, tokenizer)

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
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text; args: the text."""
        return self.scorer.rolling_log_likelihoods([request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refuse: only log-likelihoods are computed here."""
        raise UserError(
            "lm-eval: this task generates text, and only log-likelihoods are computed here; export the model with "
            "tools/convert.py --to hf, and use lm-eval's model hf"
        )
