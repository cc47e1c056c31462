"""Derives the run files of a ladder from its depths and budgets, and keeps them in its folder."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ds.config.run_file import load_run, resolved
from llama_ds.config.schema import RunConfig
from llama_ds.config.text import save_text
from llama_ds.errors import UserError
from llama_ds.experiments.ladder.spec import BATCH, FEWEST_RUNS, FEWEST_VALUES, Ladder, suffice
from llama_ds.launch.hostfile import parse_hostfile
from llama_ds.layout.flops import embedding_parameters, flops_per_token, parameter_count
from llama_ds.layout.layout import resolve_layout
from llama_ds.perf.plan import hardware
from llama_ds.perf.plan.search import search
from llama_ds.perf.plan.write import write

STATE = "ladder.json"
FFN_MULTIPLE = 16


@dataclass(frozen=True)
class Rung:
    """One run of a ladder."""

    run: RunConfig
    depth: int
    budget: float
    value: float | None  # value of the swept option
    predicted: bool  # whether the law is not fitted to this run

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.run.training.global_batch * self.run.data.seq_len

    @property
    def parameters(self) -> int:
        """Weights that compute: all but an embedding table that is only looked up."""
        model = self.run.model
        return parameter_count(model) - (0 if model.tie_word_embeddings else embedding_parameters(model))

    @property
    def flops(self) -> float:
        """Model FLOPs of the whole run."""
        return flops_per_token(self.run.model, self.run.data.seq_len) * self.run.training.tokens


def plan(ladder: Ladder) -> list[Rung]:
    """Return the runs: sizes to fit by budget, then the sizes to predict.

    Raises:
        UserError: no group of hosts has `ranks` slots, a size has no valid layout, a budget is below one batch, two
            runs have one name, or the runs are too few for a prediction.
    """
    base = _load(ladder, {})
    if base.training.batch_stages:
        raise UserError(f"{ladder.base}: the runs of a ladder have one batch each; leave training.batch_stages out")
    if ladder.hostfile:
        host_groups(ladder)
    budgets = ladder.budget[1]
    values: tuple[float | None, ...] = ladder.sweep.values if ladder.sweep else (None,)
    cells = [(depth, budget, False) for depth in ladder.depths for budget in budgets]
    cells += [(depth, max(budgets), True) for depth in ladder.predict]
    seeds: tuple[int | None, ...] = ladder.seeds or (None,)
    rungs = [_rung(ladder, base, *cell, value, seed) for cell in cells for value in values for seed in seeds]
    for name, count in Counter(rung.name for rung in rungs).items():
        if count > 1:
            raise UserError(f"{ladder.name}: {count} runs have the name {name}; budgets must differ in six digits")
    fitted = [rung for rung in rungs if not rung.predicted]
    sizes, tokens = [rung.parameters for rung in fitted], [rung.run.training.tokens for rung in fitted]
    if ladder.predict and not suffice(sizes, tokens):
        different = len(set(zip(sizes, tokens, strict=True)))
        raise UserError(
            f"{ladder.name}: predict needs {FEWEST_RUNS} different runs of {FEWEST_VALUES} sizes and {FEWEST_VALUES} "
            f"numbers of tokens, and depths and budgets give {different} of {len(set(sizes))} and {len(set(tokens))}; "
            "add some"
        )
    return rungs


def host_groups(ladder: Ladder) -> list[dict[str, int]]:
    """Return the groups of consecutive hosts, with their slots, on which runs are trained side by side.

    Raises:
        UserError: no group of whole hosts has `ranks` slots.
    """
    hosts, groups, group = parse_hostfile(ladder.hostfile), list[dict[str, int]](), dict[str, int]()
    for host, slots in hosts.items():
        group[host] = slots
        total = sum(group.values())
        if total > ladder.ranks:
            raise UserError(
                f"{ladder.name}: ranks = {ladder.ranks} ends within {host}, as {' and '.join(group)} of "
                f"{ladder.hostfile} have {total} slots; a run takes whole hosts: set ranks to {total}, or the slots"
            )
        if total == ladder.ranks:
            groups, group = [*groups, group], {}
    if not groups:
        total = sum(hosts.values())
        raise UserError(
            f"{ladder.name}: ranks = {ladder.ranks} are more than the {total} slots of {ladder.hostfile}; set ranks to "
            f"{total}, or add hosts"
        )
    return groups


def shape(ladder: Ladder, depth: int) -> dict[str, int]:
    """Return the keys of `model` that depth decides."""
    heads = max(1, round(depth * ladder.width_per_layer / ladder.head_dim))
    width = heads * ladder.head_dim
    ffn = math.ceil(width * 8 / 3 / FFN_MULTIPLE) * FFN_MULTIPLE
    return {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": ladder.head_dim,
        "intermediate_size": ffn,
    }


def _rung(
    ladder: Ladder, base: RunConfig, depth: int, budget: float, predicted: bool, value: float | None, seed: int | None
) -> Rung:
    name = f"d{depth:02}_{budget:g}".replace("+", "") + ("" if value is None else f"_{value:g}")
    name += "" if seed is None else f"_s{seed}"
    model = shape(ladder, depth)
    changes: dict[str, Any] = {f"model.{key}": size for key, size in model.items()}
    if ladder.gpu:
        changes["parallel"] = {}
    elif ladder.parallel:
        changes["parallel"] = ladder.parallel
    if seed is not None:
        changes["seed"] = seed
    changes |= {"name": name, "output_dir": f"{ladder.root}/runs"}
    sized = _load(ladder, {**changes, "training.steps": 1, "optimizer.warmup_steps": 0}, depth)
    wanted = _tokens(ladder, budget, Rung(sized, depth, budget, value, predicted))
    rows = _rows(ladder, base, wanted)
    if ladder.sweep and ladder.sweep.key == BATCH and value is not None:
        rows = int(value)
    steps = int(wanted // (rows * base.data.seq_len))
    if steps < 1:
        raise UserError(
            f"{ladder.name}: depth {depth} has a budget of {wanted:,.0f} tokens, below one batch of "
            f"{rows * base.data.seq_len:,}; raise {ladder.budget[0]} = {budget:g}, or lower the base's global_batch"
        )
    rate = base.optimizer.lr * (model["hidden_size"] / base.model.hidden_size) ** ladder.lr_exponent
    rate *= math.sqrt(rows / base.training.global_batch)
    changes |= {
        "training.global_batch": rows,
        "training.steps": steps,
        "optimizer.lr": float(f"{rate:.4g}"),
        "optimizer.warmup_steps": int(steps * ladder.warmup_share),
        "evaluation.interval": steps,
        "checkpoint.interval": max(1, steps // 4),
        "logging.interval": max(1, steps // 200),
    }
    if base.evaluation.tasks:
        changes["evaluation.task_interval"] = max(1, steps // 10)
    if ladder.sweep and value is not None:
        changes[ladder.sweep.key] = int(value) if value == int(value) else value
    run = _load(ladder, changes, depth)
    if ladder.gpu:
        run = search(run, ladder.ranks, hardware.load(ladder.gpu), 1).best[0].run
    resolve_layout(run, ladder.ranks)
    return Rung(run, depth, budget, value, predicted)


def _load(ladder: Ladder, changes: dict[str, Any], depth: int | None = None) -> RunConfig:
    """Return the ladder's base with its overrides and these changes; an error names the depth that they are for."""
    try:
        return load_run(
            ladder.base, [f"{key}={json.dumps(value)}" for key, value in (ladder.overrides | changes).items()]
        )
    except UserError as error:
        place = f"ladder {ladder.name}" if depth is None else f"depth {depth} of ladder {ladder.name}"
        raise UserError(f"{place}: {error}") from None


def _tokens(ladder: Ladder, budget: float, sized: Rung) -> float:
    kind = ladder.budget[0]
    if kind == "tokens":
        return budget
    if kind == "flops":
        return budget / flops_per_token(sized.run.model, sized.run.data.seq_len)
    return budget * sized.parameters


def _rows(ladder: Ladder, base: RunConfig, tokens: float) -> int:
    """Return the rows of a step: a power of two times the base's, so that layouts that divide the base's still do."""
    scale = (tokens / base.training.tokens) ** ladder.batch_exponent
    rows = base.training.global_batch
    power = round(math.log2(scale))
    while power < 0 and rows % 2 == 0:
        rows, power = rows // 2, power + 1
    return rows * 2 ** max(power, 0)


def fingerprint(ladder: Ladder, rungs: list[Rung]) -> str:
    """Return a hash of the ranks and the runs' names, and of the tokenizer and the shards' manifests.

    Raises:
        UserError: the tokenizer or a manifest cannot be read.
    """
    found = hashlib.sha256(f"{ladder.ranks}\n".encode())
    found.update("\n".join(rung.name for rung in rungs).encode())
    data = rungs[0].run.data
    paths = [Path(source.path, "manifest.json") for source in data.sources]
    for path in [*([Path(data.tokenizer)] if data.tokenizer else []), *paths]:
        try:
            found.update(path.read_bytes() if path.is_file() else b"")
            if not path.exists():
                raise UserError(f"{path}: does not exist; build the data of {ladder.base} first")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from None
    return found.hexdigest()


def write_plan(ladder: Ladder, rungs: list[Rung]) -> list[str]:
    """Write the run files into the ladder's folder, or check them there if a run has begun; return their paths.

    Raises:
        UserError: the folder belongs to another ladder, or to these run files with other data.
    """
    state, mark = Path(ladder.root, STATE), fingerprint(ladder, rungs)
    paths = [f"{ladder.root}/run_files/{rung.name}.yaml" for rung in rungs]
    if state.exists() and any(Path(ladder.root, "runs").glob("*/metrics.jsonl")):
        try:
            before = json.loads(state.read_text(encoding="utf-8"))["fingerprint"]
        except (ValueError, KeyError, TypeError, OSError):
            raise UserError(f"{state}: is damaged; remove the folder {ladder.root}, or give another name") from None
        if before != mark or not all(_is_written(rung, path) for rung, path in zip(rungs, paths, strict=True)):
            raise UserError(
                f"{state}: the ladder, its base, its tokenizer or its shards changed since its runs began, and their "
                f"losses could not be compared; give the changed ladder another name or folder"
            )
        return paths
    shutil.rmtree(f"{ladder.root}/run_files", ignore_errors=True)  # an earlier plan
    for rung in rungs:
        write(rung.run, f"{ladder.root}/run_files")
    save_text(str(state), json.dumps({"fingerprint": mark, "runs": [rung.name for rung in rungs]}) + "\n")
    return paths


def _is_written(rung: Rung, path: str) -> bool:
    """Return whether a run file says the same; keys that a newer version of the code has added take their defaults."""
    first, second = resolved(load_run(path)), resolved(rung.run)
    return all(first[key] == second[key] for key in second if key not in ("path", "deepspeed_path"))
