"""Reads measured runs from CSV files as jobs of the time model; docs/calibration/README.md documents the columns."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from llama_ds.config.context_parallel import NODE_RANKS, WHOLE_ROWS, CpSizes
from llama_ds.config.recompute import POLICIES
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError, shortened
from llama_ds.layout.axes import Axes
from llama_ds.perf.plan.job import OP, Counts, StepJob
from llama_ds.perf.plan.row_programs import program_of, unstated
from llama_ds.schedules.schedule import obstacle

COLUMNS = (
    *("id", "source", "model", "hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "seq_len", "gpu_type"),
    *("n_gpus", "tp", "pp", "dp", "virtual_stages", "sequence_parallel", "recompute", "zero_stage", "micro_batch"),
    *("global_batch_seqs", "measured_kind", "value", "note"),
)
KINDS = (
    *("iteration_s", "tokens_per_s_per_gpu", "mfu_pct", "hfu_pct", "tflops_per_gpu_model", "tflops_per_gpu_hw"),
    "peak_mem_gib",
)
OUT_OF_MEMORY = "OOM"  # in place of a value
ASSUMED_NETWORK = "the network of the machine's description"
_LAYOUT = ("hidden", "layers", "seq_len", "n_gpus", "tp", "pp", "dp", "micro_batch", "global_batch_seqs")

# Links of a source's machines, GB/s in one direction: bus bandwidth within a node if it is not that of twelve NVLinks,
# and a node's network. "N Gbps" in a row's note takes precedence.
_LINKS: tuple[tuple[str, float | None, float | None], ...] = (
    ("BigScience", 77.0, 50.0),  # Jean Zay: four NVLinks between GPUs, four Omni-Path links of 100 Gbit/s
    ("Korthikanti", None, 200.0),  # Selene: eight HDR links
    ("Zero Bubble", None, 100.0),  # RoCE, bandwidth not stated
)
# Machines of a row's gpu_type, and their bus bandwidth within a node if it is not that of the description: an A800 or
# H800 has eight NVLinks of 25 GB/s, an A100 twelve, an H100 eighteen.
_MACHINES: dict[str, tuple[str, float | None]] = {
    "A100-80GB": ("a100-80gb", None),
    "A100-40GB": ("a100-40gb", None),
    "A800-80GB": ("a100-80gb", 230 * 8 / 12),
    "H100-80GB": ("h100-80gb-2023", None),
    "H800-80GB": ("h100-80gb-2023", 360 * 8 / 18),
}
_NUMBER = r"([0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?)"
_GBPS = re.compile(rf"(?:\b([0-9]+) ?x ?)?(?<![0-9.,]){_NUMBER} ?Gbps")
_RING = re.compile(rf"rings of {_NUMBER} GB/s")
_NODE = re.compile(r"\bnodes of ([0-9]+) GPUs")
_CP = re.compile(r"\bcp ([0-9]+)( by all-to-all)?")
_UNKNOWN_SCHEDULE = re.compile(r"\b(?:zb[-_ ]?(?:v|h1|h2|vpp)|v[-_](?:half|min)|dualpipe\w*)\b", re.IGNORECASE)
_MOST = 1e6  # Gbps, GB/s or ranks of a note
_FLAGS = {
    **dict.fromkeys(("", "0", "0.0", "false", "no"), False),
    **dict.fromkeys(("1", "1.0", "true", "yes"), True),
}
_UNSTATED = {  # what an empty field is taken for
    "vocab": "a vocabulary of 50,257",
    "heads": "heads of about 128",
    "ffn": "an inner size of 4 x hidden",
    "recompute": "no recompute",
    "zero_stage": "no ZeRO",
    "sequence_parallel": "no sequence parallelism",
}
_RECOMPUTE = re.compile(rf"({'|'.join((*POLICIES, OP))})(?::1/([1-9]))?")


@dataclass(frozen=True)
class Row:
    """One measured row with its job, or the reason why it has none."""

    line: int
    id: str
    source: str
    gpu: str  # a machine in data/, or the row's own name if it is not described
    kind: str
    value: float  # infinite: the run was out of memory
    links: tuple[float | None, float | None, float | None]  # NVLink, network, ring, GB/s; None: as in the description
    job: StepJob | None
    reserved: bool  # memory as shown by nvidia-smi, not allocated by tensors
    skipped: str = ""
    node_ranks: int | None = None  # GPUs of a node; None: as in the machine's description
    assumed: tuple[str, ...] = ()  # what the row does not state


def read_rows(path: str | Path) -> list[Row]:
    """Return the rows of a CSV file.

    Raises:
        UserError: The file or a column is missing, or a value is invalid; the message names the line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:  # spreadsheets begin a file with a mark
            reader = csv.DictReader(stream)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{path}:1: column {missing[0]} is missing; the header names {', '.join(COLUMNS)} "
                    "(docs/calibration/README.md)"
                )
            rows, lines = list[Row](), dict[tuple[tuple[str, str], ...], int]()
            for fields in reader:
                place = f"{path}:{reader.line_num}"
                if None in fields:
                    raise UserError(f"{place}: has more fields than the header; put a text with commas in quotes")
                row = {k: v or "" for k, v in fields.items() if k}
                first = lines.setdefault(tuple(row.items()), reader.line_num)
                if first != reader.line_num:
                    raise UserError(f"{place}: repeats line {first}, and a run counts once; remove one")
                rows.append(_row(row, place, reader.line_num))
            return rows
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; give the path of a CSV file of measured runs"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not a CSV file in UTF-8: {error}; save it as one") from None


def group_of(source: str) -> str:
    """Return the name by which rows of a source are grouped: its first two words."""
    words = source.replace("/", " ").split()
    return " ".join(words[:2])


def _row(row: dict[str, str], source: str, line: int) -> Row:
    kind = row["measured_kind"]
    if kind not in KINDS:
        raise UserError(f"{source}: measured_kind = {kind!r} is not one of {', '.join(KINDS)}; correct the row")
    if row["recompute"] and not _RECOMPUTE.fullmatch(row["recompute"]):
        raise UserError(
            f"{source}: recompute = {row['recompute']!r} is not one of {', '.join((*POLICIES, OP))}, or one of these "
            "for every n-th layer, such as full:1/2; correct the row"
        )
    value = math.inf if row["value"].strip() == OUT_OF_MEMORY else _number(row, "value", source)
    if value is None or not value > 0:
        raise UserError(
            f"{source}: value = {row['value']!r} is neither a positive number nor {OUT_OF_MEMORY}; correct or remove "
            "the row"
        )
    numbers = {name: _count(row, name, source) for name in (*_LAYOUT, "heads", "kv_heads", "ffn", "vocab")}
    virtual = _count(row, "virtual_stages", source) or 1
    sharded = _flag(row, "sequence_parallel", source)
    zero = _number(row, "zero_stage", source)
    if zero not in (None, 0, 1, 2, 3):
        raise UserError(f"{source}: zero_stage = {row['zero_stage']} is not 0, 1, 2 or 3; correct the row")
    if (numbers["heads"] or 1) > (numbers["hidden"] or math.inf):
        raise UserError(f"{source}: heads = {row['heads']} are more than hidden = {row['hidden']}; correct the row")
    if kind in ("mfu_pct", "hfu_pct") and 100 < value < math.inf:
        raise UserError(
            f"{source}: value = {row['value']} is above 100 percent, and {kind} is a share; correct the row"
        )
    _check_note(row["note"], source)
    links = links_of(row)
    gpu, _ = _MACHINES.get(row["gpu_type"], (row["gpu_type"], None))
    reason = _obstacle(row, numbers)
    job = None
    if not reason:
        found = _job(row, {k: v or 0 for k, v in numbers.items()}, virtual, sharded, zero)
        job, reason = (None, found) if isinstance(found, str) else (found, "")
    reserved, node = "nvidia-smi" in row["note"], _node_ranks(row)
    assumed = _assumed(row, job, links[1], node or NODE_RANKS) if job else ()
    return Row(line, row["id"], row["source"], gpu, kind, value, links, job, reserved, reason, node, assumed)


def _assumed(row: dict[str, str], job: StepJob, network: float | None, node_ranks: int) -> tuple[str, ...]:
    unused = {"vocab": not job.whole_model, "sequence_parallel": job.tp == 1, "ffn": not job.program.gated}
    found = [text for name, text in _UNSTATED.items() if not row[name].strip() and not unused.get(name)]
    if network is None and job.ranks > node_ranks and row["measured_kind"] != "peak_mem_gib":
        found.append(ASSUMED_NETWORK)
    return (*found, *unstated(row))


def _check_note(note: str, source: str) -> None:
    """Refuse numbers of a note that would be read as another one, or as none."""
    form = {"Gbps": _GBPS, "rings of": _RING, "nodes of": _NODE}
    for words, pattern in form.items():
        stated = pattern.search(note)
        numbers = [_float(text) for text in stated.groups() if text] if stated else []
        wrong = any(not 0 < number <= _MOST for number in numbers)
        if wrong or (words == "rings of" and not stated and re.search(r"\brings of [0-9.,]", note)):
            raise UserError(
                f"{source}: note: the number at '{words}' is not one from above 0 to {_MOST:.0e}; correct the note, as "
                "in 1600 Gbps, rings of 5.07 GB/s or nodes of 4 GPUs"
            )
    if (stated := _CP.search(note)) and not 0 < int(stated[1]) <= _MOST:
        raise UserError(f"{source}: note: cp {shortened(stated[1])} is not from 1 to {_MOST:.0e}; correct the note")


def _float(text: str) -> float:
    return float(text.replace(",", ""))


def _obstacle(row: dict[str, str], numbers: dict[str, int | None]) -> str:
    note = row["note"].lower()
    stated = [name for name in _LAYOUT if not numbers[name]]
    if row["measured_kind"] == "peak_mem_gib" and stated == ["global_batch_seqs"]:
        stated = []  # peak memory does not depend on it once the pipeline is full
    if stated:
        return f"{', '.join(stated)} not stated"
    if "fp8" in note and "not fp8" not in note:
        return "fp8"
    if (numbers["pp"] or 1) > 1 and (named := _UNKNOWN_SCHEDULE.search(row["note"])):
        return f"schedule {named[0]}, of which rows state ZB-1p and ZB-2p only"
    tp, pp, dp, n = (numbers[name] or 0 for name in ("tp", "pp", "dp", "n_gpus"))
    cp = _cp(row).ranks
    if tp * pp * dp * cp != n:
        return f"tp {tp} * pp {pp} * {f'cp {cp} * ' if cp > 1 else ''}dp {dp} is not n_gpus {n}"
    return ""


def _node_ranks(row: dict[str, str]) -> int | None:
    stated = _NODE.search(row["note"])
    return int(stated[1]) if stated else None


def _cp(row: dict[str, str]) -> CpSizes:
    """Return how ranks share each row, as the note states it."""
    stated = _CP.search(row["note"])
    if not stated:
        return WHOLE_ROWS
    return CpSizes(all_to_all=int(stated[1])) if stated[2] else CpSizes(ring=int(stated[1]))


def _job(row: dict[str, str], n: dict[str, int], virtual: int, sharded: bool, zero: float | None) -> StepJob | str:
    bare = "one layer" in row["model"].lower()
    program = program_of(row)
    heads = n["heads"] or likely_heads(n["hidden"], n["tp"])
    head_dim = n["hidden"] // heads
    try:
        model = ModelConfig(
            vocab_size=n["vocab"] or (1 if bare else 50257),
            hidden_size=n["hidden"],
            intermediate_size=n["ffn"] or 4 * n["hidden"],
            num_hidden_layers=n["layers"],
            num_attention_heads=heads,
            num_key_value_heads=n["kv_heads"] or heads,
            head_dim=head_dim,
            tie_word_embeddings=_tied(row["note"], program.gated),
        )
    except UserError as error:
        return str(error)
    rows = n["global_batch_seqs"] or n["dp"] * n["micro_batch"] * 4 * n["pp"]
    micro_batches, left = divmod(rows, n["dp"] * n["micro_batch"])
    if not micro_batches or (left and row["measured_kind"] != "peak_mem_gib"):
        return f"global_batch_seqs {rows} is no multiple of dp {n['dp']} * micro_batch {n['micro_batch']}"
    schedule, chunks, warmup = schedule_named(row["note"], n["pp"], virtual)
    reason = obstacle(schedule, n["pp"], micro_batches, chunks, warmup)
    if reason:
        return f"schedule {schedule}: {reason}"
    stages = n["pp"] * chunks
    return StepJob(
        model=model,
        program=program,
        seq_len=n["seq_len"],
        micro_batch=n["micro_batch"],
        micro_batches=micro_batches,
        axes=Axes(pp=n["pp"], dp=n["dp"], cp=_cp(row).ranks, tp=n["tp"]),
        sequence_parallel=sharded and n["tp"] > 1,
        zero_stage=int(zero) if zero is not None else 0,
        state_ranks=min(n["dp"], max(1, (_node_ranks(row) or NODE_RANKS) // n["tp"])) if "HSDP" in row["note"] else 0,
        schedule=schedule,
        chunks=chunks,
        extra_warmup=warmup,
        stages=stages_of(n["layers"], stages, row["recompute"] or "none"),
        whole_model=not bare,
        cp_sizes=_cp(row),
        launch_blocking=_launch_blocking(row, n["n_gpus"]),
    )


def _tied(note: str, gated: bool) -> bool:
    """Whether embedding and head share their weights; those of LLaMA-like models do only where the note says so."""
    return "head tied" in note if gated else "not tied" not in note


def _launch_blocking(row: dict[str, str], gpus: int) -> bool:
    """Whether the host waits for every kernel; BigScience says so of its runs on 40 nodes and more only."""
    return "CUDA_LAUNCH_BLOCKING=1" in row["note"] and (gpus >= 320 or ">=320 GPUs" not in row["note"])


def links_of(row: dict[str, str]) -> tuple[float | None, float | None, float | None]:
    """Return (NVLink, network, ring) in GB/s as stated by the row or its source, None if not stated."""
    nvlink, network = next(((a, b) for name, a, b in _LINKS if name in row["source"]), (None, None))
    nvlink = nvlink or _MACHINES.get(row["gpu_type"], ("", None))[1]
    stated, ring = _GBPS.search(row["note"]), _RING.search(row["note"])
    if stated:
        network = int(stated[1] or 1) * _float(stated[2]) / 8
    return nvlink, network, _float(ring[1]) if ring else None


def schedule_named(note: str, pp: int, virtual: int) -> tuple[str, int, int]:
    """Return (schedule, chunks, extra warm-up) from a row's note; the default is 1F1B."""
    if pp == 1:
        return "1f1b", 1, 0
    if "ZB-1p" in note:
        return "zb_h1", 1, 0
    if "ZB-2p" in note:
        return "zb_h1", 1, 1
    return ("interleaved", virtual, 0) if virtual > 1 else ("1f1b", 1, 0)


def likely_heads(hidden: int, tp: int) -> int:
    """Return the head count for a row without one: a multiple of tp that divides D, with head size nearest to 128."""
    fits = [n for n in range(tp, hidden + 1, tp) if hidden % n == 0]
    return min(fits or [1], key=lambda n: abs(hidden / n - 128))


def stages_of(layers: int, stages: int, recompute: str) -> tuple[Counts, ...]:
    """Return the layers of each stage, as even as possible; the last and first stages are the first to have fewer.

    Args:
        recompute: a policy, or a policy for every n-th layer, such as full:1/2.
    """
    parsed = _RECOMPUTE.fullmatch(recompute)
    assert parsed
    policy, every = parsed[1], int(parsed[2] or 1)
    each = math.ceil(layers / stages)
    counts = [each] * stages
    order = [i for pair in zip(range(stages - 1, -1, -1), range(stages), strict=True) for i in pair]
    for stage in list(dict.fromkeys(order))[: each * stages - layers]:
        counts[stage] -= 1
    return tuple(
        tuple((name, n) for name, n in ((policy, count // every), ("none", count - count // every)) if n)
        for count in counts
    )


def _number(row: dict[str, str], name: str, source: str) -> float | None:
    text = row[name].strip()
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{source}: {name} = {text!r} is not a number; correct the row, or leave the field empty")
    return number


def _count(row: dict[str, str], name: str, source: str) -> int | None:
    number = _number(row, name, source)
    if number is None:
        return None
    if number < 1 or number != int(number):
        raise UserError(f"{source}: {name} = {row[name]} is not a positive whole number; correct the row")
    return int(number)


def _flag(row: dict[str, str], name: str, source: str) -> bool:
    """Return a yes or no; an empty field, not stated, is no."""
    text = row[name].strip()
    if text.lower() not in _FLAGS:
        raise UserError(f"{source}: {name} = {text!r} is not 0 or 1; correct the row, or leave the field empty")
    return _FLAGS[text.lower()]
