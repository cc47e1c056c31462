"""Resolves a run file, its DeepSpeed JSON and `key=value` overrides into a RunConfig, and writes it as text."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from llama_ds import shipped
from llama_ds.config.batch_stages import Batches, complete_batch_stages
from llama_ds.config.declare import declared, number_problem, path_texts
from llama_ds.config.deepspeed_json import check_user_keys
from llama_ds.config.model_source import KEY as FROM
from llama_ds.config.model_source import take_model
from llama_ds.config.moved_keys import renamed_data, renamed_overrides, warn_of_old_names
from llama_ds.config.numbers import near_divisors
from llama_ds.config.paths import expanded, variables
from llama_ds.config.reader import ConfigSource, check_keys, plain, read
from llama_ds.config.recompute import canonical
from llama_ds.config.row_stages import at_stage, complete_stages
from llama_ds.config.rules import check
from llama_ds.config.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from llama_ds.config.text import dump_yaml, parse_yaml, read_json, read_yaml
from llama_ds.errors import UserError, did_you_mean, listed, shortened
from llama_ds.log import logger

RUN_FILES = "ds_configs"  # folder of the shipped ones
_DEFAULTS = {"seed": 0, "output_dir": "runs"}
_OWNERS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig}
_READER_FIELDS = {"path", "deepspeed_path"}  # fields of RunConfig that only the reader sets


def find_run_file(name: str) -> str:
    """Return the path of a run file: `name` if it is a file's path, else the shipped file of that name, from anywhere.

    "65b", "llama_65b", "llama_65b.yaml" and "ds_configs/llama_65b.yaml" name the shipped llama_65b.yaml.

    Raises:
        UserError: there is no such model.
    """
    if name.endswith((".yaml", ".yml")):
        found = shipped.find(name, RUN_FILES)
        if found != name:
            logger.warning("%s: no such file here; using %s", name, found)
        return found
    if os.sep in name or os.path.isfile(name):
        return name
    known = {path.stem: path for path in shipped.folder(RUN_FILES).glob("*.yaml")}
    sizes = {stem.rpartition("_")[2]: stem for stem in known if stem.count("_") < 2}  # not "v" for llama_65b_zb_v
    model = known.get(sizes.get(name.lower(), name))
    if not model:
        choices = [*sorted(sizes), *sorted(known.keys() - sizes.values())]
        raise UserError(
            f"{name}: no such model{did_you_mean(name.lower(), [*known, *sizes])}; use one of {', '.join(choices)}, "
            "or the path of a run file"
        )
    return str(model)


def load_run(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run that a YAML file describes, with `section.key=value` overrides, resolved and checked.

    `path` is as in `find_run_file`. `deepspeed` is the path of the DeepSpeed JSON relative to the run file's folder, or
    its content. Defaults are 0 for seed and "runs" for output_dir. Omitted keys are derived:
    model.num_key_value_heads = num_attention_heads, model.head_dim = hidden_size / heads, and training.steps and
    training.tokens from each other by steps = ceil(tokens / (global_batch * seq_len)). `model.from` is replaced by the
    keys of that folder's model.
    Old names of keys and values (`config/moved_keys.py`) are accepted with a warning each.
    An override of training.steps or training.tokens replaces either of the two in the file.

    Raises:
        UserError: for any mistake in the files or the overrides, with place, value, rule and fix.
    """
    path = find_run_file(path)
    data, changes = read_yaml(path), [_split(override) for override in overrides]
    warn_of_old_names(path, data, changes)
    data = renamed_data(data, ConfigSource(path))
    changes = renamed_overrides(changes, ConfigSource("command line"))
    source = ConfigSource(path, frozenset(key for key, _ in changes))
    written = {**data, **{key.split(".")[0]: value for key, value in changes}}
    check_keys(written, (f.name for f in fields(RunConfig) if f.name not in _READER_FIELDS), source)
    if source.overridden & {"training.steps", "training.tokens"} and isinstance(data.get("training"), dict):
        data["training"] = {k: v for k, v in data["training"].items() if k not in ("steps", "tokens")}
    data["deepspeed"], deepspeed_path = _deepspeed(dict(changes).get("deepspeed", data.get("deepspeed")), source)
    for key, value in changes:
        if key != "deepspeed":
            _set(data, key, value, source)
    take_model(data, source)
    _derive(data, source)
    run = read(RunConfig, {**_DEFAULTS, **data, "path": path, "deepspeed_path": deepspeed_path}, source)
    check(run)
    check_user_keys(run)
    if run.data.stages and run.data.seq_len != run.data.stages[0].seq_len:
        raise source.error(
            "data.seq_len",
            f"= {run.data.seq_len} is not the {run.data.stages[0].seq_len} of the first stage in data.stages; use "
            "that, or data.stages=[] for a run with rows of one length",
        )
    return at_stage(run, 0)


def path_variables(path: str, overrides: Sequence[str] = ()) -> list[str]:
    """Return the environment variables in the paths of a run that `load_run` accepts, which its ranks need too.

    Those in data.cache_dir do not count: that folder is on each host's own disk.
    """
    data, source = read_yaml(path), ConfigSource(path)
    for key, value in map(_split, overrides):
        if not key.startswith("deepspeed."):  # keys in the DeepSpeed JSON
            _set(data, key, value, source)
    texts = [
        *path_texts(RunConfig, data, skipping="cache_dir"),
        data.get("deepspeed"),
        _section(data, "model").get(FROM),
    ]
    return sorted({name for text in texts if isinstance(text, str) for name in variables(text)})


def load_resolved(path: str) -> RunConfig:
    """Return the run whose `resolved` data was saved as YAML or JSON in `path`."""
    source = ConfigSource(path)
    run = read(RunConfig, renamed_data(read_yaml(path), source), source)
    check(run)
    return run


def resolved(run: RunConfig) -> dict[str, Any]:
    """Return the complete resolved run as plain data (dicts, lists, scalars) for JSON and YAML."""
    return plain(run)


def dump(run: RunConfig) -> str:
    """Return the complete resolved run as YAML text that `load_resolved` can read."""
    return dump_yaml(resolved(run))


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"command line: {override!r} is not an override; write section.key=value (optimizer.lr=1e-4)")
    return key, parse_yaml(text, f"command line: {key}")


def _deepspeed(named: object, source: ConfigSource) -> tuple[dict[str, Any], str]:
    """Return the DeepSpeed JSON's content and path from the value of the run file's `deepspeed` key."""
    if isinstance(named, dict):
        return copy.deepcopy(named), source.path
    if not isinstance(named, str):
        raise source.error(
            "deepspeed", f"= {shortened(repr(named))} names no DeepSpeed JSON; write deepspeed: zero1_auto.json"
        )
    try:
        path = str(Path(source.path).parent / expanded(named))
    except ValueError as error:
        raise source.error("deepspeed", f"= {shortened(repr(named))}: {error}") from None
    return read_json(path), path


def _set(data: dict[str, Any], dotted: str, value: Any, source: ConfigSource) -> None:
    """Set the dotted key of plain data to `value`. The reader checks later whether the key is known."""
    *parents, last = dotted.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        here = ".".join(parents[: depth + 1])
        if isinstance(node, dict):
            node = node.setdefault(part, {})
        elif isinstance(node, list):
            node = node[_index(node, part, here, source)]
        else:
            raise source.error(here, "is inside a plain value, which has no keys")
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list):
        node[_index(node, last, dotted, source)] = value
    else:
        raise source.error(dotted, f"is inside {'.'.join(parents)} = {node!r}, which has no keys")


def _index(node: list, part: str, key: str, source: ConfigSource) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise source.error(key, f"counts into a list of {len(node)}; use 0 to {len(node) - 1} or give the whole list")
    return int(part)


def _derive(data: dict[str, Any], source: ConfigSource) -> None:
    """Add the derived numbers that a run file may omit to its plain data.

    A section that lacks the numbers they derive from stays unchanged; the reader then reports the missing key.
    """
    model, training, parallel = (_section(data, name) for name in ("model", "training", "parallel"))
    if "recompute" in parallel:
        parallel["recompute"] = canonical(parallel["recompute"])
    heads, hidden = (_positive(data, f"model.{key}", source) for key in ("num_attention_heads", "hidden_size"))
    if heads and "num_key_value_heads" not in model:
        model["num_key_value_heads"] = heads
    if heads and hidden and "head_dim" not in model:
        if hidden % heads:
            fits = listed(n for n in near_divisors(hidden, heads) if n <= 2 * heads)
            raise source.error(
                "model.num_attention_heads",
                f"= {heads} does not divide model.hidden_size = {hidden}; use {fits}, or set model.head_dim",
            )
        model["head_dim"] = hidden // heads
    complete_stages(_section(data, "data"), parallel)
    if ("steps" in training) == ("tokens" in training):
        many = "are both set; keep one" if training.get("steps") else "are both missing; set one"
        raise source.error("training", f"says how long to train: steps and tokens {many}")
    seq_len = _positive(data, "data.seq_len", source)
    stages = complete_batch_stages(training, seq_len, source)
    rows = _positive(data, "training.global_batch", source)
    steps, tokens = _positive(data, "training.steps", source), _positive(data, "training.tokens", source)
    if not rows or not seq_len:
        return
    batches = stages or Batches((rows,))
    if tokens:
        training["steps"] = batches.steps_for(-(-tokens // seq_len))
    if steps:
        training["tokens"] = batches.first_row(steps) * seq_len


def _section(data: dict[str, Any], name: str) -> dict[str, Any]:
    section = data.get(name)
    return section if isinstance(section, dict) else {}


def _positive(data: dict[str, Any], dotted: str, source: ConfigSource) -> int | None:
    """Return the positive integer at `section.key`, None if the key is missing."""
    section, key = dotted.split(".")
    if key not in _section(data, section):
        return None
    value = read(int, _section(data, section)[key], source, dotted)
    if problem := number_problem(declared(_OWNERS[section])[key], dotted, value):
        raise source.error(*problem.split(" ", 1))
    return value
