"""The planner's results as text and as plain data."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llama_ds.config.context_parallel import HIERARCHICAL
from llama_ds.layout.flops import parameter_count
from llama_ds.layout.planned_documents import assumption
from llama_ds.layout.recompute import GIB
from llama_ds.perf.plan.candidate import Rejected
from llama_ds.perf.plan.cost import (
    CARBON,
    LAW,
    OVERHEAD,
    TABLE_15,
    TABLE_15_TOKENS,
    Cost,
    Rates,
    cheapest,
    life,
    run_cost,
)
from llama_ds.perf.plan.estimate import Estimate, as_data
from llama_ds.perf.plan.job import layers_by_policy
from llama_ds.perf.plan.layer import Parts
from llama_ds.perf.plan.likely import likely_speed
from llama_ds.perf.plan.rows import ASSUMED_NETWORK
from llama_ds.perf.plan.search import SearchResult
from llama_ds.perf.plan.sharing_costs import sharing_costs
from llama_ds.perf.plan.validate import Checked, Fits, groups, likely_runs, spans, summary

RANKED = [
    *("", "tp", "pp", "cp", "dp", "micro", "schedule", "ZeRO", "recompute", "tok/s/GPU", "likely", "MFU", "bubble"),
    *("exposed cp", "GiB", "days"),
]


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return rows as aligned columns, the first `left` of them left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def search_table(found: SearchResult, cost: Cost) -> str:
    """Return the ranking, the cost of the best layout, and the rejected layouts."""
    rows = [RANKED, *(ranked(position, item) for position, item in enumerate(found.best, 1))]
    best = found.best[0]
    lines = [
        f"{best.run.name} on {best.layout.world:,} x {best.gpu.name}: {best.layout.global_batch:,} rows of "
        f"{best.run.data.seq_len:,} tokens; {found.legal:,} legal layouts, {found.simulated:,} simulated, the others "
        "pruned by a lower bound",
        *([f"attention of {assumption(best.run)}"] if best.run.data.document_mask else []),
        "",
        aligned(rows, 0),
        "",
        f"step time of the best layout: {_breakdown(best)}",
    ]
    for kind, item in found.of_kind.items():
        if item.run != best.run:
            lines.append(
                f"best of {kind}: {_words(item)}, {item.step.tokens_per_second:,.0f} tokens/s/GPU: {_breakdown(item)}"
            )
    paper = paper_speed(best)
    sharing = sharing_costs(best.gpu, best.step)
    if sharing:
        lines.append(f"context parallelism of the best layout: {sharing.words()}")
    if paper:
        lines.append(f"the LLaMA paper trained this model at {paper:,.0f} tokens/s/GPU (table 15) on 2,048 A100-80GB")
    lines += [
        "",
        f"cost of the run with the best layout: {cost.gpu_hours:,.0f} GPU-hours, {cost.days:,.1f} days, "
        f"{cost.megawatt_hours:,.0f} MWh, {cost.carbon_tonnes:,.0f} t CO2eq",
        "",
        "rejected:",
    ]
    for why, others in sorted(found.rejected.items(), key=lambda pair: -pair[1].count):
        lines.append(f"  {others.count:>5}  {why}: {others.example}")
    if found.ordering.left_out:
        lines += ["", "left out, though their bounds are among the best:"]
        lines += [f"  {one.count:>5}  {why}: {one.example}" for why, one in found.ordering.left_out.items()]
    return "\n".join(lines)


def paper_speed(item: Estimate) -> float | None:
    """Return the LLaMA paper's tokens/s/GPU for a model of this size on its GPUs, or None."""
    size = f"{round(parameter_count(item.run.model) / 1e9)}b"
    if size not in TABLE_15 or not item.gpu.name.startswith("a100-80gb"):
        return None
    return TABLE_15_TOKENS[size] / TABLE_15[size] / 3600


def ranked(position: int, item: Estimate) -> list[str]:
    """Return a row of the ranking."""
    parallel, step = item.run.parallel, item.step
    counts, likely = layers_by_policy(step.job.stages), likely_speed(item.gpu, step)
    return [
        *(str(n) for n in (position, parallel.tp, parallel.pp)),
        _shared(item) or "-",
        *(str(n) for n in (item.layout.dp, parallel.micro_batch)),
        _schedule(item),
        str(item.run.zero_stage),
        "+".join(f"{n} {policy}" for policy, n in counts.items()),
        f"{step.tokens_per_second:,.0f}",
        f"{likely[0]:,.0f}-{likely[1]:,.0f}" if likely else "-",
        f"{step.mfu(item.gpu):.1%}",
        f"{step.bubble:.1%}",
        f"{_exposed_context(item):.1%}",
        f"{item.peak_bytes / GIB:.1f}",
        f"{item.days:.1f}",
    ]


def _schedule(item: Estimate) -> str:
    parallel = item.run.parallel
    graphs = " graphs" if parallel.cuda_graphs else ""
    if parallel.pp == 1:
        return graphs.strip() or "-"
    words = f"{parallel.schedule} x{parallel.virtual_stages}" if parallel.virtual_stages > 1 else parallel.schedule
    words += f" +{parallel.extra_warmup}" if parallel.extra_warmup else ""
    words += " early" if parallel.post_validation else ""
    words += f" joint {parallel.joint_weight_gradients}" if parallel.joint_weight_gradients > 1 else ""
    return words + graphs


def _shared(item: Estimate) -> str:
    """Return method and ranks of context parallelism: "ring x4", "hierarchical 2x4" (two groups of 4), or ""."""
    parallel, groups = item.run.parallel, item.step.job.cp_sizes
    if parallel.cp == 1:
        return ""
    ranks = f"{groups.ring}x{groups.all_to_all}" if parallel.cp_method == HIERARCHICAL else f"x{parallel.cp}"
    return f"{parallel.cp_method} {ranks}"


def _words(item: Estimate) -> str:
    parallel = item.run.parallel
    shared = _shared(item)
    return f"tp {parallel.tp} pp {parallel.pp} {f'{shared} ' if shared else ''}dp {item.layout.dp} {_schedule(item)}"


def _exposed_context(item: Estimate) -> float:
    """Return the share of the step for which its busiest rank waits for context-parallel messages."""
    sharing = sharing_costs(item.gpu, item.step)
    return sharing.exposed_s / item.step.seconds if sharing else 0.0


def _breakdown(item: Estimate) -> str:
    """Return the components of the step time, in percent, for the pipeline's busiest rank."""
    step, placement = item.step, item.step.job.placement
    ranks = [
        sum((step.stages[placement.stage(rank, chunk)].whole for chunk in range(placement.chunks)), Parts())
        for rank in range(step.job.pp)
    ]
    parts = max(ranks, key=lambda rank: rank.device)
    per_pass = step.seconds / item.layout.accumulation
    bubble = step.bubble * (step.pipeline - step.stragglers)
    known = parts.device / per_pass + (bubble + step.stragglers + step.reduction) / step.seconds
    return (
        f"matrices {parts.matrices / per_pass:.0%}, attention {parts.attention / per_pass:.0%}, pointwise "
        f"{parts.pointwise / per_pass:.0%}, exposed tensor-parallel {parts.tensor / per_pass:.0%}, "
        f"{f'exposed context-parallel {parts.context / per_pass:.0%}, ' if parts.context else ''}bubble "
        f"{bubble / step.seconds:.0%}, slower ranks {step.stragglers / step.seconds:.0%}, exposed reduction "
        f"{step.reduction / step.seconds:.0%}, "
        f"other (imbalance, ZeRO all-gathers, host) {max(0.0, 1 - known):.0%}"
    )


def search_data(found: SearchResult, cost: Cost) -> dict[str, Any]:
    """Return the search as plain data."""
    return {
        "legal": found.legal,
        "simulated": found.simulated,
        "best": [as_data(item) for item in found.best],
        "of_kind": {kind: as_data(item) for kind, item in found.of_kind.items()},
        "cost": cost_data(cost),
        "rejected": _counts(found.rejected),
        "left_out": _counts(found.ordering.left_out),
        "ordered_computations": found.ordering.computations,
    }


def _counts(groups: Mapping[str, Rejected]) -> dict[str, dict[str, Any]]:
    return {why: {"count": item.count, "example": item.example} for why, item in groups.items()}


def cost_data(cost: Cost) -> dict[str, float]:
    """Return the cost as plain data."""
    return {
        "gpu_hours": cost.gpu_hours,
        "gpus": cost.gpus,
        "days": cost.days,
        "mwh": cost.megawatt_hours,
        "t_co2eq": cost.carbon_tonnes,
    }


def cost_text(name: str, cost: Cost, tokens: float, speed: float, layout: Estimate | None) -> str:
    """Return the cost of one run as text."""
    how = f"the best layout found: {_words(layout)}" if layout else "as given"
    return "\n".join(
        (
            f"{name}: {tokens:.4g} tokens at {speed:,.1f} tokens/s/GPU ({how})",
            f"  {cost.gpu_hours:,.0f} GPU-hours; {cost.days:,.1f} days on {cost.gpus:,} GPUs",
            f"  {cost.megawatt_hours:,.1f} MWh = GPU-hours x {cost.power_w:g} W x PUE {OVERHEAD:g}",
            f"  {cost.carbon_tonnes:,.1f} t CO2eq = MWh x {CARBON:g} (LLaMA paper, section 6)",
        )
    )


def table_15(found: Mapping[str, SearchResult]) -> tuple[dict[str, Any], str]:
    """Return the paper's table 15 next to the cost of the best layouts, as plain data and as text."""
    rows = [("size", "paper: GPU-hours", "MWh", "t CO2eq", "tok/s/GPU", "planned: tok/s/GPU", "GPU-hours", "layout")]
    data = {}
    for size, hours in TABLE_15.items():
        best = found[size].best[0]
        paper = Cost(hours, 2048, 400)
        planned = run_cost(TABLE_15_TOKENS[size], best.step.tokens_per_second, 2048, best.gpu.power_w)
        speed = TABLE_15_TOKENS[size] / hours / 3600
        data[size] = {"paper": cost_data(paper), "planned": cost_data(planned)}
        rows.append(
            (
                size,
                f"{hours:,}",
                f"{paper.megawatt_hours:,.0f}",
                f"{paper.carbon_tonnes:,.0f}",
                f"{speed:,.0f}",
                f"{best.step.tokens_per_second:,.0f}",
                f"{planned.gpu_hours:,.0f}",
                _words(best),
            )
        )
    return data, aligned(rows)


def trade(target: float, inference_tokens: float, rates: Rates) -> tuple[dict[str, Any], str]:
    """Return the model sizes that reach a loss, as plain data and as text, with the cheapest to train and over life."""
    training, lifetime = cheapest(target, 0, rates), cheapest(target, inference_tokens, rates)
    sizes = [training, lifetime, *(life(target, n, inference_tokens, rates) for n in (7e9, 13e9, 33e9, 65e9))]
    names = ["cheapest to train", "cheapest over its life", "7B", "13B", "33B", "65B"]
    sizes[0] = life(target, training.parameters, inference_tokens, rates)
    reached = [(name, size) for name, size in zip(names, sizes, strict=True) if size.tokens < 1e16]
    data = {name: {**vars(size), "hours": size.hours} for name, size in reached}
    rows = [("", "parameters", "tokens", "tokens/parameter", "GPU-hours: training", "inference", "life")]
    for name, size in reached:
        rows.append(
            (
                name,
                f"{size.parameters / 1e9:,.1f}B",
                f"{size.tokens / 1e12:,.2f}T",
                f"{size.tokens / size.parameters:,.0f}",
                f"{size.training_hours:,.0f}",
                f"{size.inference_hours:,.0f}",
                f"{size.hours:,.0f}",
            )
        )
    missing = [name for name, size in zip(names, sizes, strict=True) if size.tokens >= 1e16]
    note = f"\nnot reached by {', '.join(missing)} with any number of tokens" if missing else ""
    head = f"loss {target:g} by {LAW}; {inference_tokens:.3g} tokens of inference"
    return data, f"{head}\n{aligned(rows)}{note}"


def errors(
    checked: Sequence[Checked],
    skipped: Mapping[str, int],
    assumed: Mapping[str, int],
    fits: Fits | None,
    each: bool,
) -> tuple[dict[str, Any], str]:
    """Return the planner's errors by source and over all rows, as plain data and as text."""
    tables = {name: summary(items) for name, items in groups(checked).items()}
    time = [item for item in checked if item.row.kind != "peak_mem_gib" and item.row.gpu.startswith("a100")]
    known = [item for item in time if ASSUMED_NETWORK not in item.row.assumed]
    held = [item for item in checked if item.row.kind == "peak_mem_gib"]
    named = {"all A100 | time": time, "all A100, network stated | time": known, "all | memory": held}
    totals = {name: summary(items) for name, items in named.items() if items}
    if time:
        of_sources = [t["median"] for name, t in tables.items() if name.endswith("time") and "| a100" in name]
        totals["all A100 | time"]["median_of_sources"] = statistics.median(of_sources)
    rows = [{"id": c.row.id, "measured": c.row.value, "predicted": c.predicted, "error": c.error} for c in checked]
    data = {"sources": tables, "overall": totals, "skipped": dict(skipped), "assumed": dict(assumed), "rows": rows}
    data["fits"] = fits and {**asdict(fits), "agreement": fits.agreement}
    lines = [("source | machine | what", "rows", "median |error|", "90th percentile", "bias")]
    for name, found in {**tables, **totals}.items():
        lines.append(
            (name, str(found["rows"]), f"{found['median']:.1%}", f"{found['p90']:.1%}", f"{found['bias']:+.1%}")
        )
    text = aligned(lines)
    if each:
        table = [("row", "measured", "predicted", "error")]
        table += [(c.row.id, f"{c.row.value:.4g}", f"{c.predicted:.4g}", f"{c.error:+.1%}") for c in checked]
        text = aligned(table) + "\n\n" + text
    if fits:
        text += (
            f"\n\nmemory: {fits.said_to_fit} of {fits.ran} runs that ran are said to fit, {fits.said_to_fail} of "
            f"{fits.failed} that were out of memory not to; agreement {fits.agreement:.1%}"
        )
    intervals = spans(checked)
    data["likely"] = [{"several_nodes": key[0], "pipeline": key[1], **one._asdict()} for key, one in intervals.items()]
    for (several, pipeline), one in sorted(intervals.items()):
        where = f"several nodes, {'with' if pipeline else 'without'} a pipeline" if several else "one node"
        text += (
            f"\nspeed on {where}: {one.low:.3f} to {one.high:.3f} of the predicted one ({one.runs:,} runs); on average "
            f"over the sources, {one.covered:.1%} of the runs lie in the interval of the others"
        )
    data["in_likely"], data["likely_of"] = likely_runs(checked)
    if data["likely_of"]:
        text += f"\nof {data['likely_of']:,} runs, {data['in_likely']:,} lie in the intervals that search gives"
    for title, counts in (("assumed, as rows do not state it", assumed), ("skipped", dict(sorted(skipped.items())))):
        if counts:
            text += f"\n\n{title}:\n" + "\n".join(f"  {count:>5}  {why}" for why, count in counts.items())
    return data, text


def left_out(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the errors on held-out sources as a table."""
    lines = [("held-out source", "rows", "median |error|", "90th percentile", "bias")]
    for name, item in found.items():
        lines.append((name, str(item["rows"]), f"{item['median']:.1%}", f"{item['p90']:.1%}", f"{item['bias']:+.1%}"))
    return aligned(lines)
