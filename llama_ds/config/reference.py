"""Generates docs/run_file.md, the reference of the run file: a table per section from the declarations of its keys."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from llama_ds.config.declare import MOST, Key, declared, shown_bound
from llama_ds.config.moved_keys import MOVED_KEYS, RENAMED_VALUES
from llama_ds.config.schema import RunConfig
from llama_ds.errors import listed

_INTRODUCTION = """\
# Run file

<!-- Generated from llama_ds/config/schema*.py by `docs/run_file.py`: edit those files. -->

A run file is YAML: the keys of the first table are at the top level, those of each other table in the section of that
name.
Any key can be overridden on the command line as `section.key=value`; list entries are numbered from 0, as in
`data.sources.0.weight=0.5`. Unknown keys are errors. *Required* keys have no default.

Integers may be written 4194304, 4_194_304, 4M, 1.4T or 1.4e12, numbers also as 1e-5. Numbers have at most the size
1e9 where the tables give no other bound. Data-parallel size and accumulation steps are never set: they follow from the
number of ranks.

The YAML is that of version 1.2: `yes`, `no`, `on`, `off` and dates are text, and a number with a leading zero (010) is
refused. Anchors, aliases and merges (`<<: *name`) work; a key that is set twice is an error.

In the values of path keys, of `deepspeed` and of `model.from`, `~` is the user's home folder, and `$NAME` or `${NAME}`
an environment variable, which must be set. `tools/launch.py` passes these variables to the ranks, except those in
`data.cache_dir`, which each host expands by its own environment. A `pipe:` command is left to its shell.
"""
_MODEL = """\
## Model of a folder

    model: {from: models/Llama-3.2-1B}

takes all keys of `model` from a run, a checkpoint, a Hugging Face folder (config.json suffices) or a Meta folder.
Other keys beside `from` must have the folder's values, except those that `checkpoint.start_from_changes` lists. The
resolved run in the run's folder holds the numbers. `from` does not load the weights: that is `checkpoint.start_from`.
"""
_RECOMPUTE = """\
## Recompute policies

`parallel.recompute` selects the activations that decoder layers save (`compute.decoder_layer: manual_backward`):

- `none` keeps everything that the backward reads.
- `selective` keeps the layer's input, the outputs of its large matrix products (q, k and v; gate and up), and the
  output and logsumexp of attention. It recomputes the cheap operations: both norms, the SwiGLU product and, with
  tp = 1, the output projection. No collective is repeated.
- `full` keeps the layer's input and runs its forward again, collectives included.
- `{budget: 20 GiB}` chooses a policy for each layer so that the layers of a rank keep no more than that, with the
  fewest recomputed FLOPs. `{auto: 80 GiB}` budgets what a device of that memory has left; `auto` uses the actual
  device.

Megatron-LM's `selective` (Korthikanti et al., arXiv 2205.05198) differs: it recomputes the attention core
(scores, softmax, dropout and the product with the values) and keeps everything else. With fused attention, which never
stores the scores, that saves nothing. `selective` here never recomputes attention; it drops activations that Megatron
keeps.
"""
_OLD_NAMES = """\
## Old names

Run files, overrides and checkpoints with these names still work; a warning gives the new name. Setting both names to
different values is an error.

| old | new |
|---|---|"""


def reference() -> str:
    """Return the text of docs/run_file.md."""
    tables = [_section("", RunConfig)]
    tables += [_section(key, kind) for key, kind in _sections("", RunConfig)]
    return "\n".join([_INTRODUCTION, *tables, _MODEL, _RECOMPUTE, _old_names()])


def _sections(at: str, kind: type) -> Iterator[tuple[str, type]]:
    """Yield the sections within a section with their dotted keys; N stands for the index of a list entry."""
    for name, hint in get_type_hints(kind).items():
        for arm in (hint, *get_args(hint)):
            if is_dataclass(arm) and isinstance(arm, type):
                key = f"{at}{name}{'.N' if get_origin(hint) is tuple else ''}"
                yield key, arm
                yield from _sections(f"{key}.", arm)


def _section(key: str, kind: type) -> str:
    heading = f"## `{key}`\n\n{inspect.cleandoc(kind.__doc__ or '')}\n" if key else "## Top level\n"
    types, keys = get_type_hints(kind), declared(kind)
    rows = [_row(field, types[field.name], keys[field.name]) for field in fields(kind) if field.name in keys]
    return "\n".join(
        [heading, "| key | type | default | unit | meaning | rule |", "|---|---|---|---|---|---|", *rows, ""]
    )


def _row(field: Field[Any], kind: Any, key: Key) -> str:
    choices = listed(f"`{choice}`" for choice in key.choices) if key.choices else ""
    rules = [key.sign.capitalize() + "." if key.sign else "", *_bounds(key), key.rule]
    cells = (
        f"`{field.name}`",
        key.form or choices or _type(kind),
        key.default or _default(field),
        key.unit,
        key.meaning,
        " ".join(filter(None, rules)),
    )
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |".replace("|  |", "| |")


def _bounds(key: Key) -> Iterator[str]:
    if key.least is not None:
        yield f"At least {shown_bound(key.least)}."
    if key.most != MOST:
        yield f"At most {shown_bound(key.most)}."


def _type(kind: Any) -> str:
    arms = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("null" if arm is NoneType else _type(arm) for arm in arms)
    if get_origin(kind) is tuple:
        return f"list of {_plural(arms[0])}" if arms[-1] is Ellipsis else f"list of {len(arms)} {_plural(arms[0])}"
    if get_origin(kind) is dict:
        return f"mapping to {_plural(arms[1])}"
    return "section" if is_dataclass(kind) else _TYPES[kind]


_TYPES = {int: "integer", float: "number", str: "string", bool: "true or false"}


def _plural(kind: Any) -> str:
    return f"{_type(kind)}s"


def _default(field: Field[Any]) -> str:
    value = field.default
    if value is MISSING:
        return "*required*"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(_yaml, value))}]`"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return str(value) if value != "" else '""'


def _old_names() -> str:
    rows = [f"| `{old}` | `{new}` |" for old, new in MOVED_KEYS.items()]
    rows += [f"| `{key}: {old}` | `{key}: {new}` |" for (key, old), new in RENAMED_VALUES.items()]
    return "\n".join([_OLD_NAMES, *rows, ""])
