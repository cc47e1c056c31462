"""Records steps of a run in its folder: traces of all ranks on one clock, and torch profiles of selected ranks.

The profiler slows its rank down, so it runs in additional steps that are not timed. Ranks compare clocks before and
after recording. Outside the recorded steps there is no overhead.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from llama_ds.config.schema import RunConfig
from llama_ds.job.trace_format import MARKER, MERGED_FILE, PROFILE_FILE, RANK_FILE
from llama_ds.layout.layout import Layout
from llama_ds.layout.pipeline_schedule import describe_trace
from llama_ds.log import logger, without_profiler_marks
from llama_ds.parallel import clock, world
from llama_ds.parallel.trace import Trace

_MARKERS = 8  # markers at each end; readers use the one that started soonest after its timestamp


class Recording:
    """One rank's recording of the steps from `logging.trace_step` on."""

    def __init__(
        self,
        run: RunConfig,
        layout: Layout,
        trace: Trace,
        rank_info: world.RankInfo,
        host: str,
        dtype: str,
        device: torch.device,
    ) -> None:
        """`host` is the name of this rank's host in reports."""
        self._settings, self._trace, self._rank = run.logging, trace, rank_info.rank
        self._folder = os.path.join(run.run_dir, "trace")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        about = {"host": host, "device": name, "dtype": dtype}
        self._about = {**describe_trace(run, layout, rank_info.rank), **about}
        self._cuda = device.type == "cuda"
        self._profile: profile | None = None
        self._clock: list[clock.Offset | None] = []

    def before_step(self, number: int) -> None:
        """Start recording if step `number`, counted from 1, is the first recorded one; then collective."""
        settings = self._settings
        if self._trace.recording and number == settings.trace_step + settings.trace_steps:
            self._start_profiler()
        if number != settings.trace_step:
            return
        if self._rank == 0:
            _clear(self._folder)
        self._clock = [clock.compare(self._rank)]
        self._trace.start(settings.trace_steps * (2 if settings.profile_ranks else 1))

    def _start_profiler(self) -> None:
        if self._rank in self._settings.profile_ranks:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            self._profile = profile(activities=activities, record_shapes=True)
            with without_profiler_marks():
                self._profile.start()
            _mark()
        world.barrier()

    def after_step(self) -> bool:
        """Write the recording if that was the last recorded step; return whether it was. Then collective."""
        if not self._trace.recording or self._trace.steps_left:
            return False
        self._write()
        return True

    def close(self) -> None:
        """Write a partial recording if the run ends before the last recorded step. Collective."""
        if self._trace.recording:
            self._write()

    def abandon(self) -> None:
        """End the profiler, of which a process can have one."""
        if self._profile:
            self._profile.stop()

    def _write(self) -> None:
        self._trace.stop()
        if self._profile:
            _mark()
            with without_profiler_marks():
                self._profile.stop()
        self._clock.append(clock.compare(self._rank))
        about: dict[str, Any] = {"first_step": self._settings.trace_step, "measured_steps": self._settings.trace_steps}
        about["clock"] = [point for point in self._clock if point]
        try:
            self._trace.write(self._folder, self._rank, **self._about, **about)
            if self._profile:
                self._profile.export_chrome_trace(os.path.join(self._folder, PROFILE_FILE.format(self._rank)))
        except OSError as error:  # a full disk must not end the run
            logger.warning("%s: rank %d could not write its record (%s)", self._folder, self._rank, error)
        self._profile = None
        world.barrier()
        logger.info("recorded steps from step %d on: %s", self._settings.trace_step, self._folder)


def _mark() -> None:
    """Mark the monotonic time in the profile, whose clock may differ."""
    for _ in range(_MARKERS):
        with record_function(f"{MARKER}{time.monotonic_ns()}"):
            pass


def _clear(folder: str) -> None:
    """Remove the files of an earlier recording, which may have had more ranks."""
    with suppress(OSError):
        for name in os.listdir(folder):
            digits = "".join(filter(str.isdigit, name))
            if name == MERGED_FILE or (digits and name in _names(int(digits))):
                os.unlink(os.path.join(folder, name))


def _names(rank: int) -> tuple[Any, ...]:
    return RANK_FILE.format(rank), PROFILE_FILE.format(rank)
