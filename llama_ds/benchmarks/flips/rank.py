"""One rank: `python -m llama_ds.benchmarks.flips.rank REQUEST.json FOLDER`, with RANK etc. set.

A small run in bf16 with ZeRO-1, one replica a rank, takes a step for each flip, with all checks of
`training/step_checks.py`. What a check finds is written down, and the step is taken all the same; then all states are
as before. Steps without flips follow.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama_ds.benchmarks.flips.request import SITES, STORED, Flip, FlipRequest
from llama_ds.benchmarks.flips.sites import flipped
from llama_ds.benchmarks.flips.stored import StoredStates
from llama_ds.benchmarks.ranks import joined
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.run_file import find_run_file, load_run
from llama_ds.config.schema import RunConfig
from llama_ds.errors import Corruption
from llama_ds.layout.layout import resolve_layout
from llama_ds.parallel import world
from llama_ds.parallel.optimizer_state import flat_states
from llama_ds.parallel.whole_gradients import whole_gradients
from llama_ds.training.engines.build import build_engine
from llama_ds.training.step_checks import StepChecks

LAYERS, VOCAB, TOKENS, RATE = 2, 128, 32, 1e-3
CPU = torch.device("cpu")
MODEL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CHECKS = {"compare_replicas": 1, "compare_repeats": 1, "compare_norms": "true", "compare_states": "true"}


class RecordedChecks(StepChecks):
    """Checks that write down what they find instead of raising it."""

    found: Corruption | None = None
    after: Callable[[str], None] | None = None
    gradients: list[torch.Tensor]  # those of the last update, or of the one that was refused

    def examine(self) -> None:
        self.found = None
        if self.after:
            self.after("reduction")
        try:
            super().examine()
        except Corruption as error:
            self.found = error
        if self.after:
            self.after("checks")
        self.gradients = [gradient.double() for gradient in whole_gradients(self._engine.deepspeed)]

    def _checked(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super()._checked(*arguments, **options)
        except Corruption as error:
            self.found = self.found or error
            optimizer = self._engine.deepspeed.optimizer
            optimizer.clear_hp_grads()
            optimizer.clear_lp_grads()


class Trials:
    """The run and its checks."""

    def __init__(self, request: FlipRequest, folder: Path, rank: int) -> None:
        self._rank, self._run = rank, small_run(request.ranks, folder)
        layout = resolve_layout(self._run, request.ranks)
        config = deepspeed_config(self._run, layout, bf16_native=True)
        self._engine = build_engine(self._run, layout, config, CPU)
        hosts = [f"node{number}" for number in range(request.ranks)]
        self._checks = RecordedChecks(self._run, layout, self._engine, rank, hosts, CPU)
        self._rows = np.random.default_rng((request.seed, rank))
        self._row: np.ndarray
        self._step, self._saved = 0, list[torch.Tensor]()
        for _ in range(3):
            self.step()
        self._stored = StoredStates(self._run, layout, self._engine.deepspeed, rank, request.ranks, folder)
        self._save()

    def trial(self, flip: Flip) -> dict[str, Any]:
        """Flip a bit; return what has been found. Collective."""
        if flip.site in STORED:
            found = world.gather(self._stored.trial(flip) if self._rank == flip.rank else "")[flip.rank]
            return {**asdict(flip), "found": found, "ranks": [flip.rank] if found else [], "norm": 0.0}
        flips = flipped(self._engine, flip, self._step % LAYERS, LAYERS)
        with flips if self._rank == flip.rank else nullcontext() as self._checks.after:
            norm, _ = self.step()
        self._checks.after = None
        error, gradients = self._checks.found, self._checks.gradients
        self._restore()
        result = {**asdict(flip), "found": str(error or ""), "ranks": list(error.ranks) if error else [], "norm": norm}
        return result if error else result | {"change": self._change(gradients)[flip.rank]}

    def step(self) -> tuple[float, list[str]]:
        """Take a step on random rows; return the gradient norm, and what the checks report. Collective."""
        self._step += 1
        self._row = self._rows.integers(0, VOCAB, (1, TOKENS + 1))
        norm = self._take()
        return norm, self._checks.lines()

    def _take(self) -> float:
        self._checks.before_step(self._step)
        return self._engine.read(self._engine.train_step(iter([self._row]), RATE))[1]

    def _change(self, gradients: list[torch.Tensor]) -> list[float]:
        """Take the last step again, without a flip; return by how much the gradients of all ranks differ from its own.

        Relative to its norm. Collective.
        """
        self._take()
        intact = self._checks.gradients
        self._restore()
        apart = [one - other for one, other in zip(gradients, intact, strict=True)]
        return world.gather(_norm(apart) / _norm(intact))

    @property
    def found(self) -> Corruption | None:
        """What the checks of the last step found."""
        return self._checks.found

    def _save(self) -> None:
        self._saved = [tensor.clone() for tensor in self._tensors()]

    def _restore(self) -> None:
        for tensor, saved in zip(self._tensors(), self._saved, strict=True):
            tensor.data.copy_(saved)
        self._checks.after_step()

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self._engine.deepspeed.module.parameters()
        yield from flat_states(self._engine.deepspeed)


def _norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat([tensor.view(-1) for tensor in tensors])))


def small_run(ranks: int, folder: Path) -> RunConfig:
    """Return the run."""
    (folder / "tokenizer.model").write_bytes(b"of no meaning here")
    changes = {
        **{f"model.{key}": value for key, value in MODEL.items()},
        **{f"checkpoint.{key}": value for key, value in CHECKS.items()},
        **{"parallel.pp": 1, "parallel.tp": 1, "parallel.sequence_parallel": "false", "parallel.micro_batch": 1},
        **{"training.global_batch": ranks, "parallel.recompute": "none", "data.seq_len": TOKENS, "evaluation.rows": 0},
        **{"output_dir": str(folder), "data.tokenizer": str(folder / "tokenizer.model")},
    }
    return load_run(find_run_file("quickstart"), [f"{key}={value}" for key, value in changes.items()])


def drawn(request: FlipRequest) -> list[Flip]:
    """Return the flips, the same on every rank, one at each site in turn."""
    draw = np.random.default_rng(request.seed)
    flips = []
    for _ in range(request.flips):
        for site in SITES:
            rank, bit = int(draw.integers(request.ranks)), int(draw.integers(32))
            flips.append(Flip(site, rank, float(draw.random()), float(draw.random()), bit))
    return flips


def main() -> None:
    """Make all trials and take the clean steps; rank 0 writes found.json."""
    with joined(FlipRequest) as (request, folder, rank):
        trials = Trials(request, folder, rank)
        begin = time.monotonic()

        def in_time() -> bool:
            """Return whether rank 0 has time left. Collective."""
            return not request.seconds or bool(world.gather(time.monotonic() - begin < request.seconds)[0])

        found = []
        for number, flip in enumerate(drawn(request)):
            if number % len(SITES) == 0 and not in_time():
                break
            found.append(trials.trial(flip))
        flipping_s = time.monotonic() - begin
        alarms, reports, norms = [], [], list[float]()
        while len(norms) < request.clean and (len(norms) % len(SITES) or in_time()):
            norm, lines = trials.step()
            norms.append(norm)
            reports += lines
            if trials.found is not None:
                alarms.append(str(trials.found))
        clean_s = time.monotonic() - begin - flipping_s
        result = {"trials": found, "alarms": alarms, "reports": reports, "clean": len(norms)}
        result |= {"flipping_s": flipping_s, "clean_s": clean_s}
        assert all(map(math.isfinite, norms))
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
