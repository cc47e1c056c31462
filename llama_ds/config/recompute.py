"""What `parallel.recompute` may say: one save policy, one for each pipeline stage, a memory budget, or auto."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30
AUTO = "auto"  # as much as the device holds; `auto: 80 GiB` says how much that is
POLICIES = ("none", "selective", "full")  # from the most memory to the most computing
_AMOUNT = re.compile(r"(budget|auto): ?([0-9]+(?:\.[0-9]+)?) ?GiB")


@dataclass(frozen=True)
class Recompute:
    """Policies of the stages (one for all, or one each), the bytes that a rank's decoder layers may keep, or all that
    it has."""

    policies: tuple[str, ...] = ()
    budget_bytes: int | None = None
    device_bytes: int | None = None


def canonical(value: object) -> object:
    """Return the one text for the forms that YAML offers: ["none", "full"] -> "none,full", {budget: 4 GiB} likewise."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, dict) and list(value) in (["budget"], ["auto"]):
        ((key, amount),) = value.items()
        return f"{key}: {amount}"
    return value


def parse(text: str) -> Recompute | None:
    """Return what the canonical text says, None where it says nothing known."""
    if match := _AMOUNT.fullmatch(text):
        amount = int(float(match[2]) * GIB)
        return Recompute(budget_bytes=amount) if match[1] == "budget" else Recompute(device_bytes=amount)
    if text == AUTO:
        return Recompute()
    policies = tuple(policy.strip() for policy in text.split(","))
    return Recompute(policies) if all(policy in POLICIES for policy in policies) else None
