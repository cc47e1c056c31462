"""Tasks on a model folder of any format on several ranks: an engine is built, and filled from the model's files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from llama_ds.checkpoint.load_model import run_of
from llama_ds.checkpoint.manifest import DESCRIPTION, describe
from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.config import rules
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.schema import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError
from llama_ds.evaluation.evaluate import Journal, Work
from llama_ds.evaluation.one_process import opened, results_of, subject_of
from llama_ds.evaluation.scoring import Scorer
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.log import logger
from llama_ds.parallel import world
from llama_ds.parallel.temporary import dismantle, engines_undone
from llama_ds.training.checkpoints import Checkpoints
from llama_ds.training.engines.build import build_engine
from llama_ds.training.engines.scoring import EngineBackend
from llama_ds.training.held_weights import fill_weights

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is evaluated; None: as the run that trained it."""

    dtype: str | None = None  # bf16 or fp32, for weights and computation
    rows: int = 8  # rows in a forward pass
    tokenizer: str | None = None  # its path
    pp: int | None = None
    tp: int | None = None
    cp: int = 1


class EvaluationJob:
    """The ranks of an evaluation. The engine is refilled for every model, and built anew where rows get longer."""

    def __init__(self, settings: EvaluationSettings, rank_info: world.RankInfo) -> None:
        self._settings, self._rank_info = settings, rank_info
        self._engines = ExitStack()  # not a `with`: after an error, the ranks of a job that fails close no groups
        self._engine: Any = None
        self._checkpoints: Checkpoints | None = None
        self._run: RunConfig | None = None
        self._layout: Layout | None = None

    def evaluate(
        self,
        path: str,
        works: Sequence[Work],
        journal: str | None,
        tick: Callable[[int], object] = lambda requests: None,
    ) -> dict[str, Any]:
        """Return on every rank what `evaluate_folder` returns. Collective.

        Raises:
            UserError: on all ranks: the model cannot be read, or its layout does not suit the number of ranks.
        """
        files, tokenizer = self._opened(path)
        dtype = self._settings.dtype or files.dtype
        first = self._rank_info.rank == 0
        kept = world.together(
            lambda: Journal(journal, subject_of(files, tokenizer, dtype)) if first else Journal(None, {})
        )
        kept.share(world.gather)
        return results_of(self._scorer(files, tokenizer, dtype), files, dtype, works, kept, tick)

    def scorer(self, path: str) -> Scorer:
        """Return a scorer of the model at `path`, until the next model is opened. Collective; errors as `evaluate`."""
        files, tokenizer = self._opened(path)
        return self._scorer(files, tokenizer, self._settings.dtype or files.dtype)

    def _opened(self, path: str) -> tuple[ModelFiles, Tokenizer]:
        return world.together(lambda: opened(path, self._settings.tokenizer))

    def _scorer(self, files: ModelFiles, tokenizer: Tokenizer, dtype: str) -> Scorer:
        self._fill(files, tokenizer, dtype)
        assert self._run is not None and self._layout is not None
        return Scorer(EngineBackend(self._engine, self._run, self._layout, tokenizer.marks), tokenizer)

    def once(self, work: Callable[[], T]) -> T:
        """Return on every rank what `work` returns on the first, the only one that does it. Collective.

        Raises:
            UserError: on all ranks, if `work` does.
        """

        def on_first() -> T | None:
            try:
                return work() if self._rank_info.rank == 0 else None
            except OSError as error:
                raise UserError(str(error)) from None

        return world.gather(world.together(on_first))[0]  # type: ignore[return-value]

    def _fill(self, files: ModelFiles, tokenizer: Tokenizer, dtype: str) -> None:
        # Another stage of a run (`data.stages`) has longer rows.
        if self._engine and self._run and files.seq_len != self._run.data.seq_len:
            dismantle(self._engine.deepspeed)
            self._engine = self._checkpoints = None
            self._engines.close()
        if self._engine is None:
            self._engines.enter_context(engines_undone())
            run, self._layout = world.together(lambda: self._layout_of(files, tokenizer, dtype))
            device = world.device()
            config = deepspeed_config(run, self._layout, world.computes_bf16(device))
            self._run = run
            layout = self._layout
            self._engine = world.together(
                lambda: build_engine(run, layout, config, device, tokenizer.marks, trains=False)
            )
            if run.zero_stage == 3:  # the layers are gathered from the optimizer's parts
                self._checkpoints = Checkpoints(run, layout, dtype, self._rank_info)
            logger.info("evaluating %s under %s, ZeRO-%d, %s", files.path, layout.words(), run.zero_stage, dtype)
        assert self._layout is not None and self._run is not None
        if self._checkpoints:
            self._checkpoints.start_from(self._engine.deepspeed, files.tensors)
        else:
            fill_weights(self._engine.deepspeed, files.tensors, self._layout.tp, files.path)

    def _layout_of(self, files: ModelFiles, tokenizer: Tokenizer, dtype: str) -> tuple[RunConfig, Layout]:
        run = evaluation_run(files, tokenizer.path, dtype, self._settings, self._rank_info.world)
        rules.check(run)
        return run, resolve_layout(run, self._rank_info.world)


def evaluation_run(
    files: ModelFiles, tokenizer: str, dtype: str, settings: EvaluationSettings, ranks: int
) -> RunConfig:
    """Return a run whose engine evaluates a model: with the layout of the run that trained it, or the one given.

    It has schedule 1f1b, which for forwards is as good as any, and nothing of training that costs memory.
    """
    parallel, zero3 = ParallelConfig(), False
    if os.path.exists(os.path.join(files.path, DESCRIPTION)):
        trained = run_of(files.path, describe(files.path))
        own = trained.parallel
        parallel = ParallelConfig(pp=own.pp, tp=own.tp)
        zero3 = trained.zero_stage == 3
    pp, tp = settings.pp or parallel.pp, settings.tp or parallel.tp
    zero = 3 if zero3 and pp == 1 else 1
    batch = max(1, ranks // (pp * tp * settings.cp)) * settings.rows
    return RunConfig(
        name="evaluation",
        seed=0,
        output_dir="unused",
        model=files.model,
        data=DataConfig(
            tokenizer, files.seq_len, (SourceConfig("none", "unused", 1.0),), document_mask=files.document_mask
        ),
        training=TrainingConfig(batch, 1, batch * files.seq_len),
        optimizer=OptimizerConfig(lr=1.0, warmup_steps=0),
        parallel=replace(parallel, pp=pp, tp=tp, cp=settings.cp, micro_batch=settings.rows),
        evaluation=EvaluationConfig(rows=0),
        checkpoint=CheckpointConfig(save=False, start_from=files.path),
        deepspeed={"zero_optimization": {"stage": zero}, "bf16": {"enabled": dtype == "bf16"}},
        path=files.path,
    )
