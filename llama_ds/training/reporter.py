"""Where metrics go: a line on the console with a progress bar on terminals, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from llama_ds.errors import UserError
from llama_ds.log import logger
from llama_ds.training.meter import StepMetrics


class Reporter:
    """Reports of the first rank; on the others every call does nothing."""

    def __init__(self, run_dir: str, total_steps: int, first_step: int, active: bool, tensorboard: bool) -> None:
        self.total = total_steps
        self.active = active
        self._board: Any = None
        if not active:
            return
        os.makedirs(run_dir, exist_ok=True)
        path = os.path.join(run_dir, "metrics.jsonl")
        forget_after(path, first_step)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by close)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty())
        if tensorboard:
            self._board = _tensorboard(os.path.join(run_dir, "tensorboard"), first_step)

    def step(self, metrics: StepMetrics) -> None:
        """Report one log line."""
        if not self.active:
            return
        self._record(asdict(metrics))
        self._say(console_line(metrics, self.total))
        self._bar.update(metrics.step - self._bar.n)

    def validation(self, step: int, loss: float) -> None:
        """Report a validation loss in nats per token, and its perplexity."""
        if not self.active:
            return
        self._record({"step": step, "val_loss": loss, "val_perplexity": math.exp(loss)})
        self._say(f"step {step} | validation loss {loss:.4f} | perplexity {math.exp(loss):.2f}")

    def consumed(self, step: int, sources: dict[str, tuple[int, float]], seq_len: int) -> None:
        """Report what has been read of each source: (rows, epochs)."""
        if not self.active:
            return
        values = {f"tokens/{name}": rows * seq_len for name, (rows, _) in sources.items()}
        self._record({"step": step, **values, **{f"epochs/{name}": epochs for name, (_, epochs) in sources.items()}})
        shares = (f"{name} {rows * seq_len:,} tokens, {epochs:.3f} epochs" for name, (rows, epochs) in sources.items())
        self._say(f"step {step} | read {'; '.join(shares)}")

    def note(self, text: str) -> None:
        """Report something that happened, on the console only."""
        if self.active:
            self._say(text)

    def close(self) -> None:
        """Finish files and the bar."""
        if not self.active:
            return
        self._bar.close()
        with suppress(OSError):  # what a full disk did not take was warned of
            self._file.close()
        if self._board:
            self._board.close()

    def _say(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def _record(self, values: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(values) + "\n")
        except OSError as error:  # a full disk ends no run
            logger.warning("METRICS LOST: step %s: %s (%s); the run goes on", values["step"], self._file.name, error)
        if self._board:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, values["step"])


def console_line(metrics: StepMetrics, total: int) -> str:
    """Return the one line that a person watches."""
    remaining = (total - metrics.step) * metrics.step_s
    utilisation = "" if metrics.mfu is None else f" | MFU {metrics.mfu:.1%}"
    return (
        f"step {metrics.step}/{total} | loss {metrics.loss:.4f} | lr {metrics.lr:.2e} | norm {metrics.grad_norm:.3f}"
        f" | {metrics.tokens_per_s:,.0f} tok/s | {metrics.tokens_per_s_per_gpu:,.0f} tok/s/GPU{utilisation}"
        f" | mem {metrics.peak_mem_gib:.2f} GiB | ETA {_duration(remaining)}"
    )


def forget_after(path: str, step: int) -> None:
    """Drop lines of steps after `step`: a run resumed there will write them again."""
    if not os.path.exists(path):
        return
    with open(path) as file:
        lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
    with open(path + ".tmp", "w") as file:
        file.writelines(lines)
    os.replace(path + ".tmp", path)


def _tensorboard(folder: str, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "logging.tensorboard = true: the tensorboard package is not installed; "
            "install the [tensorboard] extra or set logging.tensorboard=false"
        ) from None
    return SummaryWriter(folder, purge_step=first_step + 1)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02d}h" if days else f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
