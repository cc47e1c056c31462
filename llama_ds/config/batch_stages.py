"""Stages of a run with larger and larger batches (`training.batch_stages`): the rows of each step.

The rows of a run are numbered, and a step reads those that follow the rows of the step before it. Stages move the
boundaries of steps, and nothing else: the sequence of rows is that of a run with one batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from llama_ds.config.reader import ConfigSource, plain, read
from llama_ds.config.schema_data import BatchStage
from llama_ds.errors import UserError

if TYPE_CHECKING:
    from llama_ds.config.schema import RunConfig, TrainingConfig

KEY = "training.batch_stages"


@dataclass(frozen=True)
class Batches:
    """Rows of each step of a run: `rows[i]` from step `starts[i]` on. `starts` begins with 0."""

    rows: tuple[int, ...]
    starts: tuple[int, ...] = (0,)

    def of(self, step: int) -> int:
        """Return the rows of `step`."""
        return self.rows[bisect_right(self.starts, step) - 1]

    def first_row(self, step: int) -> int:
        """Return the number of the first row of `step`, which is the number of rows of all steps before it."""
        stage = bisect_right(self.starts, step) - 1
        return self._first_rows()[stage] + (step - self.starts[stage]) * self.rows[stage]

    def step_of(self, row: int) -> int:
        """Return the step that reads a row."""
        stage = bisect_right(self._first_rows(), row) - 1
        return self.starts[stage] + (row - self._first_rows()[stage]) // self.rows[stage]

    def steps_for(self, rows: int) -> int:
        """Return the fewest steps that read so many rows."""
        return self.step_of(rows - 1) + 1 if rows > 0 else 0

    def _first_rows(self) -> list[int]:
        lengths = (end - start for start, end in pairwise(self.starts))
        read_rows = (length * rows for length, rows in zip(lengths, self.rows, strict=False))
        return list(accumulate(read_rows, initial=0))


def batches_of(training: TrainingConfig) -> Batches:
    """Return the rows of each step of a run; with `data.stages`, those of a run whose rows all have one length."""
    return _batches(training.global_batch, training.batch_stages)


def _batches(global_batch: int, stages: Sequence[BatchStage]) -> Batches:
    if not stages:
        return Batches((global_batch,))
    return Batches(
        tuple(stage.global_batch for stage in stages), (0, *(stage.until_step or 0 for stage in stages[:-1]))
    )


def tokens_before(run: RunConfig, step: int) -> int:
    """Return the tokens of the steps before `step`."""
    return batches_of(run.training).first_row(step) * run.data.seq_len


def trained_batches(run: Mapping[str, Any], steps: int) -> list[tuple[int, int]]:
    """Return (rows of a step, steps with it) of the first `steps` steps of a run, from its plain data."""
    training = run["training"]
    stages = training.get("batch_stages") or [{"global_batch": training["global_batch"], "until_step": None}]
    found, begin = [], 0
    for stage in stages:
        end = steps if stage["until_step"] is None else min(steps, stage["until_step"])
        if end > begin:
            found.append((stage["global_batch"], end - begin))
            begin = end
    return found


def complete_batch_stages(training: dict[str, Any], seq_len: int | None, source: ConfigSource) -> Batches | None:
    """Complete the stages of a run file's plain data, so that the run of any stage leads to all others.

    Return the rows of its steps; None for a run without stages.

    `global_batch` is that of the steps after the stages, which become a stage of their own; then it is the first
    stage's. `until_tokens` becomes `until_step`. Stages that are complete already have a last one without an end.

    Raises:
        UserError: a stage has an unknown key or no valid number, stages are out of order, or `global_batch` is missing.
    """
    if not isinstance(training.get("batch_stages"), list) or not training["batch_stages"]:
        return None
    given = training["batch_stages"]
    stages = [read(BatchStage, stage, source, f"{KEY}.{i}") for i, stage in enumerate(given)]
    final = training.get("global_batch")
    if final is not None and (isinstance(final, bool) or not isinstance(final, int) or final < 1):
        return None  # `TrainingConfig` refuses it under its own name
    if (stages[-1].until_step, stages[-1].until_tokens) != (None, None):
        if final is None:
            raise source.error("training.global_batch", f"is missing; it is the batch after those of {KEY}")
        stages.append(read(BatchStage, {"global_batch": final}, source, KEY))
    elif final not in (None, stages[0].global_batch, stages[-1].global_batch):
        raise source.error(
            "training.global_batch",
            f"= {final} is not the {stages[-1].global_batch} of the last entry of {KEY}, which has no end; omit it",
        )
    stages = _by_steps(stages, seq_len or 1)
    if problem := _problem(stages):
        raise source.error(*problem.split(" ", 1))
    training["batch_stages"] = [plain(stage) for stage in stages]
    training["global_batch"] = stages[0].global_batch
    return _batches(stages[0].global_batch, stages)


def _by_steps(stages: Sequence[BatchStage], seq_len: int) -> list[BatchStage]:
    found: list[BatchStage] = []
    step = rows = 0
    for stage in stages:
        end = stage.until_step
        if stage.until_tokens is not None:
            end = step + -(-(-(-stage.until_tokens // seq_len) - rows) // stage.global_batch)
        found.append(replace(stage, until_step=end, until_tokens=None) if end is None or end > 0 else stage)
        rows, step = rows + ((end or 0) - step) * stage.global_batch, end or step
    return found


def _problem(stages: Sequence[BatchStage]) -> str | None:
    """Return the sentence on what is wrong with the order of stages."""
    before = smaller = 0
    for i, stage in enumerate(stages):
        end, last = stage.until_step, i == len(stages) - 1
        if end is None and (stage.until_tokens is not None or not last):
            return f"{KEY}.{i} has no end after step {before}, where it begins; set a later until_step or until_tokens"
        if end is not None and (end <= before or last):
            wrong = "and none follows" if last else f"not after {before}, where it begins"
            return f"{KEY}.{i} ends at step {end}, {wrong}; change its until_step or until_tokens"
        if stage.global_batch <= smaller:
            name = "training.global_batch" if last else f"{KEY}.{i}.global_batch"
            return f"{name} = {stage.global_batch} is not above the {smaller} of {KEY}.{i - 1}: batches grow; raise it"
        before, smaller = end or 0, stage.global_batch
    return None


def check_batch_stages(run: RunConfig) -> None:
    """Refuse stages out of order, batches that do not grow, and what stages cannot do.

    Raises:
        UserError: the message names the stage.
    """
    stages = run.training.batch_stages
    if problem := _problem(stages):
        raise _error(run, problem)
    for i, stage in enumerate(stages[:-1]):
        if (stage.until_step or 0) >= run.training.steps:
            raise _error(
                run,
                f"{KEY}.{i} ends at step {stage.until_step}, not before the end of the run, training.steps = "
                f"{run.training.steps}; leave it out, or change its until_step or until_tokens",
            )
    if stages and run.data.stages:
        raise _error(run, f"{KEY} and data.stages both cut the run into stages; leave one out")
    if stages and (not run.checkpoint.save or run.checkpoint.resume == "never"):
        raise _error(
            run,
            f"{KEY}: every stage but the first resumes from the checkpoint at the end of the one before it; set "
            "checkpoint.save: true and checkpoint.resume: auto",
        )


def _error(run: RunConfig, rule: str) -> UserError:
    return UserError(f"{run.path}: {rule}")
