"""What an optimizer keeps of a weight: kinds and bytes of its states, by the weight's role.

Every state has the shape of its weight and is fp32. Kinds are DeepSpeed's and torch's names, as in checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llama_ds.layout.weights import Role

MASTER = "fp32"  # the weight that the optimizer updates; in fp32 runs the weight itself
EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
STATE_BYTES = 4


@dataclass(frozen=True)
class OptimizerStates:
    """The states of one optimizer."""

    moments: Mapping[Role, tuple[str, ...]]  # kinds beside the master

    def kinds(self, role: Role) -> tuple[str, ...]:
        """Return the kinds of state of a weight."""
        return (MASTER, *self.moments[role])

    def all_kinds(self) -> tuple[str, ...]:
        """Return the kinds of state that any weight has."""
        return tuple(dict.fromkeys(kind for role in self.moments for kind in self.kinds(role)))

    def nbytes(self, elements: Mapping[Role, int], weight_bytes: int) -> int:
        """Return the bytes of the states of so many elements by role, whose weights have `weight_bytes` each."""
        master = STATE_BYTES if weight_bytes < STATE_BYTES else 0
        return sum(n * (master + STATE_BYTES * len(self.moments[role])) for role, n in elements.items())


ADAMW = OptimizerStates(dict.fromkeys(Role, (EXP_AVG, EXP_AVG_SQ)))
