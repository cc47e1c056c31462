"""The reports of a run: results of steps, validation losses, data read, notes.

On CUDA, and with `parallel.post_validation`, the result of a step is read while the next step runs, because reading it
synchronises. Otherwise it is read at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from llama_ds.config.batch_stages import tokens_before
from llama_ds.config.schema import RunConfig
from llama_ds.errors import Divergence, shortened
from llama_ds.evaluation.evaluate import TaskResult, in_words, metrics_of
from llama_ds.evaluation.validation import ValidationLoss, total
from llama_ds.job.heartbeat import Progress
from llama_ds.job.run_end import RunEnd
from llama_ds.training.engines.interface import Engine, StepResult
from llama_ds.training.meter import Meter, StepMetrics
from llama_ds.training.norm_lines import NormLines, plotted
from llama_ds.training.run_log import RunLog
from llama_ds.training.samples import Sample


@dataclass(frozen=True)
class _UnreadStep:
    """A step whose result is deferred."""

    step: int  # number of finished steps
    lr: float
    result: StepResult


class Reporter:
    """Reads and measures the results of steps on all ranks; the first rank writes the reports."""

    def __init__(
        self, run: RunConfig, engine: Engine, meter: Meter, log: RunLog | None, progress: Progress, device: torch.device
    ) -> None:
        """`log` receives the reports and is None on all ranks but the first; `progress` receives every loss."""
        self._run, self._engine, self._meter, self._log, self._progress = run, engine, meter, log, progress
        self._norms = NormLines(run, engine)
        self._defers = device.type == "cuda" or run.parallel.post_validation
        self._unread: _UnreadStep | None = None

    def before_step(self, step: int) -> None:
        """Prepare what is measured within the step that will be the `step`-th."""
        self._norms.before_step(step)

    def step_done(self, step: int, lr: float, result: StepResult, last: bool) -> None:
        """Report the deferred result, if any; then defer the result of this step or report it at once. Collective.

        `step` is the number of finished steps. Only the last step and every `logging.interval`-th step are reported.

        Raises:
            Divergence: the loss that was read is not finite.
        """
        self.flush()
        self._norms.after_step(step, result)
        if last or step % self._run.logging.interval == 0:
            self._unread = _UnreadStep(step, lr, result)
            if last or not self._defers:
                self.flush()

    def flush(self) -> None:
        """Report the deferred result now, if there is one. Collective.

        Raises:
            Divergence: see `step_done`.
        """
        line = self._norms.take()
        if line and self._log:  # before the loss, which may end the run
            self._log.record(line, dict(plotted(line["norms"])))
        if self._unread:
            unread, self._unread = self._unread, None
            self._report(unread)

    def _report(self, unread: _UnreadStep) -> None:
        loss, norm = self._engine.read(unread.result)
        self._progress.tell(what="loss", step=unread.step, loss=loss)
        metrics = self._meter.measure(unread.step, loss, unread.lr, norm)
        if self._log:
            values = asdict(metrics)
            if metrics.cp_imbalance is None:
                del values["cp_imbalance"]
            self._log.record(values)
            self._log.print_line(console_line(metrics, self._run.training.steps))
            self._log.advance(unread.step)
        if not math.isfinite(loss):
            raise Divergence(_divergence(self._run, unread.step, loss))

    def restart_clock(self, step: int) -> None:
        """Restart the timing after `step`, so that the time since then does not count as part of a step."""
        self._meter.restart(step)

    def validation(self, step: int, losses: Mapping[str, ValidationLoss]) -> None:
        """Report the validation loss in nats per token, its perplexity, and bits per byte; of several sources each."""
        if not self._log:
            return
        every = total(losses.values())
        self._log.print_line(f"step {step} | validation loss {_in_words(every)} | perplexity {every.perplexity:.2f}")
        curves, counts = {"val_loss": every.loss, "val_perplexity": every.perplexity}, {}
        parts = {"": every}
        for name, one in losses.items() if len(losses) > 1 else ():
            parts[f"/{name}"] = one
            curves[f"val_loss/{name}"] = one.loss
            self._log.print_line(f"step {step} | validation loss of {name} {_in_words(one)}")
        for suffix, one in parts.items():
            counts[f"val_tokens{suffix}"] = one.labels
            if one.bits_per_byte is not None:
                curves[f"bits_per_byte{suffix}"] = one.bits_per_byte
        self._log.record({"step": step, **curves, **counts}, curves)

    def tasks(self, step: int, results: Sequence[TaskResult]) -> None:
        """Report the accuracies of benchmarks, with their standard errors and the shares of the right choices."""
        if self._log:
            values = {"step": step, "tasks_tokens": tokens_before(self._run, step), **metrics_of(results)}
            self._log.record(values)
            self._log.print_line(f"step {step} | {in_words(results)}")

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Report continuations of prompts."""
        if self._log:
            self._log.record_samples(step, samples)
            for one in samples:
                self._log.print_line(f"step {step} | {shortened(repr(one.prompt))} -> {shortened(repr(one.text))}")

    def consumed(self, step: int, sources: dict[str, tuple[int, float]]) -> None:
        """Report how much of each source has been read: (rows, epochs) by name."""
        if self._log:
            seq_len = self._run.data.seq_len
            tokens = {f"tokens/{name}": rows * seq_len for name, (rows, _) in sources.items()}
            self._log.record(
                {"step": step, **tokens, **{f"epochs/{name}": epochs for name, (_, epochs) in sources.items()}}
            )
            shares = (
                f"{name} {rows * seq_len:,} tokens, {epochs:.3f} epochs" for name, (rows, epochs) in sources.items()
            )
            self._log.print_line(f"step {step} | read {'; '.join(shares)}")

    def notes(self, lines: Iterable[str]) -> None:
        """Report events, on the console only."""
        if self._log:
            for line in lines:
                self._log.print_line(line)

    def warnings(self, lines: Iterable[str]) -> None:
        """Report ranks that others wait for, or whose gradients are unlike others'."""
        if self._log:
            self._log.warn(lines)

    def close(self, end: RunEnd) -> None:
        """Close files and the progress bar; tell boards how the run ends."""
        if self._log:
            self._log.close(end)


def console_line(metrics: StepMetrics, total: int) -> str:
    """Return the console line for a step of a run of `total` steps."""
    remaining = (total - metrics.step) * metrics.step_s
    utilisation = "" if metrics.mfu is None else f" | MFU {metrics.mfu:.1%}"
    imbalance = "" if metrics.cp_imbalance is None else f" | cp imbalance {metrics.cp_imbalance:.2f}"
    return (
        f"step {metrics.step}/{total} | loss {metrics.loss:.4f} | lr {metrics.lr:.2e} | norm {metrics.grad_norm:.3f}"
        f" | {metrics.tokens_per_s:,.0f} tok/s | {metrics.tokens_per_s_per_gpu:,.0f} tok/s/GPU{utilisation}"
        f"{imbalance} | mem {metrics.peak_mem_gib:.2f} GiB | ETA {_duration(remaining)}"
    )


def _in_words(loss: ValidationLoss) -> str:
    bits = "" if loss.bits_per_byte is None else f" | {loss.bits_per_byte:.4f} bits per byte"
    return f"{loss.loss:.4f}{bits} | {loss.labels:,} tokens"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02d}h" if days else f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _divergence(run: RunConfig, step: int, loss: float) -> str:
    """Return the error message for a non-finite loss."""
    return (
        f"{run.path}: loss is {loss} at step {step}, the run has diverged; lower optimizer.lr {run.optimizer.lr:g}, "
        f"lengthen optimizer.warmup_steps {run.optimizer.warmup_steps}, and start from the last checkpoint"
    )
