"""Engines one after the other in the processes of one job."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import Mock, patch

from llama_ds.parallel.temporary import engines_undone


class Series:
    """Engines that a rank builds in turn, each without what the last one left behind.

    A gloo group has a thread that wakes up a hundred times a second. Without the end of each engine's groups, a rank
    that has built forty spends most of its time in their threads.
    """

    def __init__(self, freeze: Mock) -> None:
        self._freeze, self._built = freeze, 0
        self._threads: list[int] = []

    @contextmanager
    def engine(self) -> Iterator[None]:
        """Undo what the one engine built inside leaves; dismantle it inside. Collective."""
        with engines_undone():
            yield
            self._built += 1
            # Without it DeepSpeed's collections of garbage walk all that is imported.
            assert self._freeze.call_count == self._built, "an engine's build does not freeze what is imported"
        self._threads.append(len(os.listdir("/proc/self/task")))
        # DeepSpeed's own pipeline, once it has loaded or saved a state, is held with its groups until the process ends.
        assert self._threads[-1] <= self._threads[0] + 20, f"threads left after each engine: {self._threads}"


@contextmanager
def engines_in_turn() -> Iterator[Series]:
    """Freeze what is imported once: to thaw it for each engine's end costs 0.2 s."""
    gc.freeze()
    with patch.object(gc, "freeze") as freeze, patch.object(gc, "unfreeze"):
        yield Series(freeze)
