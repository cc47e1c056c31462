"""Formats the results of the data benchmark as a table."""

from __future__ import annotations

from typing import Any

from llama_ds.benchmarks.data.bench import OURS

NAME = 22  # column width in characters
MIB = 2**20
NOT_INSTALLED = "not installed (--streaming-python names an interpreter that has it)"


def table(results: dict[str, Any]) -> str:
    """Return the results as readable text."""
    here = results["machine"]
    tables = {"build": _build, "read": _read, "open": _open, "resume": _resume}
    parts = [make(results[part]) for part, make in tables.items() if part in results]
    lines = [
        f"{here['cpu']}, {here['cores']} cores, load {here['load_1_min']:.1f} before; every measurement in a fresh "
        f"process, in turns, median of {results['repeats']}",
        *(line.rstrip() for part in parts for line in ("", *part)),
    ]
    return "\n".join(lines)


def _build(found: dict[str, Any]) -> list[str]:
    lines = [
        f"build: {found['documents']:,} documents, {found['text_bytes'] / 1e6:.1f} MB, {found['text_ids']:,} ids; "
        'the number after a name is its workers, "ours is" compares at equal workers',
        f"{'':{NAME}} {'s':>8} {'CPU s':>8} {'tokens/s/core':>14} {'tokens/CPU s':>13} {'peak MiB':>9}"
        f" {'ours is':>8} {'by CPU':>7}",
    ]
    for name, row in found["contestants"].items():
        lines.append(
            f"{name:{NAME}} {row['median_s']:8.2f} {row['median_cpu_s']:8.2f} {row['tokens_per_s_per_core']:14,.0f} "
            f"{row['tokens_per_cpu_s']:13,.0f} {row['median_peak_bytes'] / MIB:9.0f}{_times(found, name)}"
        )
    if not any(name.startswith("hf_datasets") for name in found["contestants"]):
        lines.append(f"{'hf_datasets_map':{NAME}} {NOT_INSTALLED}")
    return lines


def _read(found: dict[str, Any]) -> list[str]:
    lines = [
        f"read, one process: {found['rows']:,} rows of {found['seq_len']} in {found['shards']} shards, micro-batches "
        f"of {found['micro_batch']}, files in memory; all read the same rows (digest {found['digest']})",
        f"{'':{NAME}} {'ms/pass':>8} {'CPU ms':>8} {'rows/s':>14} {'tokens/s':>13} {'peak MiB':>9}"
        f" {'ours is':>8} {'by CPU':>7}",
    ]
    for name, row in found["contestants"].items():
        lines.append(
            f"{name:{NAME}} {row['median_s'] * 1e3:8.1f} {row['median_cpu_s'] * 1e3:8.1f} {row['rows_per_s']:14,.0f} "
            f"{row['tokens_per_s']:13,.0f} {row['median_peak_bytes'] / MIB:9.0f}{_times(found, name)}"
        )
    if "mosaicml_streaming" not in found["contestants"]:
        lines.append(f"{'mosaicml_streaming':{NAME}} {NOT_INSTALLED}")
    check = found["check"]
    lines.append(
        f"llama_ds checks shards before their first use, in threads beside training: {check['bytes_per_s'] / 1e6:,.0f} "
        f"MB/s; a pass and its checks one after the other: {check['tokens_per_s']:,.0f} tokens/s"
    )
    return lines


def _times(found: dict[str, Any], name: str) -> str:
    """Return two columns: the speedup of ours by wall time and by CPU time."""
    if name.startswith(OURS):
        return ""
    return f" {found['speed_over'][name]:7.2f}x {found['cpu_speed_over'][name]:6.2f}x"


def _open(found: dict[str, Any]) -> list[str]:
    lines = [
        "open, up to the rows of the first step (others: to their first micro-batch); process: with interpreter and "
        "imports",
        f"{'':{NAME}} {'shards':>8} {'ms':>8} {'process s':>14} {'MiB for it':>13} {'peak MiB':>9}",
    ]
    for shards, contestants in found.items():
        for name, row in contestants.items():
            if "over_bytes" in row:
                lines.append(f"{name:{NAME}} {int(shards):8,} needs more than {row['over_bytes'] / 2**30:.1f} GiB")
                continue
            grown = row["median_peak_bytes"] - row["median_imported_bytes"]
            lines.append(
                f"{name:{NAME}} {int(shards):8,} {row['median_s'] * 1e3:8.1f} {row['median_process_s']:14.2f} "
                f"{grown / MIB:13.1f} {row['median_peak_bytes'] / MIB:9.0f}"
            )
    return lines


def _resume(found: dict[str, Any]) -> list[str]:
    return [
        f"resume {found['run']} at step {found['step']:,}, data-parallel rank {found['dp_rank']} of {found['dp']}: "
        f"{found['tokens']:.3g} tokens, {found['sources']} sources, {found['shards']:,} shards",
        f"  interpreter and imports {found['median_imported_s']:.2f} s, data open {found['median_opened_s']:.2f} s, "
        f"rows of its first step {found['median_resumed_s']:.2f} s ({found['median_resumed_bytes'] / MIB:.0f} MiB)",
        f"  its next {found['next_rows']:,} rows: {found['median_next_rows_s'] * 1e3:.1f} ms more, peak "
        f"{found['median_peak_bytes'] / MIB:.0f} MiB",
    ]
