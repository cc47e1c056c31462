"""Updates that precede the global gradient norm: what they changed is kept until the norm confirms them.

Ranks of a pipeline end a step one after the other, and only the last one completes the norm. A rank that does not wait
for it begins the next step's forwards (Qi et al., arXiv 2401.10241, section 4, call it post-validation). The update is
final if the norm is finite and does not clip. Otherwise it is undone and repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llama_ds.parallel.clipping import grad_scale


class OptimisticSteps:
    """The unconfirmed step of one rank, and whether the next one will probably not be clipped.

    Decisions depend on global norms alone, so that all ranks make the same ones.
    """

    def __init__(self, clip: float) -> None:
        """`clip` is the norm to which gradients are clipped."""
        self._clip = clip
        self._last: Tensor | None = None  # summary of the last step if nobody has read its norm
        self._clipped = True  # before any step there are no states that could be restored
        self._summary: Tensor | None = None
        self._work: Any = None
        self._before: list[tuple[Tensor, Tensor]] = []  # states and their copies

    @property
    def pending(self) -> bool:
        """Whether an update awaits its norm."""
        return self._summary is not None

    def expects_success(self) -> bool:
        """Return whether the step before was not clipped. The host waits for that step if it was not optimistic."""
        assert not self.pending
        if self._last is not None:
            self._clipped, self._last = self._clips(self._last[1]), None
        return not self._clipped

    def doubt(self) -> None:
        """Expect the next step to be clipped."""
        self._last, self._clipped = None, True

    def certain(self, summary: Tensor) -> None:
        """Note the (loss, norm) of a step that waited."""
        self._last = summary

    def begin(self, summary: Tensor, work: Any, states: Sequence[Tensor]) -> None:
        """Keep copies of `states` until `work` has summed the (loss, squared norm) of all ranks."""
        self._summary, self._work = summary, work
        self._before = [(state, state.clone()) for state in states]

    def end(self) -> tuple[Tensor, bool]:
        """Wait for the norm; return (loss, norm), and whether the update stands."""
        summary = self._summary
        assert summary is not None
        self._work.wait()
        summary[1].sqrt_()
        self._clipped = self._clips(summary[1])
        self._summary = self._work = None
        if not self._clipped:
            self._before = []
        return summary, not self._clipped

    def restore(self) -> None:
        """Undo the update."""
        states, copies = zip(*self._before, strict=True)
        torch._foreach_copy_(list(states), list(copies))
        self._before = []

    def _clips(self, norm: Tensor) -> bool:
        return float(grad_scale(norm, self._clip)) != 1.0  # also if it is not a number
