"""Values of `parallel.recompute`: one save policy, one for each pipeline stage, a memory budget, or auto."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30
AUTO = "auto"  # use all device memory; `auto: 80 GiB` gives its size
POLICIES = ("none", "selective", "full")  # by decreasing memory and increasing computation
_AMOUNT = re.compile(r"(budget|auto): ?([0-9]{1,7}(?:\.[0-9]{1,9})?) ?GiB")


@dataclass(frozen=True)
class Recompute:
    """Save policies (one for all stages, or one each), or a rank's byte budget for activations, or its memory size."""

    policies: tuple[str, ...] = ()
    budget_bytes: int | None = None
    device_bytes: int | None = None


def canonical(value: object) -> object:
    """Return YAML's forms as canonical text: ["none", "full"] -> "none,full", {budget: 4 GiB} -> "budget: 4 GiB"."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, dict) and list(value) in (["budget"], ["auto"]):
        ((key, amount),) = value.items()
        return f"{key}: {amount}"
    return value


def parse(text: str) -> Recompute | None:
    """Parse the canonical text; return None if it is invalid."""
    if match := _AMOUNT.fullmatch(text):
        amount = int(float(match[2]) * GIB)
        return Recompute(budget_bytes=amount) if match[1] == "budget" else Recompute(device_bytes=amount)
    if text == AUTO:
        return Recompute()
    policies = tuple(policy.strip() for policy in text.split(","))
    return Recompute(policies) if all(policy in POLICIES for policy in policies) else None
