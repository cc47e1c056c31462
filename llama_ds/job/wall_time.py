"""The time limit of a job, counted from the job's start: the start of its ranks and all restarts belong to it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from llama_ds.config.schema import CheckpointConfig
from llama_ds.job.folder import current

SCRIPTS = ("train.py", "launch.py")
SLURM_START = "SLURM_JOB_START_TIME"  # seconds since the epoch, from Slurm 22.05 on


@dataclass(frozen=True)
class JobStart:
    """When a job began."""

    at: float  # seconds since the epoch
    what: str  # what began then


def job_start(environ: Mapping[str, str]) -> JobStart:
    """Return when this process's job began: tools/launch.py, the Slurm job, or the command that started the ranks."""
    job = current(environ)
    if job and job.started:
        return JobStart(job.started, "the start of the job by tools/launch.py")
    if (slurm := environ.get(SLURM_START, "")).isdecimal():
        return JobStart(float(slurm), f"the start of Slurm job {environ.get('SLURM_JOB_ID', '')}")
    return JobStart(_command_start(), "the start of the command")


def seconds_left(settings: CheckpointConfig, start: JobStart) -> float | None:
    """Return the seconds until a job should save and end; None without a limit."""
    if not settings.wall_time_s:
        return None
    return start.at + settings.wall_time_s - settings.wall_time_margin_s - time.time()


def _command_start() -> float:
    """Return the start time of the earliest process above this one whose command line names one of SCRIPTS.

    That is the launcher, which starts its ranks again after a failure (torchrun --max-restarts).
    """
    own = psutil.Process()
    began = own.create_time()
    try:
        for process in own.parents():
            if not any(os.path.basename(word) in SCRIPTS for word in process.cmdline()):
                break
            began = process.create_time()
    except psutil.Error:  # a process of another user, or one that has just ended
        pass
    return began
