"""Sections of the run file about data: sources, their mixture, and rows to skip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from llama_ds.config.context_parallel import CP_METHODS
from llama_ds.config.declare import MOST_LENGTH, MOST_TOKENS, NOT_NEGATIVE, POSITIVE, Key, Section
from llama_ds.errors import did_you_mean

MIN_WEIGHT = 1e-6  # minimum weight of a source: the order holds a block of 1 / weight rows in memory


@dataclass(frozen=True)
class SourceConfig(Section):
    """One source of the data mixture."""

    SECTION: ClassVar[str] = "data.sources.N"

    name: Annotated[str, Key("Name of the source in reports and in `mixture`.", rule="No two sources share one.")]
    path: Annotated[
        str,
        Key(
            'Folder or URL (file, http(s), s3, gs, or "pipe:COMMAND {}") that holds the source\'s manifest.json; '
            "`{seq_len}` in it stands for the length of a row.",
            is_path=True,
        ),
    ]
    weight: Annotated[
        float,
        Key(
            "Share of the sampled rows.",
            rule="At least 1e-6, or 0 for a source that a later stage of `mixture` reads; the weights sum to 1.",
            most=1,
        ),
    ]
    epochs: Annotated[
        float | None,
        Key(
            "Expected passes over the source; null: any.",
            "epochs",
            rule="Positive; within 10 percent of what the run reads.",
            most=1e6,
        ),
    ] = None
    reread: Annotated[
        bool, Key("Whether a source that is new in a resumed run may hold rows that the run has read by another name.")
    ] = False


@dataclass(frozen=True)
class MixtureStage(Section):
    """Source weights that apply from a point of the run on."""

    SECTION: ClassVar[str] = "data.mixture.N"

    at_tokens: Annotated[
        int,
        Key(
            "Tokens trained before the stage; it begins with the first step at or after that count.",
            "tokens",
            rule="Above that of the previous stage, in a later step, and below `training.tokens`.",
            most=MOST_TOKENS,
        ),
    ]
    weights: Annotated[
        dict[str, float],
        Key("Share of each source, by name; an omitted source is not read.", rule="Each at least 1e-6; they sum to 1."),
    ]


@dataclass(frozen=True)
class RowStage(Section):
    """Steps of the run with rows of one length, as Llama 3 was trained (arXiv 2407.21783, section 3.4.2).

    All stages have the same tokens in a step. `training.global_batch` and `evaluation.rows` count the rows of one.
    """

    SECTION: ClassVar[str] = "data.stages.N"

    seq_len: Annotated[
        int,
        Key(
            "Length of a row in this stage.",
            "tokens",
            POSITIVE,
            rule="Not below that of the previous stage; divides the tokens of a step and of a validation.",
            most=MOST_LENGTH,
        ),
    ]
    until_step: Annotated[
        int | None,
        Key(
            "Steps of the run after which the stage ends; null: the end of the run.",
            "steps",
            POSITIVE,
            rule="Above that of the previous stage, below `training.steps`; null in the last stage only.",
        ),
    ] = None
    cp: Annotated[
        int | None,
        Key("Context-parallel size in this stage; null: `parallel.cp`.", "ranks", POSITIVE, most=1e4),
    ] = None
    cp_method: Annotated[
        str | None,
        Key("Method of context parallelism in this stage; null: `parallel.cp_method`.", choices=CP_METHODS),
    ] = None
    cp_all_to_all: Annotated[
        int | None,
        Key("Ranks of a group in this stage; null: `parallel.cp_all_to_all`.", "ranks", NOT_NEGATIVE, most=1e4),
    ] = None
    micro_batch: Annotated[
        int | None,
        Key("Rows per micro-batch in this stage; null: `parallel.micro_batch`.", "rows", POSITIVE, most=1e6),
    ] = None


@dataclass(frozen=True)
class BatchStage(Section):
    """First steps of the run with a smaller batch than later ones (batch-size warm-up).

    It ends after a number of steps or of tokens. Steps count optimizer steps, as those of the learning rate do.
    """

    SECTION: ClassVar[str] = "training.batch_stages.N"

    global_batch: Annotated[
        int,
        Key(
            "Rows (sequences) per optimizer step in this stage.",
            "rows",
            POSITIVE,
            rule="Above that of the previous stage; divisible by data-parallel size * `parallel.micro_batch`.",
        ),
    ]
    until_step: Annotated[
        int | None,
        Key(
            "Steps of the run after which the stage ends.",
            "steps",
            POSITIVE,
            rule="Above that of the previous stage, below `training.steps`. A stage has this or `until_tokens`.",
        ),
    ] = None
    until_tokens: Annotated[
        int | None,
        Key(
            "Tokens of the run after which the stage ends: with the first step that reaches them.",
            "tokens",
            POSITIVE,
            rule="The resolved run has `until_step` instead.",
            most=MOST_TOKENS,
        ),
    ] = None

    def check(self) -> None:
        if self.until_step is not None and self.until_tokens is not None:
            raise self.broken(
                f"training.batch_stages has a stage with until_step = {self.until_step} and until_tokens = "
                f"{self.until_tokens}; keep one"
            )


@dataclass(frozen=True)
class SkipConfig(Section):
    """Rows that the run skips, for example after a loss spike (PaLM, arXiv 2204.02311, section 5.1)."""

    SECTION: ClassVar[str] = "data.skip.N"

    at_step: Annotated[
        int,
        Key("Steps of the run before the skip.", "steps", rule="Above the previous entry; below `training.steps`."),
    ]
    steps: Annotated[
        int,
        Key(
            "Length of the skip: step `at_step`, counted from 0, reads the rows scheduled this many steps later.",
            "steps",
            rule="Positive.",
        ),
    ]


@dataclass(frozen=True)
class DataConfig(Section):
    """Training data."""

    SECTION: ClassVar[str] = "data"

    tokenizer: Annotated[
        str,
        Key(
            "Path of the tokenizer: a sentencepiece model, a tokenizer.json, or Llama 3's tokenizer.model.",
            is_path=True,
        ),
    ]
    seq_len: Annotated[
        int,
        Key(
            "Length of a row.",
            "tokens",
            POSITIVE,
            rule="Divisible by `parallel.tp` under sequence parallelism.",
            most=MOST_LENGTH,
        ),
    ]
    sources: Annotated[tuple[SourceConfig, ...], Key("Sources of the mixture.", rule="At least one.")]
    mixture: Annotated[tuple[MixtureStage, ...], Key("Changes of the sources' weights during the run.")] = ()
    skip: Annotated[
        tuple[SkipConfig, ...], Key("Rows to skip, ordered by `at_step`; a resumed run keeps its past skips.")
    ] = ()
    document_mask: Annotated[bool, Key("Whether attention stops at document boundaries within a packed row.")] = False
    document_tokens: Annotated[
        tuple[int, ...],
        Key(
            "Lengths of documents, each equally frequent, that plans of a run with `document_mask` count; empty: each "
            "row is one document. Training does not read them.",
            "tokens",
            most=MOST_LENGTH,
        ),
    ] = ()
    cache_dir: Annotated[
        str,
        Key(
            "Folder on every node's own disk for shards of sources that are URLs.",
            rule="Required for URLs.",
            is_path=True,
        ),
    ] = ""
    cache_gib: Annotated[
        float, Key("Size of `cache_dir`; the least recently used shards are evicted.", "GiB", POSITIVE, most=1e6)
    ] = 64.0
    deadline_s: Annotated[
        float,
        Key(
            "Time for which failed requests for a shard are retried before it counts as damaged.",
            "seconds",
            POSITIVE,
            most=1e6,
        ),
    ] = 300.0
    check_interval: Annotated[
        int,
        Key("Interval at which ranks compare the rows they read and agree on damaged shards.", "steps", POSITIVE),
    ] = 100
    max_bad_shards: Annotated[
        int, Key("Damaged shards that are replaced by others before the run stops.", "shards", NOT_NEGATIVE)
    ] = 16
    stages: Annotated[
        tuple[RowStage, ...],
        Key("Stages with longer and longer rows; empty: all rows are of `seq_len`, otherwise that of the first stage."),
    ] = ()

    def check(self) -> None:
        if not self.sources:
            raise self.broken("data.sources is empty; name at least one source with name, path and weight")
        names = [source.name for source in self.sources]
        later = {name for stage in self.mixture for name in stage.weights}
        for i, source in enumerate(self.sources):
            if not source.name:
                raise self.broken(f'data.sources.{i}.name = "" is empty; write a name')
            if names.index(source.name) < i:
                raise self.broken(
                    f"data.sources.{i}.name = {source.name!r} is also source {names.index(source.name)}'s"
                )
            if source.weight or source.name not in later:  # weight 0 is valid for a source of a later mixture stage
                _check_weight(self, f"data.sources.{i}.weight", source.weight)
            if source.epochs is not None and not source.epochs > 0:
                raise self.broken(f"data.sources.{i}.epochs = {source.epochs} is not positive")
        _check_sum(self, "data.sources", [source.weight for source in self.sources])
        for i, length in enumerate(self.document_tokens):
            if length < 1:
                raise self.broken(f"data.document_tokens.{i} = {length} is not positive; give the tokens of a document")
        for i, stage in enumerate(self.mixture):
            key = f"data.mixture.{i}.weights"
            for name, weight in stage.weights.items():
                if name not in names:
                    raise self.broken(f"{key}.{name} is not one of data.sources{did_you_mean(name, names)}")
                _check_weight(self, f"{key}.{name}", weight)
            _check_sum(self, key, list(stage.weights.values()))


def _check_weight(data: DataConfig, key: str, weight: float) -> None:
    if not weight >= MIN_WEIGHT:
        raise data.broken(f"{key} = {weight} is below {MIN_WEIGHT:g}; leave the source out")


def _check_sum(data: DataConfig, key: str, weights: list[float]) -> None:
    total = math.fsum(weights)
    if abs(total - 1) > 1e-6:
        shown = " + ".join(f"{weight:g}" for weight in weights)
        raise data.broken(f"{key}: the weights {shown} sum to {total:.6g}, not 1; divide each by {total:.6g}")
