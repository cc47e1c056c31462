"""Reads a ladder: which sizes are trained on how many tokens, and where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from llama_ds.config.reader import ConfigSource, read
from llama_ds.config.text import read_yaml
from llama_ds.errors import UserError

BUDGETS = ("tokens_per_parameter", "tokens", "flops")
BATCH = "training.global_batch"
DERIVED = (
    *("name", "output_dir", "training.steps", "evaluation.interval", "evaluation.task_interval"),
    *("checkpoint.interval", "logging.interval"),
    *(f"model.{key}" for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")),
    *("model.head_dim", "model.intermediate_size"),
)
# What the law needs: one more run than its constants; three values tell a power from its limit.
FEWEST_RUNS, FEWEST_VALUES = 6, 3


def suffice(parameters: Sequence[float], tokens: Sequence[float]) -> bool:
    """Return whether runs of these sizes and numbers of tokens determine the law; seeds of one run count once."""
    different = len(set(zip(parameters, tokens, strict=True)))
    return different >= FEWEST_RUNS and min(len(set(parameters)), len(set(tokens))) >= FEWEST_VALUES


@dataclass(frozen=True)
class Sweep:
    """One option of the run file, and the values that it takes."""

    key: str  # such as optimizer.lr
    values: tuple[float, ...]


@dataclass(frozen=True)
class Ladder:
    """A ladder file. Depth is the dial: it gives the shape, and shape and budget give the rest."""

    name: str
    base: str  # run file with data, tokenizer, and all that is not derived
    depths: tuple[int, ...]  # decoder layers of the sizes that the law is fitted to
    predict: tuple[int, ...] = ()  # depths whose loss is predicted first; trained on the largest budget only
    folder: str = ""  # default: runs/NAME
    overrides: dict[str, object] = field(default_factory=dict)  # keys of the base, such as training.global_batch: 4
    tokens_per_parameter: tuple[float, ...] = ()  # exactly one of these three: tokens / parameters,
    tokens: tuple[int, ...] = ()  # fixed tokens,
    flops: tuple[float, ...] = ()  # or fixed training FLOPs (IsoFLOP)
    width_per_layer: int = 64
    head_dim: int = 64
    batch_exponent: float = 0.0  # rows of a step grow with tokens to this power, from the base's rows and tokens
    lr_exponent: float = -0.5  # the learning rate follows width to this power, from the base's rate and width
    warmup_share: float = 0.1  # warm-up steps / steps
    ranks: int = 1  # number of ranks of each run
    hostfile: str = ""  # start by tools/launch.py, side by side on `ranks` slots each; empty: on this machine
    at_once: int = 1  # runs trained side by side on this machine, each with its share of cores or devices
    gpu: str = ""  # let the planner choose each layout for this GPU; empty: the base's `parallel`, or the one below
    parallel: dict[str, object] = field(default_factory=dict)
    sweep: Sweep | None = None
    seeds: tuple[int, ...] = ()  # every run with each of these; empty: with the base's

    @property
    def root(self) -> str:
        """Folder of the ladder."""
        return self.folder or f"runs/{self.name}"

    @property
    def budget(self) -> tuple[str, tuple[float, ...]]:
        """Kind of the budgets, and their values."""
        return next((kind, getattr(self, kind)) for kind in BUDGETS if getattr(self, kind))


def read_ladder(path: str, depths: tuple[int, ...] = ()) -> Ladder:
    """Return the ladder of a YAML file; `depths` replaces its own.

    Raises:
        UserError: a key is unknown, missing, or has a value that no ladder can have.
    """
    data = read_yaml(path)
    if depths:
        data["depths"] = list(depths)
    ladder = read(Ladder, data, ConfigSource(path))
    _check(ladder, path)
    return ladder


def _check(ladder: Ladder, path: str) -> None:
    if not ladder.name or not all(letter.isalnum() or letter in "_-" for letter in ladder.name):
        raise UserError(f"{path}: name = {ladder.name!r} names files; use letters, digits, _ and -")
    given = [kind for kind in BUDGETS if getattr(ladder, kind)]
    if len(given) != 1:
        raise UserError(f"{path}: sets {' and '.join(given) or 'no budget'}; set one of {', '.join(BUDGETS)}")
    lists = {"depths": ladder.depths, "predict": ladder.predict, given[0]: ladder.budget[1]}
    if ladder.sweep:
        lists["sweep.values"] = ladder.sweep.values
    for key, values in lists.items():
        if not values and key != "predict":
            raise UserError(f"{path}: {key} is empty; give at least one value")
        for value in values:
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"{path}: {key} = {value:g} is not positive; give positive numbers")
        if len(set(values)) < len(values):
            raise UserError(f"{path}: {key} holds a value twice; give each once")
    for seed in ladder.seeds:
        if not 0 <= seed < 2**63:
            raise UserError(f"{path}: seeds = {seed} is no seed; use whole numbers from 0 to 2^63 - 1")
    if len(set(ladder.seeds)) < len(ladder.seeds):
        raise UserError(f"{path}: seeds holds a value twice; give each once")
    if both := sorted(set(ladder.depths) & set(ladder.predict)):
        raise UserError(f"{path}: depth {both[0]} is in depths and in predict; a predicted size must not be fitted to")
    for key in ("width_per_layer", "head_dim", "ranks", "at_once"):
        if getattr(ladder, key) < 1:
            raise UserError(f"{path}: {key} = {getattr(ladder, key)} is not positive; use 1 or more")
    for key in ladder.overrides:
        if key in DERIVED:
            raise UserError(f"{path}: overrides sets {key}, which follows from depth and budget; leave it out")
    if ladder.hostfile and ladder.at_once > 1:
        raise UserError(
            f"{path}: sets hostfile and at_once, and a hostfile's slots say what runs at once; leave one out"
        )
    if ladder.predict and ladder.sweep:
        raise UserError(f"{path}: sets predict and sweep, and no law is fitted to a sweep; leave one out")
    if ladder.sweep and ladder.sweep.key in DERIVED:
        raise UserError(f"{path}: sweep.key = {ladder.sweep.key} follows from depth and budget; sweep another option")
    if ladder.sweep and ladder.sweep.key == BATCH:
        for value in ladder.sweep.values:
            if value != int(value):
                raise UserError(f"{path}: sweep.values = {value:g} is no number of rows for {BATCH}; use whole numbers")
    if ladder.head_dim % 2:
        raise UserError(
            f"{path}: head_dim = {ladder.head_dim} is odd, and rotary embeddings need pairs; use an even one"
        )
    if not 0 <= ladder.warmup_share < 1:
        raise UserError(f"{path}: warmup_share = {ladder.warmup_share:g} is not a share of the steps; use 0 to below 1")
