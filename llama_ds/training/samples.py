"""Continuations of a run's prompts along training, on the running engine; the run goes on unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

from llama_ds.config.schema import RunConfig
from llama_ds.config.section_rules import STOCK_ENGINE
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError, shortened
from llama_ds.evaluation.generation import GenerationRequest, TextGenerator
from llama_ds.evaluation.requests import prefix
from llama_ds.job.heartbeat import Progress
from llama_ds.job.wire import Phase
from llama_ds.layout.layout import Layout
from llama_ds.model.next_token import DecodingRule
from llama_ds.training.engines.generating import EngineDecoder
from llama_ds.training.engines.interface import Engine


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation."""

    prompt: str
    text: str


class TrainingSamples:
    """The prompts of `evaluation.sample_prompts`."""

    def __init__(self, run: RunConfig, layout: Layout, tokenizer: Tokenizer) -> None:
        """Check the prompts.

        Raises:
            UserError: the engine cannot generate text, the tokenizer has no bos, or a prompt is too long for a row.
        """
        self._run, self._layout, self._tokenizer = run, layout, tokenizer
        settings = run.evaluation
        rule = DecodingRule(temperature=settings.sample_temperature, seed=run.seed)
        self._requests = [
            GenerationRequest(prompt, max_tokens=settings.sample_tokens, rule=rule)
            for prompt in settings.sample_prompts
        ]
        if not self._requests:
            return
        if run.parallel.pp > 1 and run.parallel.schedule == STOCK_ENGINE:
            raise UserError(
                f"{run.path}: evaluation.sample_prompts: parallel.schedule = {STOCK_ENGINE} cannot generate text; use "
                "another schedule"
            )
        try:
            begin = len(prefix(tokenizer))
        except UserError as error:
            raise UserError(f"{run.path}: evaluation.sample_prompts: {error}") from None
        for number, prompt in enumerate(settings.sample_prompts):
            tokens = begin + len(tokenizer.encode(prompt))
            if tokens + settings.sample_tokens > run.data.seq_len:
                raise UserError(
                    f"{run.path}: evaluation.sample_prompts.{number} = {shortened(prompt)!r} has {tokens} tokens, and "
                    f"evaluation.sample_tokens = {settings.sample_tokens} more do not fit into data.seq_len = "
                    f"{run.data.seq_len}; shorten one of them"
                )

    def due(self, done: int, last: bool) -> bool:
        """Return whether there are samples after `done` steps; `last` says that no step follows."""
        interval = self._run.evaluation.sample_interval
        return bool(self._requests) and (last or (interval > 0 and done % interval == 0))

    def generate(self, engine: Engine, progress: Progress) -> list[Sample]:
        """Continue all prompts; every rank has all samples. Collective. `progress` is told of every one.

        Drawn tokens depend on the run's seed, the prompt and the weights; torch's generators are not used.
        """
        phases = cycle((Phase.TASKS, Phase.MORE_TASKS))
        progress.enter(next(phases))
        generator = TextGenerator(EngineDecoder(engine, self._run, self._layout), self._tokenizer)
        found = generator.generate(self._requests, lambda _: progress.enter(next(phases)))
        return [Sample(request.context, one.text) for request, one in zip(self._requests, found, strict=True)]
