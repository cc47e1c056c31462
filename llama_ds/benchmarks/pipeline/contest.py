"""The definition of a contest: the schedules to time, and the run and layout of each."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llama_ds.benchmarks.ranks import check_links
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError, listed
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.schedules.schedule import IN_A_V
from llama_ds.schedules.zero_bubble_v import V_SCHEDULES

EARLY = "early"
VIRTUAL_STAGES = {"interleaved": 2, **dict.fromkeys(IN_A_V, 2)}
# Keys of the run file that are set for each schedule, and what to do instead of overriding them. Other overrides hold.
_ROWS = "use --dp, --micro-batches and --micro-batch"
_SET = {
    **{f"parallel.{name}": f"use --{name.replace('_', '-')}" for name in ("pp", "tp", "micro_batch", "recompute")},
    **{f"parallel.{name}": "use --schedules" for name in ("schedule", "virtual_stages")},
    "parallel.extra_warmup": "use --schedules NAME+N",
    "parallel.post_validation": f"use --schedules NAME:{EARLY}",
    "parallel.pass_times": "use --pass-times",
    "parallel.cp": "leave it out, because ranks share no rows here",
    "training.global_batch": _ROWS,
    "training.batch_stages": _ROWS,
    "deepspeed.bf16": "use --dtype",
    "deepspeed.fp16": "use --dtype",
    **{name: f"override single keys, as {name}.KEY=VALUE" for name in ("parallel", "training", "deepspeed")},
}


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
        check_links(self.rate_mbit, self.delay_ms)
        _check_overrides(self.overrides)
        plain, _, early = schedule.partition(":")
        name, _, extra = plain.partition("+")
        if early not in ("", EARLY) or not re.fullmatch(r"\d*", extra):
            raise UserError(
                f"--schedules: {schedule!r} is not a schedule's name, +N for extra_warmup and :{EARLY} for "
                "post_validation, such as zb_v+2:early"
            )
        if self.pass_times and not any(re.split("[+:]", each)[0] in V_SCHEDULES for each in self.schedules):
            raise UserError(
                f"--pass-times {' '.join(map(str, self.pass_times))}: orders {listed(V_SCHEDULES)}, and --schedules "
                "names none of them; leave it out"
            )
        parallel = {
            "pp": self.pp,
            "tp": self.tp,
            "micro_batch": self.micro_batch,
            "recompute": self.recompute,
            "schedule": name,
            "extra_warmup": int(extra or 0),
            "virtual_stages": VIRTUAL_STAGES.get(name, 1),
            "pass_times": self.pass_times if name in V_SCHEDULES else None,
            "post_validation": early == EARLY,
        }
        deepspeed = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": self.dtype == "bf16"}}
        settings = {
            "parallel": parallel,
            "training.global_batch": self.dp * self.micro_batches * self.micro_batch,
            "deepspeed": deepspeed,
        }
        own = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        run = replace(load_run(self.run_file, [*own, *self.overrides]), path="command line")
        return run, resolve_layout(run, self.world)


def _check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError for an override of a key that is set for each schedule."""
    for override in overrides:
        key = override.partition("=")[0]
        section, _, name = key.partition(".")
        fix = _SET.get(f"{section}.{name.partition('.')[0]}" if name else section)
        if fix:
            raise UserError(f"command line: {override} would not hold: each schedule sets {key}; {fix}")
