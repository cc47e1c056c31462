"""The training loop: read it from top to bottom."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from llama_ds.checkpoint import store
from llama_ds.config.layout import Layout
from llama_ds.config.recompute import AUTO
from llama_ds.config.run_file import dump, resolved
from llama_ds.config.schema import RunConfig
from llama_ds.data.mixture import state_from_json
from llama_ds.data.source.shards import check_present
from llama_ds.data.sources import Sources
from llama_ds.data.stream import Dataset, open_data
from llama_ds.errors import UserError
from llama_ds.log import logger
from llama_ds.parallel import world
from llama_ds.parallel.recompute import ELEMENT_BYTES, with_device_memory
from llama_ds.parallel.scheduling import describe_trace
from llama_ds.training.engine import Engine, StepResult, build_engine
from llama_ds.training.feed import Feed
from llama_ds.training.meter import Meter
from llama_ds.training.plan import memory_table
from llama_ds.training.reporter import Reporter
from llama_ds.training.schedule import learning_rate


def train(run: RunConfig, layout: Layout, config: dict[str, Any], place: world.Place) -> None:
    """Train `run` from its newest checkpoint, or from its seed, to its last step. Collective.

    `config` is the merged DeepSpeed configuration.

    Raises:
        UserError: on every rank alike, for what is wrong with data, checkpoints or the outcome.
    """
    device = world.device()
    dtype = "bf16" if config["bf16"]["enabled"] else "fp32"
    least = -int(world.maximum([-float(world.device_memory(device))], device)[0])
    run = with_device_memory(run, least)
    tag, data = world.together(lambda: _open(run, layout, place))
    engine = world.together(lambda: build_engine(run, layout, config, device))
    first = _load(engine, _checkpoints(run), tag) if tag else 0
    if run.parallel.recompute.startswith(AUTO):
        for line in memory_table(run, layout, ELEMENT_BYTES[dtype]):
            logger.info("%s", line)
    logger.info("%s at step %d of %d", "resumed" if tag else "starting", first, run.training.steps)

    total, every = run.training.steps, run.logging.interval
    last = min(run.checkpoint.stop_at or total, total)
    meter = Meter(run, layout, dtype, device)
    validation = world.together(lambda: _validation(run, layout, data.sources, engine))
    report = world.together(lambda: _open_report(run, first, place))
    feed = Feed(run, layout, data, range(first, last), engine, place, device)

    # On CUDA a step's result is read while the next step runs: reading waits for the device.
    defers = device.type == "cuda"
    unread: tuple[int, float, StepResult] | None = None  # number, learning rate and result of a step to report
    meter.restart(first, waited_s=0.0)
    for step in range(first, last):
        lr, done = learning_rate(step, run.optimizer, total), step + 1
        evaluates = bool(validation) and _due(done, run.evaluation.interval, last)
        saves = _due(done, run.checkpoint.interval, last)
        feed.before_step(step)
        if done == run.logging.trace_step:
            engine.trace.start()
        result = engine.train_step(feed, lr)
        if engine.trace.recording:
            folder = os.path.join(run.run_dir, "trace")
            engine.trace.write(folder, place.rank, **describe_trace(run, layout, place.rank))

        if unread:
            _report(run, engine, report, meter, feed.wait_s, *unread)
        unread = (done, lr, result) if _due(done, every, last) else None
        if unread and (evaluates or saves or not defers):
            _report(run, engine, report, meter, feed.wait_s, *unread)
            unread = None
        if evaluates:
            report.validation(done, engine.evaluate(validation, len(validation)))
            meter.restart(done, feed.wait_s)
        if saves:
            save(engine, run, layout, dtype, done, place, data)
            report.consumed(done, data.order.consumed(done), run.data.seq_len)
            report.note(f"step {done} | saved {_checkpoints(run)}/{store.tag_of(done)}")
            meter.restart(done, feed.wait_s)
    report.close()
    feed.close()


def _report(
    run: RunConfig,
    engine: Engine,
    report: Reporter,
    meter: Meter,
    waited_s: float,
    done: int,
    lr: float,
    result: StepResult,
) -> None:
    """Read a step's result and report it."""
    mean, norm = engine.read(result)
    report.step(meter.measure(done, mean, lr, norm, waited_s))
    if not math.isfinite(mean):
        raise UserError(_divergence(run, done, mean))


def save(
    engine: Engine, run: RunConfig, layout: Layout, dtype: str, step: int, place: world.Place, data: Dataset
) -> None:
    """Write the checkpoint of `step` and then, when all ranks' files are down, make it the newest. Collective."""
    folder = _checkpoints(run)
    engine.save(folder, store.tag_of(step))
    world.barrier()
    if place.rank == 0:
        tokens = step * layout.global_batch * run.data.seq_len
        description = store.Description(
            step, tokens, run.zero_stage, dtype, vars(layout), resolved(run), data.state.as_json()
        )
        store.commit(folder, description, run.data.tokenizer)
    world.barrier()


def _open(run: RunConfig, layout: Layout, place: world.Place) -> tuple[str | None, Dataset]:
    """Return the checkpoint to resume from, if any, and the data from there on."""
    tag = _checkpoint_to_resume(run, layout, place)
    if tag:
        folder = os.path.join(_checkpoints(run), tag)
        found = store.describe(folder)
        data = open_data(run, state_from_json(found.data, folder), found.step, folder)
    else:
        data = open_data(run)
    if place.local_rank == 0:  # once per node, as for the files of a checkpoint
        for source in data.sources.train:
            check_present(source)
    return tag, data


def _validation(run: RunConfig, layout: Layout, sources: Sources, engine: Engine) -> list[np.ndarray]:
    """Return a rank's part of the validation rows; those in the middle of the pipeline are asked only how many."""
    rows = run.evaluation.rows
    sources.check_validation(rows, layout.dp * layout.micro_batch)
    if engine.reads_data:
        return sources.validation_micro_batches(rows, engine.dp_rank, layout.dp, layout.micro_batch)
    return [np.empty(0)] * (rows // layout.dp // layout.micro_batch)


def _checkpoint_to_resume(run: RunConfig, layout: Layout, place: world.Place) -> str | None:
    folder = _checkpoints(run)
    tag = store.newest(folder)
    if tag is None:
        if run.checkpoint.resume == "must":
            raise UserError(f"{folder}: no checkpoint to resume from (checkpoint.resume = must); auto starts anew")
        return None
    if run.checkpoint.resume == "never":
        raise UserError(
            f"{folder}: holds checkpoints of an earlier run and checkpoint.resume = never; "
            "choose another name, move the folder away, or set checkpoint.resume=auto"
        )
    found = store.describe(os.path.join(folder, tag))
    store.check_resumable(os.path.join(folder, tag), found, resolved(run), layout, run.zero_stage)
    if place.local_rank == 0:  # once per node: on a shared disk thousands of ranks would ask for thousands of files
        store.check_files(os.path.join(folder, tag), found)
    return tag


def _load(engine: Engine, folder: str, tag: str) -> int:
    try:
        step = engine.load(folder, tag)
    except Exception as error:  # of every kind: a damaged pickle makes torch and DeepSpeed stumble anywhere
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(_damaged(folder, tag, reason)) from error
    if store.tag_of(step) != tag:  # DeepSpeed only warns about files that it does not find
        raise UserError(_damaged(folder, tag, f"step {step} was read from it"))
    return step


def _damaged(folder: str, tag: str, reason: str) -> str:
    return (
        f"{os.path.join(folder, tag)}: DeepSpeed cannot load this checkpoint ({reason}); "
        f"write the name of an older one into {os.path.join(folder, store.LATEST)}"
    )


def _checkpoints(run: RunConfig) -> str:
    return os.path.join(run.run_dir, "checkpoints")


def _open_report(run: RunConfig, first: int, place: world.Place) -> Reporter:
    try:
        report = Reporter(run.run_dir, run.training.steps, first, place.rank == 0, run.logging.tensorboard)
        if place.rank == 0:
            with open(os.path.join(run.run_dir, "run.yaml"), "w") as file:
                file.write(dump(run))
    except OSError as error:
        raise UserError(f"{run.run_dir}: cannot write the run's files ({error}); set output_dir to another") from None
    return report


def _due(done: int, interval: int, last: int) -> bool:
    return done == last or (interval > 0 and done % interval == 0)


def _divergence(run: RunConfig, step: int, loss: float) -> str:
    return (
        f"{run.path}: loss is {loss} at step {step}, the run has diverged; lower optimizer.lr {run.optimizer.lr:g}, "
        f"lengthen optimizer.warmup_steps {run.optimizer.warmup_steps}, and start from the last checkpoint"
    )
