"""Reports as JSON data and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llama_ds.data.report.collect import SourceReport

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
TEXT_CHARS = 300  # longest sample row in the text


def as_data(report: SourceReport, shared: float) -> dict[str, Any]:
    """Return a report as JSON data; `shared` is the share of its documents that other sources have too."""
    manifest, lengths, digests = report.manifest, report.lengths, report.digests
    return {
        "folder": report.folder,
        "source": manifest.source,
        "seq_len": manifest.seq_len,
        "vocab_size": manifest.vocab_size,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "splits": {
            name: {
                "documents": split.documents,
                "tokens": split.ids,
                "rows": split.rows,
                "filler": split.filler(manifest.seq_len),
                "shards": split.shards,
                "damaged_shards": list(split.bad),
            }
            for name, split in manifest.splits.items()
        },
        "documents": lengths.documents,
        "tokens": lengths.tokens,
        "lengths": {
            "shortest": lengths.shortest,
            "mean": lengths.tokens / max(1, lengths.documents),
            "longest": lengths.longest,
            "quantiles": {f"{share:g}": lengths.quantile(share) for share in QUANTILES if lengths.documents},
            "histogram": [asdict(bar) for bar in lengths.bars()],
        },
        "duplicates": {
            "share": digests.share_of_copies,
            "sampled_texts": digests.share_of_texts,
            "most_copied": [asdict(copies) for copies in report.most_copied],
            "share_in_other_sources": shared,
        },
        "bytes_per_token": report.sample and report.sample.bytes_per_token,
        "decoded_rows": report.sample and report.sample.rows,
        "samples": [asdict(row) for row in report.sample.shown] if report.sample else [],
    }


def shared_with_others(reports: Sequence[SourceReport]) -> list[float]:
    """Return for each source the share of its documents whose text another source has too."""
    samples = [report.digests for report in reports]
    return [sample.share_in([*samples[:i], *samples[i + 1 :]]) for i, sample in enumerate(samples)]


def remarks(report: SourceReport) -> list[str]:
    """Return what limits the report."""
    found = []
    stated = sum(split.documents for split in report.manifest.splits.values())
    if report.unread:
        found.append(f"{report.folder}: without {report.unread} shards that the manifest lists as damaged")
    elif stated != report.lengths.documents:
        found.append(
            f"{report.folder}: the indexes name {report.lengths.documents:,} documents, the manifest {stated:,}; "
            "check the source with tools/shards.py verify"
        )
    return found


def facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the numbers of a source (`as_data`) as pairs of name and text."""
    lengths, duplicates = data["lengths"], data["duplicates"]
    quantiles = ", ".join(f"{float(share):.0%} {length:,}" for share, length in lengths["quantiles"].items())
    exact = "" if duplicates["sampled_texts"] == 1 else f" (from {duplicates['sampled_texts']:.2%} of the texts)"
    found = [("documents", f"{data['documents']:,}"), ("tokens", f"{data['tokens']:,} with bos and eos")]
    found += [(name, _split_text(split, data["seq_len"])) for name, split in data["splits"].items()]
    found += [
        ("length", f"{lengths['shortest']:,} to {lengths['longest']:,} tokens, mean {lengths['mean']:,.1f}"),
        ("quantiles", quantiles),
        ("duplicates", f"{duplicates['share']:.2%} of the documents repeat an earlier one{exact}"),
        ("in other sources", f"{duplicates['share_in_other_sources']:.2%} of the documents{exact}"),
    ]
    if data["bytes_per_token"] is not None:
        found.append(("bytes per token", f"{data['bytes_per_token']:.3f}, from {data['decoded_rows']:,} rows"))
    return found


def _split_text(split: Mapping[str, Any], seq_len: int) -> str:
    shards, damaged = split["shards"], split["damaged_shards"]
    return (
        f"{split['documents']:,} documents, {split['tokens']:,} tokens, {split['rows']:,} rows of {seq_len}, "
        f"{split['filler']:,} ids of filler, {shards:,} shard{'s' * (shards != 1)}"
        + (f", {len(damaged)} of them damaged" if damaged else "")
    )


def as_text(data: Mapping[str, Any]) -> str:
    """Return the report of a source (`as_data`) as text."""
    lines = [f"{data['folder']}: source {data['source']}"]
    lines += [f"  {name:17} {text}" for name, text in facts(data)]
    for copies in data["duplicates"]["most_copied"]:
        lines.append(f"  {'copied':17} {copies['documents']:,} documents have the text of {copies['place']}")
    for row in data["samples"]:
        text = row["text"] if len(row["text"]) <= TEXT_CHARS else row["text"][:TEXT_CHARS] + "..."
        lines.append(f"  {'sample':17} {row['shard']}, row {row['row']}: {text!r}")
    return "\n".join(lines)
