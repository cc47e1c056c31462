"""What `parallel.recompute` may say: one save policy, one for each pipeline stage, or a memory budget."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30
POLICIES = ("none", "selective", "full")  # from the most memory to the most computing
_BUDGET = re.compile(r"budget: ?([0-9]+(?:\.[0-9]+)?) ?GiB")


@dataclass(frozen=True)
class Recompute:
    """Policies of the stages (one for all, or one each), or the bytes that a rank's decoder layers may keep."""

    policies: tuple[str, ...] = ()
    budget_bytes: int | None = None


def canonical(value: object) -> object:
    """Return the one text for the forms that YAML offers: ["none", "full"] -> "none,full", {budget: 4 GiB} likewise."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, dict) and list(value) == ["budget"]:
        return f"budget: {value['budget']}"
    return value


def parse(text: str) -> Recompute | None:
    """Return what the canonical text says, None where it says nothing known."""
    if match := _BUDGET.fullmatch(text):
        return Recompute(budget_bytes=int(float(match[1]) * GIB))
    policies = tuple(policy.strip() for policy in text.split(","))
    return Recompute(policies) if all(policy in POLICIES for policy in policies) else None
