"""The training loop, in reading order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from llama_ds.config.row_stages import stage_steps, stages_key
from llama_ds.config.schema import RunConfig
from llama_ds.job.heartbeat import Progress
from llama_ds.job.requests import Request, Requests
from llama_ds.job.run_end import RunEnd
from llama_ds.job.wire import Phase
from llama_ds.layout.layout import Layout
from llama_ds.layout.recompute import ELEMENT_BYTES
from llama_ds.log import logger
from llama_ds.parallel import world
from llama_ds.parallel.leaving import leaving
from llama_ds.parallel.recording import Recording
from llama_ds.parallel.temporary import dismantle, engines_undone
from llama_ds.perf.plan.relief import check_matrices
from llama_ds.training.checkpoints import Checkpoints
from llama_ds.training.engines.build import build_engine
from llama_ds.training.feed import Feed
from llama_ds.training.interruptions import Interruptions, end_if_asked
from llama_ds.training.lr_schedule import learning_rate
from llama_ds.training.machines import begin_machine_of
from llama_ds.training.memory_checkpoints import MemoryCheckpoints
from llama_ds.training.meter import Meter
from llama_ds.training.out_of_memory import MemoryExplainer
from llama_ds.training.reporter import Reporter
from llama_ds.training.run_log import open_run_log
from llama_ds.training.samples import TrainingSamples
from llama_ds.training.self_test.check import self_test_at_start
from llama_ds.training.setup import (
    check_same_order,
    choose_state,
    load_state,
    log_start,
    open_train_data,
    stage_setup,
    with_cp_method,
    with_min_memory,
)
from llama_ds.training.start import carried_over, open_start
from llama_ds.training.step_checks import StepChecks
from llama_ds.training.stragglers import Stragglers
from llama_ds.training.task_evaluation import TaskEvaluation
from llama_ds.training.validation import Validation


def train(
    run: RunConfig,
    layout: Layout,
    config: dict[str, Any],
    rank_info: world.RankInfo,
    progress: Progress,
    requests: Requests,
    check_lock: Callable[[], None],
) -> Request:
    """Train the stages of `run` (`stages_key`), from its newest checkpoint or its seed to its last step. Collective.

    The engine of a stage resumes from the checkpoint at the end of the stage before it, as after a restart. Arguments,
    result and errors are those of `train_stage`.
    """
    while True:
        engines = ExitStack()  # not a `with`: after an error, the ranks of a job that fails close no groups
        if stages_key(run):
            engines.enter_context(engines_undone())
        ended, done = train_stage(run, layout, config, rank_info, progress, requests, check_lock)
        if ended or done >= last_step(run):
            return ended
        engines.close()
        logger.info("step %d ends a stage of %s; the next one starts from its checkpoint", done, stages_key(run))
        progress.enter(Phase.LOADING)


def train_stage(
    run: RunConfig,
    layout: Layout,
    config: dict[str, Any],
    rank_info: world.RankInfo,
    progress: Progress,
    requests: Requests,
    check_lock: Callable[[], None],
) -> tuple[Request, int]:
    """Train `run` from its newest checkpoint, or from its seed, to the last step of the stage. Collective.

    `config` is the merged DeepSpeed configuration; `progress` reports this rank's phase to the supervisor; `check_lock`
    raises UserError once another job has taken the run over.

    Returns:
        The request that ended the run early, or NOTHING, and the number of finished steps.

    Raises:
        UserError: on all ranks alike: data or checkpoints cannot be used, or the loss has diverged.
        OutOfMemory: on the ranks whose memory is too small.
        EndedEarly: on all ranks alike, before the first step.
        Left: another rank has failed, and this one is to go on in another attempt.
    """
    device, dtype = world.device(), "bf16" if config["bf16"]["enabled"] else "fp32"
    end_if_asked(requests, device)
    hosts = world.gather(progress.host)
    asked, run = run, with_min_memory(run, device)
    checkpoints = Checkpoints(run, layout, dtype, rank_info)
    in_memory = MemoryCheckpoints(asked, checkpoints, hosts, device)
    chosen = choose_state(checkpoints, in_memory)
    if stages_key(run):
        run, layout, config = world.together(lambda: stage_setup(run, chosen, layout.world, device))
    run = with_cp_method(run, hosts, dtype)
    check_same_order(run, layout)
    world.together(lambda: check_matrices(run, layout, ELEMENT_BYTES[dtype], world.device_size(device)))
    checkpoints.run, checkpoints.layout = run, layout
    data = world.together(lambda: open_train_data(run, checkpoints.folder, chosen, rank_info))
    tokenizer, marks = data.sources.tokenizer, data.sources.tokenizer.marks
    start, tasks, samples = world.together(
        lambda: (
            None if chosen and chosen[0] else open_start(run, tokenizer),
            TaskEvaluation(run, layout, tokenizer),
            TrainingSamples(run, layout, tokenizer),
        )
    )
    end_if_asked(requests, device)
    self_test_at_start(run, layout, dtype, marks, rank_info, device)
    end_if_asked(requests, device)
    machine = begin_machine_of(layout, device, hosts, run.run_dir) if rank_info.rank == 0 else None
    memory = MemoryExplainer(run, layout, dtype, rank_info.rank, device)
    with memory.explained():  # outside of `together`, because a rank without memory does not meet the others again
        engine = world.together(lambda: build_engine(run, layout, config, device, marks))
        memory.built(engine.deepspeed)
        end_if_asked(requests, device)
        first = load_state(engine, checkpoints, in_memory, chosen, start)
    end_if_asked(requests, device)
    in_memory.begin(engine.deepspeed, first)
    checkpoints.begin(marks, carried_over(checkpoints.folder, chosen, start))
    final = last_step(run)
    last = min(final, stage_steps(run, first).stop)
    log_start(run, layout, dtype, range(first, last), chosen)
    validation = world.together(lambda: Validation(run, layout, data.sources, engine))
    log = world.together(lambda: open_run_log(run, first, config, machine.result()) if machine else None)
    if log:
        requests.before_end(log.close_boards)
    feed = Feed(run, layout, data, range(first, last), engine, rank_info, device)
    interruptions = Interruptions(run.checkpoint, device, requests)
    stragglers = Stragglers(run, layout, rank_info, progress.host, engine.trace, device, first)
    checks = StepChecks(run, layout, engine, rank_info.rank, hosts, device)
    recording = Recording(run, layout, engine.trace, rank_info, progress.host, dtype, device)
    progress.doing = engine.trace.doing_now
    progress.enter(Phase.TRAINING, first)
    ended = Request.NOTHING
    report = Reporter(run, engine, Meter(run, layout, feed, dtype, device, first), log, progress, device)

    def abandon() -> None:
        progress.doing = lambda: ("", False)  # refers to the engine
        feed.abandon()
        in_memory.abandon()
        recording.abandon()
        report.close(RunEnd.FAILED)

    with (
        leaving(requests.departure, engine, abandon),
        checkpoints.drained(lambda: requests.leaves),
        in_memory.trusted(),
        memory.explained(),
    ):
        for step in range(first, last):
            memory.before_step(step + 1, step == first)
            check_lock()
            feed.before_step(step)
            recording.before_step(step + 1)
            stragglers.before_step()
            report.before_step(step + 1)
            checks.before_step(step + 1)
            lr = learning_rate(step, run.optimizer, run.training.steps)
            result = engine.train_step(feed, lr)
            done = step + 1
            report.warnings([*checks.lines(), *stragglers.after_step(done)])
            recorded = recording.after_step()
            request = interruptions.after_step()

            ends = done == last or request >= Request.END
            evaluates = validation.due(done, done == last)
            tests = tasks.due(done, done == final)
            continues = samples.due(done, done == final)
            saves = run.checkpoint.save and (ends or request is Request.SAVE or _due(done, run.checkpoint.interval))
            report.step_done(done, lr, result, last=ends)
            if saves:
                checks.replicas.before_save(done)
            if recorded or evaluates or tests or continues or saves:
                report.flush()
                if evaluates:
                    progress.enter(Phase.EVALUATING)
                    report.validation(done, validation.losses())
                if tests:
                    report.tasks(done, tasks.results(engine, progress))
                if continues:
                    report.samples(done, samples.generate(engine, progress))
                if saves:
                    progress.enter(Phase.SAVING)
                    checkpoints.save(engine.deepspeed, done, data.state.as_json())
                    report.consumed(done, data.consumed(done))
                report.restart_clock(done)
            progress.enter(Phase.TRAINING, done)
            if not ends:
                in_memory.after_step(engine.deepspeed, done, data.state.as_json)
            report.notes(checkpoints.news())
            if request >= Request.END and done < final:
                ended = request
                logger.info("ending at step %d of %d: %s", done, run.training.steps, interruptions.reason)
                break
    progress.enter(Phase.ENDING)
    recording.close()
    checkpoints.close()
    in_memory.close(ended=bool(ended) or last == final)
    report.notes(checkpoints.news())
    report.close(RunEnd.INTERRUPTED if ended else RunEnd.FINISHED)
    feed.close()
    interruptions.close()
    if ended:
        world.barrier()  # launchers kill the other ranks when one exits with another code than 0
    elif last < final:
        progress.doing = lambda: ("", False)  # refers to the engine
        dismantle(engine.deepspeed)
    return ended, done if ended else last


def last_step(run: RunConfig) -> int:
    """Return the number of steps after which the run, or this start of it, ends."""
    return min(run.checkpoint.stop_at or run.training.steps, run.training.steps)


def _due(done: int, interval: int) -> bool:
    return interval > 0 and done % interval == 0
