"""Benchmarks along training, on the running engine: no second copy of the weights, and the run goes on unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from llama_ds.config.schema import RunConfig
from llama_ds.config.section_rules import STOCK_ENGINE
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError
from llama_ds.evaluation.evaluate import TaskResult, evaluate, prepare
from llama_ds.evaluation.generated_outcomes import check_leave
from llama_ds.evaluation.generation_tasks import ONE_SAMPLE, GenerationTask
from llama_ds.evaluation.requests import prefix
from llama_ds.evaluation.scoring import Scorer
from llama_ds.evaluation.suite import find_tasks
from llama_ds.evaluation.tasks import Task
from llama_ds.job.heartbeat import Progress
from llama_ds.job.wire import Phase
from llama_ds.layout.layout import Layout
from llama_ds.training.engines.interface import Engine
from llama_ds.training.engines.scoring import EngineBackend


class TaskEvaluation:
    """The tasks of a run, read once on every rank."""

    def __init__(self, run: RunConfig, layout: Layout, tokenizer: Tokenizer) -> None:
        """Read the examples.

        Raises:
            UserError: a task is unknown or its data is missing, or the tokenizer has no bos.
        """
        self._run, self._layout, self._tokenizer = run, layout, tokenizer
        settings = run.evaluation
        try:
            tasks = find_tasks(settings.tasks)
            check_leave(tasks, ONE_SAMPLE)
            _check_engine(run, tasks)
            self._works = prepare(tasks, settings.task_data, limit=settings.task_examples or None)
        except UserError as error:
            raise UserError(f"{run.path}: evaluation.tasks: {error}") from None
        if self._works:
            prefix(tokenizer)

    def due(self, done: int, last: bool) -> bool:
        """Return whether the tasks are evaluated after `done` steps; `last` says that no step follows."""
        interval = self._run.evaluation.task_interval
        return bool(self._works) and (last or (interval > 0 and done % interval == 0))

    def results(self, engine: Engine, progress: Progress) -> list[TaskResult]:
        """Evaluate all tasks; every rank has all results. Collective. `progress` is told of every block."""
        phases = cycle((Phase.TASKS, Phase.MORE_TASKS))
        scorer = Scorer(EngineBackend(engine, self._run, self._layout, self._tokenizer.marks), self._tokenizer)
        return [evaluate(scorer, work, None, lambda: progress.enter(next(phases))) for work in self._works]


def _check_engine(run: RunConfig, tasks: Sequence[Task]) -> None:
    """Check that the run's engine can do the tasks.

    Raises:
        UserError: one generates text on DeepSpeed's own pipeline.
    """
    named = [task.name for task in tasks if isinstance(task, GenerationTask)]
    if named and run.parallel.pp > 1 and run.parallel.schedule == STOCK_ENGINE:
        raise UserError(
            f"task {named[0]} generates text, which parallel.schedule = {STOCK_ENGINE} cannot; use another schedule"
        )
