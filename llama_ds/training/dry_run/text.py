"""Formats the results of a dry run as tables and as JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from llama_ds.training.dry_run.report import CATEGORIES, DryRun, IssuedCall, RankReport, axis_of

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_HEAD = ("ranks", "pp", "stages", "parameters", *CATEGORIES, "all", "planned")
Line = tuple[str, str, int, int]  # kind, axis, ranks of the group, bytes of a call


def table(found: DryRun) -> str:
    """Return the report as text; ranks with equal values share a line."""
    layout = found.layout
    slowest = max(report.seconds for report in found.ranks)
    memory = max(report.host_bytes for report in found.ranks)
    fullest = max(report.total for report in found.ranks)
    unit = next((name for name, size in UNITS.items() if fullest >= size), "KiB")
    title = (
        f"dry run of {found.name}: {layout.world:,} ranks = {layout.words()}, as on "
        f"{found.backend}; {len(found.ranks)} ranks in {found.seconds:.0f} s, {slowest:.1f} s and "
        f"{memory / 1e9:.2f} GB of this host at most for one rank"
    )
    return "\n".join(
        [
            title,
            "",
            f"peak memory of a rank in {unit}",
            *_indented(_columns(_HEAD, _grouped((r.rank, _memory(r, UNITS[unit])) for r in found.ranks))),
            *_matrices(found),
            "",
            "collectives and messages of one step, bytes of the full buffer",
            *_indented(_traffic_lines(found)),
            "",
            "checks",
            *_indented(f"{'ok    ' if c.ok else 'FAILED'}  {c.name}: {c.text}" for c in found.checks),
        ]
    )


def as_json(found: DryRun) -> dict[str, Any]:
    """Return the report as plain data, with the calls of a step counted by kind, group and size."""
    return {
        "name": found.name,
        "ok": found.ok,
        "layout": found.layout.as_data(),
        "backend": found.backend,
        "seconds": found.seconds,
        "checks": [asdict(check) for check in found.checks],
        "ranks": [_rank_as_json(found, report) for report in found.ranks],
    }


def calls_as_json(found: DryRun, report: RankReport) -> dict[str, Any]:
    """Return all calls that a rank issues, in order: [kind, index of the group, peer or -1, bytes]."""
    groups = [{"name": g.name, "axis": axis_of(g.ranks, found.layout), "ranks": g.ranks} for g in report.groups]
    return {"rank": report.rank, "groups": groups, "building": report.building, "step": report.step}


def _rank_as_json(found: DryRun, report: RankReport) -> dict[str, Any]:
    kept = ("stages", "parameters", "memory", "matrices", "planned", "planned_matrices", "micro_batches")
    lines = [
        {
            "kind": kind,
            "axis": axis_of(report.groups[group].ranks, found.layout),
            "group": list(report.groups[group].ranks),
            "peer": peer,
            "bytes": size,
            "count": len(positions),
            "first": positions[0],
        }
        for (kind, group, peer, size), positions in _positions(report.step).items()
    ]
    return {
        "rank": report.rank,
        **{f"{axis}_rank": index for axis, index in report.coords.named.items()},
        **{name: getattr(report, name) for name in kept},
        "memory_total": report.total,
        "building_calls": len(report.building),
        "step_calls": len(report.step),
        "calls": lines,
        "seconds": report.seconds,
        "host_bytes": report.host_bytes,
    }


def _matrices(found: DryRun) -> list[str]:
    """Return the line on whole matrices, if the optimizer is Muon."""
    most = max(found.ranks, key=lambda report: report.matrices)
    if not most.matrices:
        return []
    unit = next((name for name, size in UNITS.items() if most.matrices >= size), "KiB")
    held, planned = (size / UNITS[unit] for size in (most.matrices, most.planned_matrices))
    return [f"  whole matrices in Muon's step: at most {held:.3f} {unit} on a rank, planned {planned:.3f}"]


def _positions(calls: list[IssuedCall]) -> dict[IssuedCall, list[int]]:
    """Return the positions of each distinct call in the step, ordered by first occurrence."""
    found: dict[IssuedCall, list[int]] = defaultdict(list)
    for n, call in enumerate(calls):
        found[call].append(n)
    return found


def _memory(report: RankReport, unit: int) -> tuple[str, ...]:
    numbers = [report.memory.get(category, 0) for category in CATEGORIES]
    return (
        str(report.coords.pp),
        ",".join(map(str, report.stages)),
        f"{report.parameters:,}",
        *(f"{number / unit:.3f}" for number in (*numbers, report.total)),
        f"{sum(report.planned.values()) / unit:.3f}" if report.planned else "-",
    )


def _traffic_lines(found: DryRun) -> Iterable[str]:
    by_lines: dict[tuple[tuple[Line, int], ...], list[int]] = defaultdict(list)
    for report in found.ranks:
        counts: dict[Line, int] = defaultdict(int)
        for call in report.step:
            ranks = report.groups[call.group].ranks
            counts[call.kind, axis_of(ranks, found.layout), len(ranks), call.bytes] += 1
        by_lines[tuple(counts.items())].append(report.rank)
    rows = [
        (_listed(ranks) if n == 0 else "", kind, f"{axis} of {size}", f"{each:,}", f"{count:,}", f"{each * count:,}")
        for lines, ranks in by_lines.items()
        for n, ((kind, axis, size, each), count) in enumerate(lines)
    ]
    return _columns(("ranks", "kind", "group", "bytes", "calls", "total bytes"), rows)


def _grouped(lines: Iterable[tuple[int, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    ranks: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank, line in lines:
        ranks[line].append(rank)
    return [(_listed(own), *line) for line, own in ranks.items()]


def _listed(ranks: list[int], limit: int = 4) -> str:
    shown = ", ".join(map(str, ranks[:limit]))
    return shown if len(ranks) <= limit else f"{shown}, +{len(ranks) - limit}"


def _columns(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
