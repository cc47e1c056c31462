"""A report of sources as one self-contained HTML page with inline pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llama_ds.data.report.tables import facts

DOCUMENTS, TOKENS = "#4e79a7", "#f28e2b"
TEXT_CHARS = 2000  # longest sample row on the page
_STYLE = (
    "body{font:14px sans-serif;margin:2em auto;max-width:1040px;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:3px 9px;border-bottom:1px solid #ddd;text-align:left;vertical-align:top;overflow-wrap:anywhere}"
    "pre{background:#f6f6f6;padding:1em;white-space:pre-wrap;overflow-wrap:anywhere}h2{margin-top:2em}"
    "td.n,th.n{text-align:right;white-space:nowrap}svg{max-width:100%;height:auto}"
)


def page(title: str, sources: Sequence[Mapping[str, Any]], remarks: Sequence[str] = ()) -> str:
    """Return the page of the sources, given as JSON data (`tables.as_data`)."""
    parts = [f"<h1>{_text(title)}</h1>", *(f"<p>{_text(remark)}</p>" for remark in remarks)]
    if len(sources) > 1:
        parts += ["<h2>Sources by tokens</h2>", source_bars(sources)]
    for data in sources:
        parts += _source(data)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def source_bars(sources: Sequence[Mapping[str, Any]]) -> str:
    """Return a bar per source, as long as its share of all tokens."""
    width, row, left = 600.0, 22, 180
    total = max(1, sum(data["tokens"] for data in sources))
    largest = max(1, *(data["tokens"] for data in sources))
    parts = []
    for number, data in enumerate(sources):
        y, length = number * row, data["tokens"] / largest * width
        name = data["source"] if len(data["source"]) <= 24 else data["source"][:23] + "\u2026"
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{_text(name)}</text>')
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{length:.1f}" height="{row - 6}" fill="{TOKENS}"/>')
        label = f"{data['tokens']:,} tokens, {data['tokens'] / total:.1%}"
        parts.append(f'<text x="{left + length + 8:.1f}" y="{y + 15}">{label}</text>')
    return _svg(left + width + 220, row * len(sources) + 4, parts)


def length_histogram(bars: Sequence[Mapping[str, int]]) -> str:
    """Return the shares of documents and of tokens by document length, on a logarithmic scale."""
    height, left, top = 220.0, 50, 24
    step = max(16.0, min(48.0, 900.0 / max(1, len(bars))))
    documents = max(1, sum(bar["documents"] for bar in bars))
    tokens = max(1, sum(bar["tokens"] for bar in bars))
    shares = [(bar["documents"] / documents, bar["tokens"] / tokens) for bar in bars]
    most = max((share for pair in shares for share in pair), default=1.0)
    width, base = step * len(bars), top + height
    parts = [
        f'<rect x="{left}" y="2" width="11" height="11" fill="{DOCUMENTS}"/>'
        f'<text x="{left + 16}" y="12">share of documents</text>',
        f'<rect x="{left + 150}" y="2" width="11" height="11" fill="{TOKENS}"/>'
        f'<text x="{left + 166}" y="12">share of tokens</text>',
    ]
    for tick in range(5):
        y = base - tick / 4 * height
        parts.append(f'<line x1="{left}" x2="{left + width:.0f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{most * tick / 4:.1%}</text>')
    every = 1 if step >= 40 else 2 if step >= 20 else 4
    for number, (bar, pair) in enumerate(zip(bars, shares, strict=True)):
        x = left + number * step
        what = (
            f"{bar['start']:,} to {bar['stop'] - 1:,} tokens: {bar['documents']:,} documents, {bar['tokens']:,} tokens"
        )
        for half, (share, colour) in enumerate(zip(pair, (DOCUMENTS, TOKENS), strict=True)):
            tall, side = share / most * height, (step - 4) / 2
            parts.append(
                f'<rect x="{x + 2 + half * side:.1f}" y="{base - tall:.1f}" width="{side:.1f}" height="{tall:.1f}" '
                f'fill="{colour}"><title>{what}</title></rect>'
            )
        if number % every == 0:
            parts.append(f'<text x="{x:.1f}" y="{base + 15:.0f}" text-anchor="middle">{_short(bar["start"])}</text>')
    parts.append(
        f'<text x="{left + width / 2:.0f}" y="{base + 33:.0f}" text-anchor="middle">tokens of a document</text>'
    )
    return _svg(left + max(width, 320) + 20, base + 40, parts)


def _source(data: Mapping[str, Any]) -> list[str]:
    parts = [f"<h2>{_text(data['source'])}</h2>", f"<p>{_text(data['folder'])}</p>"]
    parts.append(_table(facts(data)))
    if data["lengths"]["histogram"]:
        parts += ["<h3>Document lengths</h3>", length_histogram(data["lengths"]["histogram"])]
    if copies := data["duplicates"]["most_copied"]:
        parts += ["<h3>Most copied texts</h3>", _table([(f"{c['documents']:,}", c["place"]) for c in copies])]
    if data["samples"]:
        parts.append("<h3>Sample rows</h3>")
    for row in data["samples"]:
        places = ", ".join(row["places"][:5]) + (
            f" and {len(row['places']) - 5} more" if len(row["places"]) > 5 else ""
        )
        text = row["text"] if len(row["text"]) <= TEXT_CHARS else row["text"][:TEXT_CHARS] + "\u2026"
        parts.append(f"<p>{_text(row['shard'])}, row {row['row']}: {_text(places)}</p><pre>{_text(text)}</pre>")
    return parts


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"<tr><th>{_text(name)}</th><td>{_text(text)}</td></tr>" for name, text in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _short(number: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            return f"{number / (1000 if letter == 'k' else size):.3g}{letter}"
    return str(number)


def _text(text: str) -> str:
    """Return text for HTML; characters that a page cannot hold become U+FFFD."""
    shown = "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "\ufffd" for c in text)
    return escape(shown.encode("utf-8", "replace").decode())


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="sans-serif" font-size="11">' + "".join(parts) + "</svg>"
    )
