"""Sections of the run file on a run's operation: validation, checkpoints and reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from llama_ds.config.boards import BoardConfig
from llama_ds.config.declare import MOST_INT64, NOT_NEGATIVE, POSITIVE, Key, Section
from llama_ds.errors import shortened


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """Validation, benchmarks and samples during training."""

    SECTION: ClassVar[str] = "evaluation"

    interval: Annotated[
        int, Key("Interval between validations; 0: only after the last step.", "steps", NOT_NEGATIVE)
    ] = 0
    rows: Annotated[
        int,
        Key(
            "Validation rows, the same throughout the run; 0: no validation.",
            "rows",
            NOT_NEGATIVE,
            rule="Divisible by data-parallel size * `parallel.micro_batch`.",
        ),
    ] = 64
    tasks: Annotated[
        tuple[str, ...],
        Key("Benchmarks to evaluate: tasks and groups of `docs/evaluation.md`.", rule="Names of tasks or groups."),
    ] = ()
    task_interval: Annotated[
        int, Key("Interval between evaluations of the tasks; 0: only after the last step.", "steps", NOT_NEGATIVE)
    ] = 0
    task_examples: Annotated[int, Key("Examples of each task, its first ones; 0: all.", "examples", NOT_NEGATIVE)] = 0
    task_data: Annotated[str, Key("Folder with the tasks' data, from `tools/evaluate.py fetch`.", is_path=True)] = (
        "benchmarks"
    )
    sample_prompts: Annotated[
        tuple[str, ...],
        Key(
            'Texts that the model continues along training, `""` among them: samples.jsonl, the report and boards.',
            rule="With `sample_tokens` more tokens each fits into a row.",
            is_foreign=True,  # a text may have several lines
        ),
    ] = ()
    sample_interval: Annotated[
        int, Key("Interval between samples; 0: only after the last step.", "steps", NOT_NEGATIVE)
    ] = 0
    sample_tokens: Annotated[int, Key("Tokens of a continuation at most.", "tokens", POSITIVE)] = 64
    sample_temperature: Annotated[
        float, Key("Temperature of drawn tokens; 0: always the most likely one.", sign=NOT_NEGATIVE, most=100)
    ] = 0.0

    def check(self) -> None:
        for number, prompt in enumerate(self.sample_prompts):
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise self.broken(
                    f"evaluation.sample_prompts.{number} = {shortened(repr(prompt))}: it is not Unicode text; write it "
                    "in UTF-8"
                )


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Saving, resuming and rewinding."""

    SECTION: ClassVar[str] = "checkpoint"

    interval: Annotated[int, Key("Interval between saves; 0: only after the last step.", "steps", NOT_NEGATIVE)] = 0
    stop_at: Annotated[
        int,
        Key("Step after which the run saves and ends; 0: run to `training.steps`.", "steps", NOT_NEGATIVE),
    ] = 0
    resume: Annotated[
        str,
        Key(
            "Resume from the newest good checkpoint: `auto` if there is one, `never`, or `must`, an error without one.",
            choices=("auto", "never", "must"),
        ),
    ] = "auto"
    strict: Annotated[
        bool, Key("Whether a damaged newest checkpoint ends the run; else the run resumes from an older one.")
    ] = False
    rewind_to: Annotated[
        int,
        Key(
            "Go back, once, to the newest good checkpoint at or before this step; 0: no.",
            "steps",
            NOT_NEGATIVE,
            rule="Below `training.steps`; not with `resume: never`.",
        ),
    ] = 0
    rewind_id: Annotated[
        int,
        Key(
            "Id of the rewind; a new id requests another rewind, even to the same step.",
            sign=NOT_NEGATIVE,
            most=MOST_INT64,
        ),
    ] = 0
    start_from: Annotated[
        str,
        Key(
            "Initial weights of a new run: a checkpoint, or a model folder that tools/convert.py reads.",
            is_path=True,
        ),
    ] = ""
    start_from_changes: Annotated[
        tuple[str, ...],
        Key(
            "Keys in which the run may differ from the model of `start_from`: `model.rope_theta`, for example.",
            rule="Keys of `model`, `data.tokenizer`, or `nonfinite` for a model with NaN or infinite weights.",
        ),
    ] = ()
    asynchronous: Annotated[bool, Key("Whether training continues while a checkpoint is written.")] = True
    memory_interval: Annotated[
        int,
        Key(
            "Interval between copies of each rank's state to its host's memory and to another host's; 0: none.",
            "steps",
            NOT_NEGATIVE,
            rule="None with `save: false`.",
        ),
    ] = 0
    memory_folder: Annotated[str, Key("File system in memory for these copies.", is_path=True)] = "/dev/shm"
    memory_rate: Annotated[
        float, Key("Limit of a rank's transfer to the other host; 0: none.", "MiB/s", NOT_NEGATIVE)
    ] = 0.0
    compare_replicas: Annotated[
        int,
        Key(
            "Interval between comparisons of the weights of data-parallel replicas, also before each save, and of the "
            "reduced gradients that they hold whole; 0: none.",
            "steps",
            NOT_NEGATIVE,
        ),
    ] = 0
    compare_repeats: Annotated[
        int,
        Key(
            "Interval between steps in which a peer computes a layer's work on a micro-batch again; 0: none.",
            "steps",
            NOT_NEGATIVE,
        ),
    ] = 0
    compare_norms: Annotated[
        bool, Key("Whether each rank's own gradient norm is compared with its data-parallel peers' in every step.")
    ] = False
    compare_states: Annotated[
        bool, Key("Whether masters and moments are compared with what the step before has left, in every step.")
    ] = False
    keep_last: Annotated[int, Key("Newest checkpoints to keep; 0: all.", "checkpoints", NOT_NEGATIVE)] = 0
    keep_every: Annotated[
        int, Key("Interval of steps whose checkpoints are also kept; 0: none.", "steps", NOT_NEGATIVE)
    ] = 0
    save: Annotated[bool, Key("Whether checkpoints are saved; false suits profiling.")] = True
    wall_time_s: Annotated[
        float,
        Key(
            "Time limit of the job, counted from its start; the run saves and ends before it. 0: none.",
            "seconds",
            NOT_NEGATIVE,
            rule="Above `wall_time_margin_s`.",
        ),
    ] = 0.0
    wall_time_margin_s: Annotated[
        float, Key("Time before the limit at which the run saves and ends.", "seconds", NOT_NEGATIVE)
    ] = 120.0

    def check(self) -> None:
        if self.rewind_to and self.resume == "never":
            raise self.broken(
                f"checkpoint.rewind_to = {self.rewind_to} resumes from a checkpoint, which checkpoint.resume = never "
                "forbids; use auto"
            )
        if 0 < self.wall_time_s <= self.wall_time_margin_s:
            raise self.broken(
                f"checkpoint.wall_time_s = {self.wall_time_s:g} is not above checkpoint.wall_time_margin_s = "
                f"{self.wall_time_margin_s:g}, so the job would end before its first step; lower the margin to the "
                "time that a save takes"
            )


@dataclass(frozen=True)
class LoggingConfig(Section):
    """Metrics, traces and reports."""

    SECTION: ClassVar[str] = "logging"

    interval: Annotated[int, Key("Interval between log lines.", "steps", POSITIVE)] = 1
    boards: Annotated[tuple[BoardConfig, ...], Key("Programs that show the metrics (`docs/boards.md`).")] = ()
    straggler_interval: Annotated[
        int, Key("Interval between reports of ranks that others wait for; 0: none.", "steps", NOT_NEGATIVE)
    ] = 100
    norms: Annotated[
        int,
        Key(
            "Interval between measurements of the norms of gradient, weights and update of every weight, and of "
            "activations; 0: none.",
            "steps",
            NOT_NEGATIVE,
        ),
    ] = 0
    trace_step: Annotated[
        int,
        Key("First step whose events every rank records in the run's folder; 0: none.", "steps", NOT_NEGATIVE),
    ] = 0
    trace_steps: Annotated[int, Key("Number of recorded steps.", "steps", POSITIVE)] = 1
    profile_ranks: Annotated[
        tuple[int, ...],
        Key(
            "Ranks that run torch's profiler for as many steps after the recorded ones.",
            sign=NOT_NEGATIVE,
            rule="Needs `trace_step`; each below the world size.",
        ),
    ] = ()
    check_finite: Annotated[bool, Key("Whether to look for the first layer that outputs NaN or infinity; slow.")] = (
        False
    )

    def check(self) -> None:
        names = [board.name for board in self.boards]
        if twice := [name for name in names if names.count(name) > 1]:
            raise self.broken(f"logging.boards has {twice[0]} twice; give each board once")
        if self.profile_ranks and not self.trace_step:
            raise self.broken(
                f"logging.profile_ranks = {list(self.profile_ranks)} requires logging.trace_step, the first step to "
                "record; set it, or leave out profile_ranks"
            )


NO_BOARDS = ("logging.boards=[]",)  # overrides that disable all metric boards
