"""Lets a data-parallel peer compute a layer's work on a micro-batch again (`parallel/layer_replay.py`).

The layer and the peer change from check to check. All ranks of a tensor- or context-parallel group replay the same
layer, for the same ranks of another replica. Without replicas each rank computes its own layer again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_ds.errors import Corruption
from llama_ds.layout.layout import Layout
from llama_ds.log import logger
from llama_ds.model.decoder import DecoderLayer
from llama_ds.parallel import world
from llama_ds.parallel.fingerprints import SIZE
from llama_ds.parallel.layer_replay import RESULTS, Given, LayerRecord, exchange, replay
from llama_ds.training.engines.interface import Engine
from llama_ds.training.rank_names import ADVICE, named
from llama_ds.training.replay_verdict import Difference, differences, exact_kinds, wrong_ranks


class LayerCheck:
    """One of the checks of `training/step_checks.py`."""

    def __init__(
        self, interval: int, layout: Layout, engine: Engine, rank: int, hosts: Sequence[str], device: torch.device
    ) -> None:
        """`interval` is that between checks in steps; `hosts` are the names of all ranks' hosts in messages."""
        self._interval, self._hosts, self._device = interval, hosts, device
        self._rank, self._context = rank, engine.context
        module: Any = engine.deepspeed.module
        self._layers = [part for part in module.modules() if isinstance(part, DecoderLayer)]
        self._groups = layout.groups("dp")
        self.exact: np.ndarray | None = None  # whether the machines repeat each kind of result bit for bit
        self._step = 0
        self._record: LayerRecord | None = None
        self._sources: list[int] = []  # the rank whose layer each rank computes again
        self._given: tuple[Given, Given] | None = None  # this rank's, the other's

    def before_step(self, step: int) -> None:
        """Record a layer if a check is due in the step that will be the `step`-th."""
        self._step = step
        if step % self._interval == 0 and self._layers:
            self._record = LayerRecord(self._layer, self._context)

    def numbers(self) -> Tensor | None:
        """Return fingerprints of this rank's own results and of another's, computed again: (2, 3, 6). Collective."""
        if self._step % self._interval:
            return None
        self._sources = self._shifted(self._shift)
        if self._record is None:  # a stage without decoder layers
            return torch.zeros(2, len(RESULTS), SIZE, dtype=torch.int64, device=self._device)
        record, self._record = self._record, None
        record.close()
        own = record.given
        source, to = self._sources[self._rank], self._sources.index(self._rank)
        self._given = own, own if source == self._rank else exchange(own, to, source)
        return torch.stack([record.results, self._again(1)])

    def judge(self, every: np.ndarray) -> list[str]:
        """Compare what `numbers` returned on all ranks, (R, 36). Collective.

        Raises:
            Corruption: on all ranks alike: results differ.
        """
        own, again = firsts = _results(every)
        if self.exact is None:
            (repeated,) = self._gathered(0)
            self.exact = exact_kinds(own, repeated)
            for name, exact in zip(RESULTS, self.exact, strict=True):
                if not exact:
                    logger.info("checkpoint.compare_repeats: this machine does not repeat the %s to the bit", name)
        found = differences(own, again, self._sources, self.exact)
        if found:
            wrong = wrong_ranks(found, firsts, self._gathered(0, 1), self._thirds(), self.exact)
            raise Corruption(
                f"CORRUPTION: in step {self._step} {self._difference(found[0])}; {named(wrong, self._hosts)} computed "
                f"wrongly; the step is not taken; {ADVICE}",
                wrong,
                good_step=self._step - 1,
            )
        self._given = None
        return []

    def after_step(self) -> None:
        """Do nothing: the step's own results are compared."""

    @property
    def _number(self) -> int:
        return self._step // self._interval - 1

    @property
    def _layer(self) -> DecoderLayer:
        return self._layers[self._number % len(self._layers)]

    @property
    def _shift(self) -> int:
        replicas = len(self._groups[0])
        return 1 + self._number % (replicas - 1) if replicas > 1 else 0

    def _shifted(self, shift: int) -> list[int]:
        """Return the rank `shift` replicas before each rank."""
        of = {rank: group[at - shift] for group in self._groups for at, rank in enumerate(group)}
        return [of[rank] for rank in sorted(of)]

    def _thirds(self) -> np.ndarray | None:
        """Return each rank's own results as a third replica computes them: (R, 3, 6). Collective."""
        replicas = len(self._groups[0])
        if replicas < 3:
            return None
        sources = self._shifted(1 + self._shift % (replicas - 1))
        prints = torch.zeros(len(RESULTS), SIZE, dtype=torch.int64, device=self._device)
        if self._given is not None:
            given = exchange(self._given[0], sources.index(self._rank), sources[self._rank])
            prints = replay(self._layer, self._context, given)
        (computed,) = _results(world.gather_numbers(prints.view(-1).tolist(), self._device))
        return computed[[sources.index(rank) for rank in range(len(sources))]]

    def _again(self, which: int) -> Tensor:
        """Compute again what this rank's layer was given (0), or the other's (1)."""
        if self._given is None:
            return torch.zeros(len(RESULTS), SIZE, dtype=torch.int64, device=self._device)
        return replay(self._layer, self._context, self._given[which])

    def _gathered(self, *which: int) -> list[np.ndarray]:
        prints = torch.stack([self._again(number) for number in which])
        return _results(world.gather_numbers(prints.view(-1).tolist(), self._device))

    def _difference(self, one: Difference) -> str:
        by = "" if one.owner == one.peer else f" by {named([one.peer], self._hosts)}"
        what = f"the {RESULTS[one.kind]} of a decoder layer on {named([one.owner], self._hosts)}"
        return f"{what} is not the same when computed again{by}"


def _results(every: np.ndarray) -> list[np.ndarray]:
    """Return fingerprints (R, 3, 6), one array for each 18 of the integers (R, n * 18) of all ranks."""
    return list(every.reshape(len(every), -1, len(RESULTS), SIZE).swapaxes(0, 1))
