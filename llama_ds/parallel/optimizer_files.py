"""DeepSpeed's optimizer files, read group by group: which rank holds a layer may differ from when they were written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.checkpoint.constants import BASE_OPTIMIZER_STATE, OPTIMIZER_STATE_DICT, SINGLE_PARTITION_OF_FP32_GROUPS


def gather_groups(paths: Iterable[str], names: Sequence[str]) -> dict[str, Any]:
    """Return a BF16_Optimizer state with the groups `names`, in that order, from the first files that have them.

    Files are mapped, not read: only what is wanted costs time and memory.

    Raises:
        LookupError: a group that no file has.
    """
    found: dict[str, tuple[dict, dict, torch.Tensor]] = {}
    rest: dict[str, Any] = {}
    for path in paths:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)[OPTIMIZER_STATE_DICT]
        rest = rest or saved
        base = saved[BASE_OPTIMIZER_STATE]
        for group, master in zip(base["param_groups"], saved[SINGLE_PARTITION_OF_FP32_GROUPS], strict=True):
            found.setdefault(group["name"], (group, base["state"].get(group["params"][0], {}), master))
        if all(name in found for name in names):
            break
    missing = [name for name in names if name not in found]
    if missing:
        raise LookupError(f"no optimizer state of {', '.join(missing)}")
    chosen = [found[name] for name in names]
    return {
        **rest,
        BASE_OPTIMIZER_STATE: {
            "state": {i: _own_memory(state) for i, (_, state, _) in enumerate(chosen)},
            "param_groups": [{**group, "params": [i]} for i, (group, _, _) in enumerate(chosen)],
        },
        SINGLE_PARTITION_OF_FP32_GROUPS: [master for _, _, master in chosen],
    }


def _own_memory(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
