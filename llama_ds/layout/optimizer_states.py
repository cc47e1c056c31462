"""Optimizer states of a weight, kinds and bytes, by the weight's role.

Every state has the shape of its weight and is fp32, or bf16 where the run asks for it. The kinds have the names that
DeepSpeed and torch use in checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from llama_ds.config.schema import OptimizerConfig
from llama_ds.layout.weights import Role

MASTER = "fp32"  # the master weight; in fp32 runs, and with masters in bf16, it is the weight itself
EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
COMPENSATION = "compensation"  # what a bf16 master lacks of the exact weight (Kahan)
FP32_BYTES, BF16_BYTES = 4, 2
CHUNK = 4 << 20  # elements that are updated at once: temporaries of 16 MiB each


@dataclass(frozen=True)
class OptimizerStates:
    """The states of one optimizer."""

    moments: Mapping[Role, tuple[str, ...]]  # kinds other than the master weight
    bf16: frozenset[str] = frozenset()  # kinds that are bf16

    def kinds(self, role: Role) -> tuple[str, ...]:
        """Return the kinds of state of a weight with this role."""
        return (MASTER, *self.moments[role])

    def all_kinds(self) -> tuple[str, ...]:
        """Return the kinds of state that any weight has."""
        return tuple(dict.fromkeys(kind for role in self.moments for kind in self.kinds(role)))

    def nbytes(self, elements: Mapping[Role, int], weight_bytes: int) -> int:
        """Return the bytes of all states of weights with this many elements by role, stored in `weight_bytes` each."""
        master = 0 if weight_bytes == self.state_bytes(MASTER) else FP32_BYTES
        return sum(n * (master + sum(map(self.state_bytes, self.moments[role]))) for role, n in elements.items())

    def dtype_name(self, kind: str) -> str:
        """Return torch's name of the dtype of a kind."""
        return "bfloat16" if kind in self.bf16 else "float32"

    def state_bytes(self, kind: str) -> int:
        """Return the bytes of an element of a kind."""
        return BF16_BYTES if kind in self.bf16 else FP32_BYTES


ADAMW = OptimizerStates(dict.fromkeys(Role, (EXP_AVG, EXP_AVG_SQ)))
MUON = OptimizerStates({**ADAMW.moments, Role.HIDDEN_MATRIX: (EXP_AVG,)})  # its momentum
LION = OptimizerStates(dict.fromkeys(Role, (EXP_AVG,)))
_BY_NAME = {"adamw": ADAMW, "muon": MUON, "lion": LION}


def states_of(settings: OptimizerConfig) -> OptimizerStates:
    """Return the states of a run's optimizer."""
    return states_by_name(settings.name, settings.state_dtype, settings.masters)


def states_by_name(name: str, state_dtype: str = "fp32", masters: str = "fp32") -> OptimizerStates:
    """Return the states for the values of `optimizer.name`, `state_dtype` and `masters` in a run file."""
    found = _BY_NAME[name]
    if masters == "bf16_kahan":
        found = replace(found, moments={role: (*kinds, COMPENSATION) for role, kinds in found.moments.items()})
    own = [EXP_AVG] * (state_dtype == "bf16") + [MASTER, COMPENSATION] * (masters != "fp32")
    return replace(found, bf16=frozenset(own))
