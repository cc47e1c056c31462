"""Effective training time of a run that tools/launch.py started: which phase, and which failure, took the time.

The effective training time is the time in which the ranks computed steps that are still part of the run. It excludes
steps that were computed again after a restart, waiting for data, saves, evaluations, and everything between a failure
and the first step after it. Its share is taken of the time in which jobs ran; time between two jobs of a run does not
count. Llama 3 (arXiv 2407.21783, section 3.3.4) and ByteRobust (arXiv 2509.16293) define the same ratio, useful
training time over elapsed time. Neither says whether it counts waiting for data.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llama_ds.experiments.attempts import AS_ASKED, FAILURES, Mark, RecordedAttempt, attempts_of
from llama_ds.experiments.records import Curve, Records

TRAINING, DATA_WAIT, LOST, FIRST_STEP = "training", "data wait", "lost steps", "first step"
DETECT, LEAVE, END, HOSTS, PAUSE = "detect", "leave", "end", "hosts", "pause"
RENDEZVOUS, RESTORE = "rendezvous", "restore"
PHASES = {  # in the order of reports, with their meaning
    TRAINING: "steps that are part of the run: the effective training time",
    DATA_WAIT: "steps wait for data (data_wait_s of metrics.jsonl)",
    "saving": "checkpoints, as far as they block the training",
    "evaluating": "validation loss",
    "tasks": "benchmarks and samples during the run",
    "ending": "from the last step to the exit",
    LOST: "steps that were computed again after a restart, and the unfinished step of a failure",
    DETECT: "from the last sign of life of the failed rank until the ranks are ended",
    LEAVE: "ranks without a fault leave the step, to go on as the same processes (--keep-ranks)",
    END: "ending all other ranks on all hosts",
    HOSTS: "waiting for unreachable ranks, checking and choosing hosts",
    PAUSE: "the pause before a restart (--backoff-s)",
    RENDEZVOUS: "from the start of the ranks or their launcher until all ranks have connected",
    RESTORE: "process groups, engines, loading the checkpoint",
    FIRST_STEP: "the first step of an attempt, as far as it takes longer than the median step",
}


@dataclass(frozen=True)
class TimeSpan:
    """A time that belongs to one phase; `cause` is the kind of the failure that it is due to, "" for none."""

    start: float
    end: float
    phase: str
    cause: str = ""

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class CauseTotals:
    """What one kind of failure has cost."""

    count: int = 0
    lost_steps: int = 0
    seconds: float = 0.0  # all spans due to it, lost steps included


@dataclass(frozen=True)
class Goodput:
    """The accounts of a run. Times are seconds."""

    name: str
    jobs: int
    attempts: int
    spans: Sequence[TimeSpan]
    phases: Mapping[str, float]
    causes: Mapping[str, CauseTotals]
    lost_steps: int
    incidents: Sequence[RecordedAttempt]  # attempts that ended otherwise than as asked
    strikes: Mapping[str, float]  # by host, decayed
    running_s: float  # time from the starts of attempts to their failures
    gpu_days: float  # the same times the ranks
    step_time_s: float  # sum of the times of the run's steps by metrics.jsonl, a check of `phases`
    recoveries: Sequence[float]  # times from a failure to the first step after it, in the same job
    unmarked: int  # attempts whose ranks joined but that have no progress events
    damaged: Mapping[str, int] = field(default_factory=dict)  # unreadable lines by file

    @property
    def wall_s(self) -> float:
        return sum(self.phases.values())

    @property
    def effective(self) -> float:
        """The share of effective training time."""
        return self.phases.get(TRAINING, 0.0) / self.wall_s if self.wall_s else 0.0

    @property
    def failures(self) -> int:
        """Failures that count for the MTBF."""
        return sum(attempt.kind in FAILURES for attempt in self.incidents)

    @property
    def mtbf_s(self) -> float | None:
        """Mean time between failures, None before the first one."""
        return self.running_s / self.failures if self.failures else None

    @property
    def median_recovery_s(self) -> float | None:
        """Median time from a failure to the first step after it, None without one."""
        return statistics.median(self.recoveries) if self.recoveries else None

    def sliding(self, window_s: float) -> float:
        """Return the share of effective training time in the last `window_s` seconds of the jobs' time."""
        effective = total = 0.0
        for span in reversed(self.spans):
            seconds = min(span.seconds, window_s - total)
            total += seconds
            effective += seconds if span.phase == TRAINING else 0.0
            if total >= window_s:
                break
        return effective / total if total else 0.0


def goodput(run: Records, half_life_s: float) -> Goodput:
    """Return the accounts of a run; a host's strike counts half after `half_life_s` seconds.

    Steps of the last attempt count as kept until another attempt shows the step from which it resumes.
    """
    attempts, jobs, wrong = attempts_of(run.events)
    kept = _kept(attempts)
    steps_s, wait_s, step_s = _by_metrics(run.curves)
    by_job, lost = defaultdict[str, list[TimeSpan]](list), list[int]()
    cause = before = ""
    for attempt, until in zip(attempts, kept, strict=True):
        cause = cause if attempt.job == before else ""
        before = attempt.job
        by_job[attempt.job] += [span for span in _spans(attempt, until, cause, step_s) if span.seconds > 0]
        done = attempt.marks[-1].step if attempt.marks else 0
        first = attempt.marks[0].step if attempt.marks else 0
        lost.append(max(done - max(until, first), 0))
        cause = attempt.kind if attempt.kind not in AS_ASKED else ""
    spans = _with_data_wait([span for job in by_job.values() for span in job], wait_s)
    phases = {name: sum(span.seconds for span in spans if span.phase == name) for name in PHASES}
    incidents = [attempt for attempt in attempts if attempt.kind and attempt.kind not in AS_ASKED]
    now = max((end for _, end in jobs.values()), default=0.0)
    running = [(max(a.stopped - a.started, 0.0), a.world) for a in attempts if a.started is not None]
    damaged = dict(run.damaged) | ({"events with values of a wrong type": wrong} if wrong else {})
    return Goodput(
        name=run.name,
        jobs=len(jobs),
        attempts=len(attempts),
        spans=spans,
        phases={name: seconds for name, seconds in phases.items() if seconds},
        causes=_causes(attempts, lost, spans),
        lost_steps=sum(lost),
        incidents=incidents,
        strikes=strikes(incidents, now, half_life_s),
        running_s=sum(seconds for seconds, _ in running),
        gpu_days=sum(seconds * world for seconds, world in running) / 86400,
        step_time_s=steps_s,
        recoveries=[seconds for job in by_job.values() for seconds in _recoveries(job)],
        unmarked=sum(a.joined is not None and not a.marks for a in attempts),
        damaged=damaged,
    )


def strikes(incidents: Sequence[RecordedAttempt], now: float, half_life_s: float) -> dict[str, float]:
    """Return each host's failures, each of which counts half as much after every half-life; most first."""
    found: defaultdict[str, float] = defaultdict(float)
    for attempt in incidents:
        for host in attempt.hosts if attempt.kind in FAILURES else ():
            found[host] += 0.5 ** ((now - attempt.ended) / half_life_s)
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _kept(attempts: Sequence[RecordedAttempt]) -> list[int]:
    """Return the step up to which each attempt's steps are kept: the least one at which a later attempt starts."""
    kept, until = list[int](), 2**62
    for attempt in reversed(attempts):
        kept.append(until)
        if attempt.marks:
            until = min(until, attempt.marks[0].step)
    return kept[::-1]


def _by_metrics(curves: Mapping[str, Curve]) -> tuple[float, float, float]:
    """Return the total time of the run's steps by metrics.jsonl, their total wait for data and the median step time."""
    times, waits = curves.get("step_s", Curve((), ())), curves.get("data_wait_s", Curve((), ()))
    counts = [max(step - before, 0) for before, step in zip((0, *times.steps), times.steps, strict=False)]
    total = sum(count * seconds for count, seconds in zip(counts, times.values, strict=True))
    wait = sum(count * seconds for count, seconds in zip(counts, waits.values, strict=False))
    return total, wait, statistics.median(times.values) if times.values else 0.0


def _spans(attempt: RecordedAttempt, until: int, cause: str, step_s: float) -> Iterator[TimeSpan]:
    """Yield the spans of an attempt in order; those before its first step are due to the failure before, `cause`."""
    own = attempt.kind if attempt.kind not in AS_ASKED else ""
    stopped = attempt.stopped
    at = attempt.begun
    points = list[tuple[str, float | None]]()
    if attempt.restart:
        points += [(HOSTS, attempt.restart[0]), (PAUSE, sum(attempt.restart))]
    points += [(RENDEZVOUS, attempt.started), (RENDEZVOUS, attempt.joined)]
    points += [(RESTORE, attempt.marks[0].time if attempt.marks else None)]
    phase = RENDEZVOUS
    for phase, time in points:
        if time is None:
            break
        time = min(max(time, at), stopped)
        yield TimeSpan(at, time, phase, cause)
        at = time
    if not attempt.marks:
        yield TimeSpan(at, stopped, phase, cause or own)
    else:
        marks = [replace(mark, time=min(max(mark.time, at), stopped)) for mark in attempt.marks]
        for number, (before, mark) in enumerate(itertools.pairwise(marks)):
            yield from _between(before, mark, until, (cause, own), step_s if number == 0 else None)
        last = max(marks[-1].time, at)
        yield TimeSpan(last, stopped, LOST if own else "ending", own)
    killing = min(max(attempt.killing or attempt.ended, stopped), max(attempt.ended, stopped))
    leaving = min(max(attempt.leaving or killing, stopped), killing)
    yield TimeSpan(stopped, leaving, DETECT if own else END, own)
    yield TimeSpan(leaving, killing, LEAVE, own)
    yield TimeSpan(killing, max(attempt.ended, killing), END, own)


def _between(
    before: Mark, mark: Mark, until: int, causes: tuple[str, str], first_s: float | None
) -> Iterator[TimeSpan]:
    """Yield the spans between two marks: other phases, the excess of the first step, kept steps, lost steps.

    Args:
        until: the step up to which steps are kept.
        causes: the failure before the attempt, and the one that ends it.
        first_s: for the first two marks, the usual time of a step; else None.
    """
    steps, left = mark.step - before.step, mark.time - before.time
    at = before.time
    for name, seconds in mark.seconds.items():
        seconds = min(seconds, left)
        phase = "tasks" if name == "more_tasks" else name
        yield TimeSpan(at, at + seconds, phase if phase in PHASES else RESTORE)
        at, left = at + seconds, left - seconds
    if first_s is not None:
        excess = max(left - max(steps, 0) * first_s, 0.0) if first_s else left
        yield TimeSpan(at, at + excess, FIRST_STEP, causes[0])
        at, left = at + excess, left - excess
    share = min(max((until - before.step) / steps, 0.0), 1.0) if steps > 0 else float(until > before.step)
    yield TimeSpan(at, at + left * share, TRAINING)
    yield TimeSpan(at + left * share, mark.time, LOST, causes[1])


def _with_data_wait(spans: Sequence[TimeSpan], wait_s: float) -> list[TimeSpan]:
    """Return the spans with the wait for data taken out of each training span, in proportion to its length."""
    total = sum(span.seconds for span in spans if span.phase == TRAINING)
    share = min(wait_s / total, 1.0) if total else 0.0
    if not share:
        return list(spans)
    found = list[TimeSpan]()
    for span in spans:
        if span.phase == TRAINING:
            begin = span.end - share * span.seconds
            found += [replace(span, end=begin), replace(span, start=begin, phase=DATA_WAIT)]
        else:
            found.append(span)
    return found


def _causes(
    attempts: Sequence[RecordedAttempt], lost: Sequence[int], spans: Sequence[TimeSpan]
) -> dict[str, CauseTotals]:
    found: defaultdict[str, CauseTotals] = defaultdict(CauseTotals)
    for attempt, steps in zip(attempts, lost, strict=True):
        if attempt.kind and attempt.kind not in AS_ASKED:
            one = found[attempt.kind]
            found[attempt.kind] = replace(one, count=one.count + 1, lost_steps=one.lost_steps + steps)
    for span in spans:
        if span.cause:
            one = found[span.cause]
            found[span.cause] = replace(one, seconds=one.seconds + span.seconds)
    return dict(sorted(found.items(), key=lambda pair: -pair[1].seconds))


def _recoveries(job: Sequence[TimeSpan]) -> Iterator[float]:
    """Yield the time from each failure of a job to the first step after it; none if the job gave up."""
    current = 0.0
    for span in job:
        if span.cause and span.phase != LOST:
            current += span.seconds
        elif span.phase == TRAINING and current:
            yield current
            current = 0.0
