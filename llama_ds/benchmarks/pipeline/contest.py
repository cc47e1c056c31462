"""The definition of a contest: the schedules to time, and the run and layout of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from llama_ds.config.rules import check
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import ParallelConfig, RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.schedules.schedule import IN_A_V
from llama_ds.schedules.zero_bubble_v import V_SCHEDULES

EARLY = "early"
VIRTUAL_STAGES = {"interleaved": 2, **dict.fromkeys(IN_A_V, 2)}


@dataclass(frozen=True)
class Contest:
    """The run, the schedules to compare, and the ranks and links."""

    run_file: str
    overrides: list[str]
    schedules: list[str]  # zb_v+2:early: with extra_warmup 2 and post_validation
    pp: int
    tp: int
    dp: int
    micro_batches: int  # number per rank
    micro_batch: int  # rows
    dtype: str
    recompute: str
    rate_mbit: float | None  # bandwidth of a link in each direction; None: loopback
    delay_ms: float
    repeats: int
    pass_times: list[int] | None = None  # zero-bubble Vs only
    steps: int = 1  # steps of a turn, whose results are read at its end
    pace: list[float] | None = None  # milliseconds of a rank's forward, input and weight backward; None: as computed

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.pp * self.tp * self.dp

    def contestant(self, schedule: str) -> tuple[RunConfig, Layout]:
        """Return the run and layout for one schedule.

        Raises:
            UserError: there is no such schedule, or it does not support these sizes.
        """
        if self.pace and len(self.pace) != 3:
            raise UserError(f"--pace: {len(self.pace)} numbers; give 3, of forward, input and weight backward, in ms")
        run = load_run(self.run_file, self.overrides)
        plain, _, early = schedule.partition(":")
        name, _, extra = plain.partition("+")
        if early not in ("", EARLY) or not re.fullmatch(r"\d*", extra):
            raise UserError(
                f"--schedules: {schedule!r} is not a schedule's name, +N for extra_warmup and :{EARLY} for "
                "post_validation, such as zb_v+2:early"
            )
        parallel = ParallelConfig(
            pp=self.pp,
            tp=self.tp,
            micro_batch=self.micro_batch,
            recompute=self.recompute,
            schedule=name,
            extra_warmup=int(extra or 0),
            virtual_stages=VIRTUAL_STAGES.get(name, 1),
            pass_times=tuple(self.pass_times) if self.pass_times and name in V_SCHEDULES else None,
            post_validation=early == EARLY,
        )
        run = replace(
            run,
            training=replace(run.training, global_batch=self.dp * self.micro_batches * self.micro_batch),
            parallel=parallel,
            deepspeed={"zero_optimization": {"stage": 1}, "bf16": {"enabled": self.dtype == "bf16"}},
            path="command line",
        )
        check(run)
        return run, resolve_layout(run, self.world)
