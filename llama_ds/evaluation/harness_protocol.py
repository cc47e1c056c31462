"""The classes of the task files that `harness_tasks.py` writes for lm-evaluation-harness.

The file is copied beside them and imports nothing of this project, so that they work where only lm-eval is installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

# The harness' names of the accuracies.
METRICS = {"plain": "acc", "characters": "acc_norm", "answer": "acc_answer"}


class WrittenTask(ConfigurableTask):
    """A task whose prompts, with the examples shown before a question, lie beside its YAML file.

    The harness resolves the functions that the file names; keys that it does not know itself are taken out here.
    """

    OWN_KEYS: tuple[str, ...] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.own = {key: config[key] for key in self.OWN_KEYS}
        known = {key: value for key, value in config.items() if key not in ("class", *self.OWN_KEYS)}
        # Any text lets the harness take metrics that it does not know itself.
        super().__init__(config=known | {"process_results": "process_results"})

    def download(self, *arguments: Any, **settings: Any) -> None:
        """Read the prompts; nothing is downloaded."""
        path = Path(__file__).with_name(f"{self.config.task}.jsonl")
        with open(path, encoding="utf-8") as file:
            self.dataset = {"test": Dataset.from_list([json.loads(line) for line in file])}

    def checked(self, doc: Mapping[str, Any], context: Any) -> str:
        """Return the prompt of a question.

        Raises:
            ValueError: the harness was told to change it.
        """
        if context != doc["context"]:
            raise ValueError(
                f"{self.config.task}: its prompts are fixed; leave out --apply_chat_template, --system_instruction and "
                "--num_fewshot, and write the task anew with tools/evaluate.py harness --shots N"
            )
        return doc["context"]


class WrittenChoices(WrittenTask):
    """Choices of completions: accuracies by all normalizations of the paper."""

    OWN_KEYS = ("scores", "right")

    def construct_requests(self, doc: dict[str, Any], ctx: str, **settings: Any) -> list[Instance]:
        """Return the requests of the choices, then those of the answer context, if there is one."""
        context = self.checked(doc, ctx)
        contexts = doc["contexts"] or [context] * len(doc["continuations"])
        pairs = list(zip(contexts, doc["continuations"], strict=True))
        if doc["answer_context"]:
            pairs += [(doc["answer_context"], continuation) for continuation in doc["continuations"]]
        about = {key: value for key, value in settings.items() if key == "metadata"}
        return [Instance("loglikelihood", doc, pair, number, **about) for number, pair in enumerate(pairs)]

    def process_results(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """Return whether the right completion has the largest score, by normalization."""
        found = self.own["scores"](doc["completions"], [value for value, _ in results])
        return {METRICS[name]: self.own["right"](values, doc["gold"]) for name, values in found.items()}


class WrittenAnswers(WrittenTask):
    """Answers that the model writes."""

    OWN_KEYS = ("answer",)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **settings: Any) -> Instance:
        """Return the request to continue the prompt."""
        about = {key: value for key, value in settings.items() if key == "metadata"}
        arguments = (self.checked(doc, ctx), deepcopy(self.config.generation_kwargs))
        return Instance("generate_until", doc, arguments, 0, **about)

    def process_results(self, doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
        """Return whether the answer in the text, in normal form, is one that counts."""
        answer = self.own["answer"](results[0])
        return {"acc": float(bool(answer) and answer in doc["answers"])}
