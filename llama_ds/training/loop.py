"""The training loop: read it from top to bottom."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_ds.checkpoint.load_model import open_model
from llama_ds.checkpoint.manifest import Description
from llama_ds.checkpoint.weights import Readable, check_shapes
from llama_ds.config.recompute import AUTO
from llama_ds.config.run_file import dump
from llama_ds.config.schema import RunConfig
from llama_ds.data.mixture import state_from_json
from llama_ds.data.source.shards import check_present
from llama_ds.data.sources import Sources
from llama_ds.data.stream import Dataset, open_data
from llama_ds.errors import Divergence, UserError
from llama_ds.job.heartbeat import Progress
from llama_ds.job.wire import Phase
from llama_ds.layout.layout import Layout
from llama_ds.layout.recompute import ELEMENT_BYTES, with_device_memory
from llama_ds.layout.weights import Key
from llama_ds.log import logger
from llama_ds.parallel import world
from llama_ds.parallel.recording import Recording
from llama_ds.training.checkpoints import Checkpoints
from llama_ds.training.engine import Engine, StepResult, build_engine
from llama_ds.training.feed import Feed
from llama_ds.training.interruptions import Interruptions, Wish
from llama_ds.training.meter import Meter
from llama_ds.training.plan import memory_table
from llama_ds.training.reporter import Reporter
from llama_ds.training.schedule import learning_rate
from llama_ds.training.stragglers import Stragglers


def train(run: RunConfig, layout: Layout, config: dict[str, Any], place: world.Place, progress: Progress) -> None:
    """Train `run` from its newest checkpoint, or from its seed, to its last step. Collective.

    `config` is the merged DeepSpeed configuration; `progress` is told where this rank is.

    Raises:
        UserError: on every rank alike, for what is wrong with data, checkpoints or the outcome.
    """
    progress.enter(Phase.LOADING)
    device = world.device()
    dtype = "bf16" if config["bf16"]["enabled"] else "fp32"
    least = -int(world.maximum([-float(world.device_memory(device))], device)[0])
    run = with_device_memory(run, least)
    checkpoints = Checkpoints(run, layout, dtype, place)
    chosen = checkpoints.choose()
    data = world.together(lambda: _open_data(run, checkpoints.folder, chosen, place))
    engine = world.together(lambda: build_engine(run, layout, config, device))
    first = _load(run, engine, checkpoints, chosen)
    checkpoints.go_back(chosen)
    if run.parallel.recompute.startswith(AUTO):
        for line in memory_table(run, layout, ELEMENT_BYTES[dtype]):
            logger.info("%s", line)
    logger.info("%s at step %d of %d", "resumed" if chosen else "starting", first, run.training.steps)

    total, every = run.training.steps, run.logging.interval
    last = min(run.checkpoint.stop_at or total, total)
    meter = Meter(run, layout, dtype, device)
    validation = world.together(lambda: _validation(run, layout, data.sources, engine))
    report = world.together(lambda: _open_report(run, first, place))
    checkpoints.check_shared()
    feed = Feed(run, layout, data, range(first, last), engine, place, device)
    interruptions = Interruptions(run.checkpoint, device)
    stragglers = Stragglers(run, layout, place, progress.host, engine.trace, device, first)
    recording = Recording(run, layout, engine.trace, place, progress.host, dtype, device)
    progress.doing = engine.trace.doing_now
    progress.enter(Phase.TRAINING, first)

    # On CUDA a step's result is read while the next step runs: reading waits for the device.
    defers = device.type == "cuda"
    unread: tuple[int, float, StepResult] | None = None  # number, learning rate and result of a step to report
    meter.restart(first, waited_s=0.0)
    with checkpoints.drained():
        for step in range(first, last):
            lr, done = learning_rate(step, run.optimizer, total), step + 1
            feed.before_step(step)
            recording.before_step(done)
            stragglers.before_step()
            result = engine.train_step(feed, lr)
            for line in stragglers.after_step(done):
                report.note(line)
            recorded = recording.after_step()

            wish = interruptions.after_step()
            ends = done == last or wish is Wish.END
            evaluates = bool(validation) and (done == last or _due(done, run.evaluation.interval))
            saves = run.checkpoint.save and (ends or wish is Wish.SAVE or _due(done, run.checkpoint.interval))
            if unread:
                _report(run, engine, report, meter, progress, feed.wait_s, *unread)
            unread = (done, lr, result) if ends or _due(done, every) else None
            if unread and (evaluates or saves or recorded or ends or not defers):
                _report(run, engine, report, meter, progress, feed.wait_s, *unread)
                unread = None
            if evaluates:
                progress.enter(Phase.EVALUATING)
                report.validation(done, engine.evaluate(validation, len(validation)))
                meter.restart(done, feed.wait_s)
            if saves:
                progress.enter(Phase.SAVING)
                checkpoints.save(engine.deepspeed, done, data.state.as_json())
                report.consumed(done, data.order.consumed(done), run.data.seq_len)
                meter.restart(done, feed.wait_s)
            if recorded:
                meter.restart(done, feed.wait_s)
            progress.enter(Phase.TRAINING, done)
            for line in checkpoints.news():
                report.note(line)
            if wish is Wish.END and done < last:
                logger.info("ending at step %d of %d: %s", done, total, interruptions.reason or "asked on another rank")
                break
    progress.enter(Phase.ENDING)
    recording.close()
    checkpoints.close()
    for line in checkpoints.news():
        report.note(line)
    report.close()
    feed.close()
    interruptions.close()


def _report(
    run: RunConfig,
    engine: Engine,
    report: Reporter,
    meter: Meter,
    progress: Progress,
    waited_s: float,
    done: int,
    lr: float,
    result: StepResult,
) -> None:
    """Read a step's result and report it."""
    mean, norm = engine.read(result)
    progress.tell(what="loss", step=done, loss=mean)
    report.step(meter.measure(done, mean, lr, norm, waited_s))
    if not math.isfinite(mean):
        raise Divergence(_divergence(run, done, mean))


def _open_data(run: RunConfig, checkpoints: str, chosen: tuple[str, Description] | None, place: world.Place) -> Dataset:
    """Return the data from the chosen checkpoint on, or from the start."""
    if chosen:
        folder = os.path.join(checkpoints, chosen[0])
        data = open_data(run, state_from_json(chosen[1].data, folder), chosen[1].step, folder)
    else:
        data = open_data(run)
    if place.local_rank == 0:  # once per node, as for the files of a checkpoint
        for source in data.sources.train:
            check_present(source)
    return data


def _load(run: RunConfig, engine: Engine, checkpoints: Checkpoints, chosen: tuple[str, Description] | None) -> int:
    """Give the engine the chosen checkpoint, or the weights that the run starts from; return the step it is at."""
    if chosen:
        return checkpoints.load(engine.deepspeed, *chosen)
    if run.checkpoint.start_from:
        checkpoints.start_from(engine.deepspeed, world.together(lambda: _weights_to_start_from(run)))
    return 0


def _weights_to_start_from(run: RunConfig) -> Mapping[Key, Readable]:
    found = open_model(run.checkpoint.start_from)
    check_shapes(found, run.model)
    return found.tensors


def _validation(run: RunConfig, layout: Layout, sources: Sources, engine: Engine) -> list[np.ndarray]:
    """Return a rank's part of the validation rows; those in the middle of the pipeline are asked only how many."""
    rows = run.evaluation.rows
    sources.check_validation(rows, layout.dp * layout.micro_batch)
    if engine.reads_data:
        return sources.validation_micro_batches(rows, engine.dp_rank, layout.dp, layout.micro_batch)
    return [np.empty(0)] * (rows // layout.dp // layout.micro_batch)


def _open_report(run: RunConfig, first: int, place: world.Place) -> Reporter:
    try:
        report = Reporter(run.run_dir, run.training.steps, first, place.rank == 0, run.logging.tensorboard)
        if place.rank == 0:
            with open(os.path.join(run.run_dir, "run.yaml"), "w") as file:
                file.write(dump(run))
    except OSError as error:
        raise UserError(f"{run.run_dir}: cannot write the run's files ({error}); set output_dir to another") from None
    return report


def _due(done: int, interval: int) -> bool:
    return interval > 0 and done % interval == 0


def _divergence(run: RunConfig, step: int, loss: float) -> str:
    return (
        f"{run.path}: loss is {loss} at step {step}, the run has diverged; lower optimizer.lr {run.optimizer.lr:g}, "
        f"lengthen optimizer.warmup_steps {run.optimizer.warmup_steps}, and start from the last checkpoint"
    )
