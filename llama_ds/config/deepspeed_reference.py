"""Generates docs/deepspeed_json.md, the reference of the DeepSpeed JSON, from the tables of keys."""

from __future__ import annotations

import json
import sys

from llama_ds.config.deepspeed_effects import EVERY, SECTIONS, USES, is_aliased
from llama_ds.config.deepspeed_keys import OWNED, REMOVED, REMOVED_ZERO

_INTRODUCTION = """\
# DeepSpeed JSON

<!-- Generated from llama_ds/config/deepspeed_effects.py and deepspeed_keys.py by `docs/deepspeed_json.py`. -->

The run file's key `deepspeed` names this file or holds its content. Here is every key that DeepSpeed 0.19.8 reads, and
what it does in this project; a test compares the tables with DeepSpeed's own configuration classes. DeepSpeed ignores
unknown keys and many known ones. Here an unknown key is an error, a key that would have no effect is too, unless it has
DeepSpeed's default, and each error is one line with exit code 2, before training begins.

`ds_configs/zero1_bf16.json` is a file to start from:

    {"zero_optimization": {"stage": 1}, "bf16": {"enabled": true}}

## fp16

`fp16.enabled: true` is refused. fp16 needs a loss scale, which DeepSpeed adapts while it trains: it skips steps that
overflow, and when that happens depends on the layout, because sums in another order overflow at other steps. A run on
another number of ranks would then skip other steps, so its losses would differ by more than rounding, and neither a
resume under another layout nor the comparison of layouts could be checked. bf16 has the range of fp32 and needs no
scale: use `bf16.enabled: true` on Ampere and newer GPUs. On older ones (V100, T4), which have no fast bf16, use
`"auto"`, which trains in fp32 there. For the same reason sums and messages in fp16 are refused (`data_types`,
`communication_data_type`).
"""
_PASSED = """\
## Keys that work

*Works with* lists ZeRO stages of runs with `parallel.pp` 1 (1-bf16 is ZeRO-1 in bf16 without offload, which DeepSpeed
trains by another optimizer than ZeRO-1 in fp32), and pp for `parallel.pp` > 1. With `parallel.schedule: deepspeed`, the
stages apply to `parallel.pp` > 1 too. Elsewhere the key is refused. `(stage3_)` marks keys that DeepSpeed also knows by
a name with that prefix.

| key | default | works with | what it does |
|---|---|---|---|"""
_REFUSED = """\
## Keys that are refused

These have no use here, or would break a promise of this project. DeepSpeed's default is accepted.

| key | default | why |
|---|---|---|"""
_OWNED = """\
## Keys that are set elsewhere

Each is refused whatever its value, with all keys in it.

| key | instead |
|---|---|"""
_REMOVED = """\
## Keys that DeepSpeed 0.19 has removed

"""


def reference() -> str:
    """Return the text of docs/deepspeed_json.md."""
    cells = {key: f"{_key(key)} {_default(use.default)} |" for key, use in USES.items()}
    passed = [f"{cells[key]} {_works(use.works_in)} | {use.does} |" for key, use in USES.items() if use.works_in]
    refused = [f"{cells[key]} {use.does} |" for key, use in USES.items() if not use.works_in]
    owned = [f"| `{key}` | {instead} |" for key, instead in OWNED.items()]
    removed = sorted([*REMOVED, *(f"zero_optimization.{key}" for key in REMOVED_ZERO)])
    tables = [_PASSED, *passed, "", _REFUSED, *refused, "", _OWNED, *owned, ""]
    return "\n".join([_INTRODUCTION, *tables, _REMOVED + ", ".join(f"`{key}`" for key in removed), ""])


def documented_keys() -> set[str]:
    """Return all keys that the page names: dotted in sections that are passed on, top-level otherwise."""
    removed = {*REMOVED, *(f"zero_optimization.{key}" for key in REMOVED_ZERO)}
    return {*USES, *OWNED, *SECTIONS, *removed}


def _key(key: str) -> str:
    section, dot, name = key.rpartition(".")
    return f"| `{section}{dot}{'(stage3_)' if is_aliased(key) else ''}{name}` |"


def _default(value: object) -> str:
    if value == sys.maxsize:
        return "2^63 - 1"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10**5:
        return f"{value:g}".replace("e+0", "e") if float(f"{value:g}") == value else str(value)
    return json.dumps(value)


def _works(engines: tuple[str, ...]) -> str:
    return "all" if engines == EVERY else ", ".join(engines)
