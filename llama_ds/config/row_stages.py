"""Stages of a run, with longer and longer rows (`data.stages`) or larger and larger batches (`training.batch_stages`):
the run as each stage trains it.

All stages of rows have the same tokens per step, so the rows of a step and of a validation follow from the stage's row
length; `batch_stages.py` has the rows of the other kind. A staged run holds the numbers of one stage in its keys, and
`at_stage` exchanges them for those of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama_ds.config.batch_stages import KEY as BATCHES
from llama_ds.config.batch_stages import check_batch_stages
from llama_ds.config.context_parallel import HIERARCHICAL
from llama_ds.config.numbers import near_divisors
from llama_ds.errors import UserError, listed

if TYPE_CHECKING:
    from llama_ds.config.schema import BatchStage, RunConfig
    from llama_ds.config.schema_data import RowStage

STAGE_SIZES = ("cp", "cp_method", "cp_all_to_all", "micro_batch")  # keys of a stage that stand for those of `parallel`
SEQ_LEN = "{seq_len}"  # in the path of a source: the row length of the stage


def stages_key(run: RunConfig) -> str:
    """Return the key that cuts the run into stages; "" for a run without."""
    return "data.stages" if run.data.stages else BATCHES if run.training.batch_stages else ""


def stage_index(run: RunConfig, step: int) -> int:
    """Return the index of the stage that trains `step`, counted from 0; beyond the run, that of the last stage."""
    ends = [stage.until_step for stage in _stages(run)]
    return next(i for i, end in enumerate(ends) if end is None or step < end)


def at_stage(run: RunConfig, step: int) -> RunConfig:
    """Return the run as the stage of `step`, counted from 0, trains it; a run without stages is returned unchanged."""
    return _with_stage(run, stage_index(run, step)) if stages_key(run) else run


def stage_runs(run: RunConfig) -> list[RunConfig]:
    """Return the run as each of its stages trains it; the run itself if it has no stages."""
    return [_with_stage(run, i) for i in range(len(_stages(run)))] or [run]


def stage_steps(run: RunConfig, step: int) -> range:
    """Return the steps of the stage of `step`; all steps of a run without stages."""
    if not stages_key(run):
        return range(run.training.steps)
    i = stage_index(run, step)
    first = _stages(run)[i - 1].until_step if i else 0
    return range(first or 0, _stages(run)[i].until_step or run.training.steps)


def length_begins(run: RunConfig, step: int) -> int:
    """Return the first step whose rows are as long as those of `step`."""
    stages = run.data.stages
    if not stages:
        return 0
    same = next(i for i, stage in enumerate(stages) if stage.seq_len == stages[stage_index(run, step)].seq_len)
    return (stages[same - 1].until_step or 0) if same else 0


def first_step(run: RunConfig) -> int:
    """Return the first step of the stage whose numbers the run holds; 0 without stages."""
    begin = 0
    for batch in run.training.batch_stages:
        if batch.global_batch == run.training.global_batch:
            return begin
        begin = batch.until_step or begin
    mine = (run.data.seq_len, *(getattr(run.parallel, key) for key in STAGE_SIZES))
    for stage in run.data.stages:
        if (stage.seq_len, *(getattr(stage, key) for key in STAGE_SIZES)) == mine:
            break
        begin = stage.until_step or begin
    return begin


def complete_stages(data: Mapping[str, Any], parallel: Mapping[str, Any]) -> None:
    """Fill the keys that stages leave out, in plain data: the run of any stage then leads to all others."""
    stages = data.get("stages")
    for stage in stages if isinstance(stages, list) else ():
        if isinstance(stage, dict):
            stage.update({key: parallel.get(key, 1) for key in ("cp", "micro_batch") if stage.get(key) is None})
            if stage.get("cp_method") is None:
                stage["cp_method"] = parallel.get("cp_method", "auto") if stage["cp"] != 1 else "auto"
            if stage.get("cp_all_to_all") is None:
                hierarchical = stage["cp_method"] == HIERARCHICAL
                stage["cp_all_to_all"] = parallel.get("cp_all_to_all", 0) if hierarchical else 0


def trained_lengths(run: Mapping[str, Any], steps: int) -> list[tuple[int, int]]:
    """Return (row length, steps with it) of the first `steps` steps of a run, from its plain data."""
    stages = run["data"].get("stages") or [{"seq_len": run["data"]["seq_len"], "until_step": None}]
    found: list[tuple[int, int]] = []
    begin = 0
    for stage in stages:
        end = steps if stage["until_step"] is None else min(steps, stage["until_step"])
        if end > begin and found and found[-1][0] == stage["seq_len"]:
            found[-1] = (stage["seq_len"], found[-1][1] + end - begin)
        elif end > begin:
            found.append((stage["seq_len"], end - begin))
        begin = max(begin, end)
    return found


def check_stages(run: RunConfig) -> None:
    """Refuse stages out of order, row lengths that do not divide the tokens of a step, and what stages cannot do.

    Raises:
        UserError: the message names numbers that would do.
    """
    stages, before, shortest = run.data.stages, 0, 0
    for i, stage in enumerate(stages):
        key, last = f"data.stages.{i}", i == len(stages) - 1
        if (stage.until_step is None) != last:
            wanted = "is set, but the last stage ends with the run; leave it out" if last else "is missing; set it"
            raise _error(run, f"{key}.until_step {wanted}")
        if stage.until_step is not None and not before < stage.until_step < run.training.steps:
            raise _error(
                run,
                f"{key}.until_step = {stage.until_step} is not between {before}, where the stage begins, and "
                f"training.steps = {run.training.steps}",
            )
        if stage.seq_len < shortest:
            raise _error(run, f"{key}.seq_len = {stage.seq_len} is shorter than the {shortest} of the stage before it")
        _check_rows(run, key, stage.seq_len)
        before, shortest = stage.until_step or 0, stage.seq_len
    if stages:
        _check_whole_run(run)
    check_batch_stages(run)


def _check_rows(run: RunConfig, key: str, seq_len: int) -> None:
    for name, rows in (("training.global_batch", run.training.global_batch), ("evaluation.rows", run.evaluation.rows)):
        tokens = rows * run.data.seq_len
        if tokens % seq_len:
            near = near_divisors(tokens, seq_len)
            fits = listed([n for n in near if n < seq_len][-1:] + [n for n in near if n > seq_len][:1])
            raise _error(
                run,
                f"{key}.seq_len = {seq_len} does not divide the {tokens:,} tokens of {name} = {rows} rows of "
                f"{run.data.seq_len}, which all stages share; use {fits}, or change {name}",
            )


def _check_whole_run(run: RunConfig) -> None:
    if run.data.seq_len not in [stage.seq_len for stage in run.data.stages]:
        lengths = listed([stage.seq_len for stage in run.data.stages])
        raise _error(run, f"data.seq_len = {run.data.seq_len} is not that of a stage in data.stages; use {lengths}")
    for source in run.data.sources:
        if SEQ_LEN not in source.path and len({stage.seq_len for stage in run.data.stages}) > 1:
            raise _error(
                run,
                f"data.sources: the path {source.path} of {source.name} names one folder for rows of all lengths in "
                f"data.stages; write {SEQ_LEN} where the folders of the stages differ",
            )
        if source.epochs is not None:
            raise _error(
                run, f"data.sources: {source.name} states epochs, which data.stages do not allow; leave it out"
            )
    if not run.checkpoint.save or run.checkpoint.resume == "never":
        raise _error(
            run,
            "data.stages: every stage but the first resumes from the checkpoint at the end of the one before it; set "
            "checkpoint.save: true and checkpoint.resume: auto",
        )


def _stages(run: RunConfig) -> Sequence[RowStage | BatchStage]:
    return run.data.stages or run.training.batch_stages


def _with_stage(run: RunConfig, index: int) -> RunConfig:
    if run.training.batch_stages:
        rows = run.training.batch_stages[index].global_batch
        return replace(run, training=replace(run.training, global_batch=rows))
    stage, tokens = run.data.stages[index], run.data.seq_len
    parallel = {key: value for key in STAGE_SIZES if (value := getattr(stage, key)) is not None}
    return replace(
        run,
        data=replace(run.data, seq_len=stage.seq_len),
        training=replace(run.training, global_batch=run.training.global_batch * tokens // stage.seq_len),
        evaluation=replace(run.evaluation, rows=run.evaluation.rows * tokens // stage.seq_len),
        parallel=replace(run.parallel, **parallel),
    )


def _error(run: RunConfig, rule: str) -> UserError:
    return UserError(f"{run.path}: {rule}")
