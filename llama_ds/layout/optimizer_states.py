"""Optimizer states of a weight, kinds and bytes, by the weight's role.

Every state is fp32 and has the shape of its weight. The kinds have the names that DeepSpeed and torch use in
checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llama_ds.layout.weights import Role

MASTER = "fp32"  # the master weight; in fp32 runs it is the weight itself
EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
STATE_BYTES = 4


@dataclass(frozen=True)
class OptimizerStates:
    """The states of one optimizer."""

    moments: Mapping[Role, tuple[str, ...]]  # kinds other than the master weight

    def kinds(self, role: Role) -> tuple[str, ...]:
        """Return the kinds of state of a weight with this role."""
        return (MASTER, *self.moments[role])

    def all_kinds(self) -> tuple[str, ...]:
        """Return the kinds of state that any weight has."""
        return tuple(dict.fromkeys(kind for role in self.moments for kind in self.kinds(role)))

    def nbytes(self, elements: Mapping[Role, int], weight_bytes: int) -> int:
        """Return the bytes of all states of weights with this many elements by role, stored in `weight_bytes` each."""
        master = STATE_BYTES if weight_bytes < STATE_BYTES else 0
        return sum(n * (master + STATE_BYTES * len(self.moments[role])) for role, n in elements.items())


ADAMW = OptimizerStates(dict.fromkeys(Role, (EXP_AVG, EXP_AVG_SQ)))
MUON = OptimizerStates({**ADAMW.moments, Role.HIDDEN_MATRIX: (EXP_AVG,)})  # its momentum
LION = OptimizerStates(dict.fromkeys(Role, (EXP_AVG,)))
_BY_NAME = {"adamw": ADAMW, "muon": MUON, "lion": LION}


def states_of(optimizer: str) -> OptimizerStates:
    """Return the states of an optimizer by its name in a run file (`optimizer.name`)."""
    return _BY_NAME[optimizer]
