"""The plan of a run as text: printed by --dry-run and saved in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from llama_ds.config.context_parallel import cp_sizes
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.recompute import GIB, POLICIES
from llama_ds.config.row_stages import first_step, stage_runs, stage_steps, stages_key
from llama_ds.config.schema import RunConfig
from llama_ds.config.section_rules import STOCK_ENGINE
from llama_ds.layout.flops import flops_per_token, layer_costs, parameter_count
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.layout.mup import initial_factor, inverse_width, rate_factor, scores_factor
from llama_ds.layout.partition import stage_boundaries, stage_parameters
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.layout.planned_documents import assumption, planned_rows, ring_imbalance
from llama_ds.layout.rank_memory import rank_memory
from llama_ds.layout.recompute import ELEMENT_BYTES, StagePolicies, recomputed_flops_per_token, stage_policies
from llama_ds.layout.vocab_parts import padding_rows
from llama_ds.layout.weights import Role
from llama_ds.layout.worst_stage import peak_bytes, worst_stage
from llama_ds.schedules.simulate import StageCost, simulate
from llama_ds.training.lr_schedule import learning_rate


def describe(run: RunConfig, layout: Layout, ds_config: dict[str, Any]) -> str:
    """Return the plan of `run` on `layout` as readable text; `ds_config` is the merged DeepSpeed configuration."""
    element_bytes = ELEMENT_BYTES["bf16" if ds_config["bf16"]["enabled"] else "fp32"]
    sections = (
        ("run", _run(run)),
        ("model", _model(run, layout, element_bytes)),
        ("layout", _layout(run, layout)),
        ("stages", _table(_stages(run, layout, element_bytes))),
        ("memory of a rank in GiB", memory_table(run, layout, element_bytes)),
        ("schedule", _schedule(run)),
        ("data", _table(_data(run))),
        ("deepspeed", json.dumps(ds_config, indent=2).splitlines()),
    )
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def describe_stages(run: RunConfig, world: int, ds_config: dict[str, Any]) -> str:
    """Return the plan of `run` on `world` ranks; of a run with stages, that of the stage with the most memory."""
    bf16 = ds_config["bf16"]["enabled"]
    element_bytes = ELEMENT_BYTES["bf16" if bf16 else "fp32"]
    worst = worst_stage(run, world, element_bytes)
    layout = resolve_layout(worst, world)
    if stages_key(run):
        ds_config = deepspeed_config(worst, layout, bf16)
    plan = describe(worst, layout, ds_config)
    if not stages_key(run):
        return plan
    lines = _table(_row_stages(run, world, element_bytes))
    what = f"rows of {worst.data.seq_len}" if run.data.stages else f"steps of {layout.global_batch:,} rows"
    title = f"stages of {stages_key(run)} (the plan is that of {what}, which need the most memory)"
    return "\n".join([title, *(f"  {line}" for line in lines), "", plan])


def _row_stages(run: RunConfig, world: int, element_bytes: int) -> Iterable[tuple[str, ...]]:
    yield "steps", "row length", "rows of a step", "layout", "GiB of the fullest rank", "FLOPs per token"
    for stage in stage_runs(run):
        layout, steps = resolve_layout(stage, world), stage_steps(run, first_step(stage))
        yield (
            f"{steps.start:,} to {steps.stop:,}",
            f"{stage.data.seq_len:,}",
            f"{layout.global_batch:,}",
            layout.words(" "),
            f"{peak_bytes(stage, layout, element_bytes) / GIB:.2f}",
            short(flops_per_token(stage.model, stage.data.seq_len)),
        )


def short(number: float) -> str:
    """Return `number` to three significant digits with a suffix: 65.3B, 4.19M, 512."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * size:  # 999.6M rounds to 1.00B
            return f"{number / size:#.3g}".rstrip(".") + suffix
    return f"{number:g}"


def _run(run: RunConfig) -> list[str]:
    return _pairs(
        ("name", run.name),
        ("run file", run.path),
        ("deepspeed file", run.deepspeed_path),
        ("seed", run.seed),
        ("writes to", run.run_dir),
    )


def _model(run: RunConfig, layout: Layout, element_bytes: int) -> list[str]:
    model, seq_len = run.model, run.data.seq_len
    heads = f"{model.num_attention_heads} query, {model.num_key_value_heads} key/value, of {model.head_dim}"
    flops = flops_per_token(model, seq_len)
    hardware = flops + recomputed_flops_per_token(run, layout, element_bytes)
    tied = " (tied)" if model.tie_word_embeddings else ""
    return _pairs(
        ("parameters", f"{short(parameter_count(model))} = {parameter_count(model):,}{tied}"),
        ("layers", f"{model.num_hidden_layers} of hidden {model.hidden_size}, ffn {model.intermediate_size}"),
        ("heads", heads),
        ("vocabulary", _vocabulary(run, layout)),
        *([("muP", _mup(run))] if model.mup else []),
        ("FLOPs per token", f"{short(flops)} forward and backward, causal attention at sequence length {seq_len}"),
        *([("  with documents", _documents(run))] if run.data.document_mask else []),
        ("  with recompute", f"{short(hardware)} (recompute: {run.parallel.recompute})"),
        ("FLOPs of the run", f"{_flops_of_run(run):.3g}"),
    )


def _documents(run: RunConfig) -> str:
    """Return the FLOPs of a token among the documents that plans count, and the work of a ring's ranks."""
    rows, sizes = planned_rows(run), cp_sizes(run)[0]
    keys = rows.keys
    text = f"{short(flops_per_token(run.model, run.data.seq_len, keys))}, {keys:,.0f} keys per token: {assumption(run)}"
    if run.parallel.cp == 1 or sizes.ring == 1:
        return text
    slowest = 1 + ring_imbalance(rows, sizes, run.parallel.micro_batch)
    return f"{text}; attention of the slowest rank of the ring {slowest:.4f} of the mean"


def _mup(run: RunConfig) -> str:
    model, hidden = run.model, Role.HIDDEN_MATRIX
    assert model.mup is not None
    factors = {
        "initial weights": initial_factor(hidden, model),
        "learning rate": rate_factor(hidden, model, run.optimizer),
        "logits": inverse_width(model),
        "attention scores": scores_factor(model),
    }
    text = ", ".join(f"{name} x {factor:.4g}" for name, factor in factors.items())
    return f"base width {model.mup.base_width}; hidden matrices: {text.replace(', logits', '; logits')}"


def _flops_of_run(run: RunConfig) -> float:
    if not run.data.stages:
        return flops_per_token(run.model, run.data.seq_len) * run.training.tokens
    step = run.training.global_batch * run.data.seq_len
    return step * sum(
        flops_per_token(stage.model, stage.data.seq_len) * len(stage_steps(run, first_step(stage)))
        for stage in stage_runs(run)
    )


def _vocabulary(run: RunConfig, layout: Layout) -> str:
    size, padding = run.model.vocab_size, padding_rows(run.model.vocab_size, layout.tp)
    return f"{size:,}" + (f", padded to {size + padding:,} in memory for tp {layout.tp}" if padding else "")


def _layout(run: RunConfig, layout: Layout) -> list[str]:
    sequence = ", activations sharded along the sequence" if run.parallel.sequence_parallel else ""
    rows = f"{layout.dp} x {layout.micro_batch} x {layout.accumulation}"
    return _pairs(
        ("ranks", f"{layout.world:,} = {layout.words()}{sequence}"),
        ("micro batch", f"{layout.micro_batch} rows of {run.data.seq_len:,} tokens"),
        ("accumulation", f"{layout.accumulation} micro-batches per step"),
        ("global batch", f"{layout.global_batch:,} rows = {rows} = {layout.global_batch * run.data.seq_len:,} tokens"),
        ("ZeRO stage", run.zero_stage),
        ("pipeline", _pipeline_schedule(run, layout)),
    )


def _pipeline_schedule(run: RunConfig, layout: Layout) -> str:
    if layout.pp == 1:
        return "none: one stage"
    if run.parallel.schedule == STOCK_ENGINE:
        return "DeepSpeed's own engine"
    schedule = schedule_of(run, layout)
    third = 1 / schedule.chunks  # assumes equal times for forward, input backward and weight backward of a chunk
    bubble = simulate(schedule, StageCost(third, third, third)).bubble
    virtual = f", {schedule.chunks} stages per rank" if schedule.chunks > 1 else ""
    return f"{schedule.name}{virtual}: bubble {bubble:.1%} of the step, for equal stages and free messages"


def _stages(run: RunConfig, layout: Layout, element_bytes: int) -> Iterable[tuple[str, ...]]:
    bounds = stage_boundaries(run)
    costs = layer_costs(run.model, run.data.seq_len)
    yield "stage", "decoder layers", "share of FLOPs", "parameters per rank", "recompute", "kept activations"
    held = stage_parameters(run.model, bounds, layout.tp)
    saving = stage_policies(run, layout, element_bytes)
    for stage, (parameters, saved) in enumerate(zip(held, saving, strict=True)):
        share = sum(costs[bounds[stage] : bounds[stage + 1]]) / sum(costs)
        yield str(stage), str(len(saved.policies)), f"{share:.1%}", short(parameters), *_recompute(run, saved)


def _recompute(run: RunConfig, saved: StagePolicies) -> tuple[str, str]:
    """Return a stage's recompute policies, and the activation memory of its micro-batches in flight."""
    if run.compute.decoder_layer == "autograd":
        return f"{run.parallel.recompute} (autograd)", "-"
    counts = ", ".join(f"{saved.policies.count(p)} {p}" for p in POLICIES if p in saved.policies)
    return counts, f"{saved.saved_bytes / GIB:.2f} GiB in {saved.in_flight} micro-batches"


def memory_table(run: RunConfig, layout: Layout, element_bytes: int) -> list[str]:
    """Return the table of memory per rank, in GiB, with a row for each pipeline rank."""
    return _table(_memory(run, layout, element_bytes))


def _memory(run: RunConfig, layout: Layout, element_bytes: int) -> Iterable[tuple[str, ...]]:
    stages = stage_policies(run, layout, element_bytes)
    placement = schedule_of(run, layout).placement
    muon = run.optimizer.name == "muon"
    columns = ("weights", "gradients", "optimizer", "working", "kept activations", *(("or matrices",) * muon), "all")
    yield "pipeline rank", *columns, "recompute of its layers"
    for rank, memory in enumerate(rank_memory(run, layout, element_bytes)):
        own = [stages[placement.stage(rank, chunk)] for chunk in range(placement.chunks)]
        kept = sum(stage.saved_bytes for stage in own)
        numbers = [memory.weights, memory.gradients, memory.optimizer, memory.working, kept]
        numbers += [*((memory.matrices,) * muon), memory.peak(kept)]
        policies = "; ".join(_recompute(run, stage)[0] for stage in own)
        yield str(rank), *(f"{number / GIB:.2f}" for number in numbers), policies


def _schedule(run: RunConfig) -> list[str]:
    steps, optimizer = run.training.steps, run.optimizer
    marks = {"first": 0, "end of warm-up": max(optimizer.warmup_steps - 1, 0), "middle": steps // 2, "last": steps - 1}
    if optimizer.schedule == "wsd":
        marks = {**marks, "start of decay": steps - optimizer.decay_steps}
    rates = [
        (f"step {step:,}", f"lr {learning_rate(step, optimizer, steps):.3g} ({mark})")
        for mark, step in sorted(marks.items(), key=lambda item: item[1])
    ]
    return _pairs(
        ("steps", f"{steps:,}"),
        ("tokens", f"{short(run.training.tokens)} = {run.training.tokens:,}"),
        ("schedule", optimizer.schedule),
        *rates,
    )


def _data(run: RunConfig) -> Iterable[tuple[str, ...]]:
    stages = run.data.mixture
    yield (
        *("source", "weight", *(f"from {short(stage.at_tokens)}" for stage in stages)),
        *("tokens", "epochs", "tokens of the source", "path"),
    )
    ends = [0, *(stage.at_tokens for stage in stages), run.training.tokens]
    for source in run.data.sources:
        weights = [source.weight, *(stage.weights.get(source.name, 0.0) for stage in stages)]
        tokens = sum(weight * (end - start) for weight, (start, end) in zip(weights, pairwise(ends), strict=True))
        size = short(tokens / source.epochs) if source.epochs else "-"
        epochs = f"{source.epochs:g}" if source.epochs else "-"
        yield source.name, *(f"{weight:.2%}" for weight in weights), short(tokens), epochs, size, source.path


def _pairs(*pairs: tuple[str, object]) -> list[str]:
    width = max(len(name) for name, _ in pairs)
    return [f"{name:<{width}}  {value}" for name, value in pairs]


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    table = list(rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
