"""Model card of an export: README.md with YAML front matter, as Hugging Face's hub reads it, and the loss curve.

It says what the checkpoint, the run's metrics.jsonl and machines.jsonl and the manifests of its sources say. What none
of them says is named as not recorded; nothing is guessed.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

from llama_ds import __version__
from llama_ds.benchmarks.evaluation_results import benchmark_rows
from llama_ds.checkpoint.load_model import run_of
from llama_ds.checkpoint.manifest import DESCRIPTION, Description, describe
from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.config.batch_stages import batches_of, tokens_before
from llama_ds.config.run_files import MACHINES, METRICS
from llama_ds.config.schema import ModelConfig, RunConfig, SourceConfig
from llama_ds.data.source.manifest import MANIFEST, Manifest, parse_manifest
from llama_ds.layout.flops import flops_per_token, parameter_count
from llama_ds.perf.loss_curve import loss_curve

CARD, CURVE = "README.md", "loss_curve.svg"
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors")
NOT_RECORDED = "not recorded"

Row = tuple[str, str]


@dataclass(frozen=True)
class _Metrics:
    """What metrics.jsonl says up to the checkpoint's step."""

    train: list[tuple[float, float]] = field(default_factory=list)  # (tokens, loss)
    validation: list[tuple[float, float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # tokens per second
    read: dict[str, Any] = field(default_factory=dict)  # tokens and epochs of each source, as last reported


@dataclass(frozen=True)
class Stated:
    """What the publisher adds to what the run has recorded."""

    energy_kwh: float | None = None
    results: tuple[str, ...] = ()  # files of lm-eval


def card_files(files: ModelFiles, name: str, dtype: str, stated: Stated | None = None) -> dict[str, bytes]:
    """Return the contents of the card's files by name; `name` is the model's, `dtype` that of the export.

    Raises:
        UserError: the checkpoint, or a file of results, is damaged.
    """
    stated = stated or Stated()
    benchmarks = list(benchmark_rows(stated.results))
    parts = [_front_matter(), f"# {name}\n", _section("Model", _model(files, dtype))]
    description = describe(files.path) if os.path.exists(os.path.join(files.path, DESCRIPTION)) else None
    if description is None or "training" not in description.run:
        parts.append("## Training\n\nData, settings, losses, hardware and energy of the training: not recorded.\n")
        if stated.energy_kwh is not None:
            parts.append(_section("Energy", iter([("Energy", _energy(stated))])))
        if benchmarks:
            parts.append(_section("Evaluation", iter(benchmarks)))
        parts.append(_section("Software", _software([])))
        return {CARD: "\n".join(parts).encode()}
    run = run_of(files.path, description)
    metrics, machines = _metrics(files.path, description, run), _machines(files.path, description)
    parts.append(_section("Training", _training(description, run, metrics, machines, _energy(stated))))
    parts.append(_section("Data", _data(run, description, metrics)))
    curve = {}
    if metrics.train:
        parts.append(f"## Loss\n\n![Training and validation loss over tokens]({CURVE})\n")
        curve = {CURVE: loss_curve(metrics.train, metrics.validation).encode()}
    parts.append(_section("Evaluation", _evaluation(metrics, benchmarks)))
    parts.append(_section("Software", _software(machines)))
    return {CARD: "\n".join(parts).encode(), **curve}


def _front_matter() -> str:
    """Return the metadata that the hub reads; a license is the publisher's to choose."""
    return "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- llama\n- llama_ds\n---\n"


def _model(files: ModelFiles, dtype: str) -> Iterator[Row]:
    model = files.model
    yield "Architecture", "LLaMA (LlamaForCausalLM), decoder only"
    yield "Parameters", f"{parameter_count(model):,}"
    yield "Layers", str(model.num_hidden_layers)
    yield "Hidden size; feed-forward", f"{model.hidden_size}; {model.intermediate_size}"
    heads = f"{model.num_attention_heads} query, {model.num_key_value_heads} key-value, of size {model.head_dim}"
    yield "Attention heads", heads
    yield "Rotary embedding", _rotary(model)
    yield "RMS norm epsilon", f"{model.rms_norm_eps:g}"
    yield "Vocabulary", f"{model.vocab_size:,} rows" + (", tied head" if model.tie_word_embeddings else "")
    yield "Sequence length", f"{files.seq_len:,} tokens"
    yield "Weights", dtype


def _rotary(model: ModelConfig) -> str:
    scaling = model.rope_scaling
    return f"theta {model.rope_theta:g}" + (f", scaled by {scaling.factor:g} (Llama 3)" if scaling else "")


def _training(
    description: Description, run: RunConfig, metrics: _Metrics, machines: list[dict[str, Any]], energy: str
) -> Iterator[Row]:
    training, optimizer = run.training, run.optimizer
    yield "Steps", f"{description.step:,} of {training.steps:,}"
    yield "Tokens", f"{description.tokens:,}"
    batches = batches_of(training)
    for rows, start in zip(batches.rows, batches.starts, strict=True):
        since = f" from step {start:,}" if len(batches.rows) > 1 else ""
        text = f"{rows:,} rows of {run.data.seq_len:,}, {rows * run.data.seq_len:,} tokens"
        yield f"Global batch{since}", text
    yield "Compute", f"{description.tokens * flops_per_token(run.model, run.data.seq_len):.3g} FLOPs of the model"
    betas = ", ".join(f"{beta:g}" for beta in optimizer.betas)
    muon = f"Muon with momentum {optimizer.momentum:g} for hidden matrices, " if optimizer.name == "muon" else ""
    rule = "Lion" if optimizer.name == "lion" else f"{muon}AdamW, epsilon {optimizer.eps:g}"
    yield "Optimizer", f"{rule}, betas {betas}, weight decay {optimizer.weight_decay:g}"
    warmup = f"{optimizer.warmup_steps:,} warm-up steps, then {optimizer.schedule}"
    yield "Learning rate", f"{optimizer.lr:g}, {warmup}, to {optimizer.min_lr_ratio:g} of it"
    yield "Gradient clipping", f"{optimizer.clip:g}"
    yield "Precision", description.dtype
    yield "Seed", str(run.seed)
    if run.checkpoint.start_from:
        yield "Started from", os.path.basename(run.checkpoint.start_from.rstrip("/"))
    keys = ("world", "pp", "tp", "dp")
    if set(keys) <= set(description.layout):
        yield "Ranks at this checkpoint", ", ".join(f"{key} {description.layout[key]}" for key in keys)
    if metrics.rates:
        yield "Throughput", f"{median(metrics.rates):,.0f} tokens/s, median of the reported steps"
    yield "Hardware", _distinct(f"{line['ranks']} ranks, {line['device']}" for line in machines)
    yield "Energy", energy


def _energy(stated: Stated) -> str:
    return NOT_RECORDED if stated.energy_kwh is None else f"{stated.energy_kwh:g} kWh, as the publisher states"


def _data(run: RunConfig, description: Description, metrics: _Metrics) -> Iterator[Row]:
    for source in run.data.sources:
        read = metrics.read.get(f"tokens/{source.name}")
        epochs = metrics.read.get(f"epochs/{source.name}")
        parts = [f"weight {source.weight:g}"]
        if read is not None and epochs is not None:
            parts.append(f"read {read:,} tokens, {epochs:.3f} epochs")
        yield source.name, "; ".join([*parts, *_contents(source)])
    attention = "inside documents only" if run.data.document_mask else "across the documents of a row"
    yield "Attention in training", attention
    skipped = [f"{skip.steps} steps at {skip.at_step}" for skip in run.data.skip]
    if skipped:
        yield "Skipped", ", ".join(skipped)


def _contents(source: SourceConfig) -> Iterator[str]:
    """Yield what the manifest of a source says, if it is on this machine."""
    manifest = _manifest(source)
    if manifest is None:
        yield "contents not recorded here (its manifest is not on this machine)"
        return
    train = manifest.splits["train"]
    yield f"holds {train.documents:,} documents, {train.ids:,} tokens"
    if validation := manifest.splits["validation"].documents:
        yield f"{validation:,} documents held out for validation"
    if train.bad:
        yield f"{len(train.bad)} damaged shards left out"
    if manifest.inputs:
        yield f"built from {sum(build.files for build in manifest.inputs):,} files"
        dedup = [bool(build.settings.get("dedup")) for build in manifest.inputs]
        yield "duplicates removed" if all(dedup) else "duplicates not removed"
    yield f"tokenizer {manifest.tokenizer_sha256[:12]}"


def _manifest(source: SourceConfig) -> Manifest | None:
    path = os.path.join(os.path.expanduser(source.path), MANIFEST)
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return parse_manifest(file.read(), path)


def _evaluation(metrics: _Metrics, benchmarks: list[Row]) -> Iterator[Row]:
    if metrics.train:
        tokens, loss = metrics.train[-1]
        yield "Training loss", f"{loss:.4f} nats per token, at {tokens:,.0f} tokens"
    if metrics.validation:
        tokens, loss = metrics.validation[-1]
        yield "Validation loss", f"{loss:.4f} nats per token on held-out rows, at {tokens:,.0f} tokens"
    else:
        yield "Validation loss", NOT_RECORDED
    yield from benchmarks or [("Benchmarks", NOT_RECORDED)]


def _software(machines: list[dict[str, Any]]) -> Iterator[Row]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    yield "Of this export", f"llama_ds {__version__}, Python {platform.python_version()}, {', '.join(found)}"
    versions = (line["versions"] for line in machines)
    yield "Of the training", _distinct(", ".join(f"{name} {v}" for name, v in found.items()) for found in versions)


def _distinct(texts: Iterable[str]) -> str:
    return "; then ".join(dict.fromkeys(texts)) or NOT_RECORDED


def _run_file(folder: str, description: Description, name: str) -> str | None:
    """Return the path of a file in the folder of the run that wrote a checkpoint (runs/NAME/checkpoints/TAG)."""
    checkpoints = os.path.dirname(os.path.abspath(folder))
    path = os.path.join(os.path.dirname(checkpoints), name)
    converted = description.optimizer_steps is None  # and so it may lie in another run's folder
    return None if converted or os.path.basename(checkpoints) != "checkpoints" or not os.path.isfile(path) else path


def _machines(folder: str, description: Description) -> list[dict[str, Any]]:
    """Return the starts of a run that trained steps of its checkpoint."""
    path = _run_file(folder, description, MACHINES)
    if path is None:
        return []
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    until = [*(line["step"] for line in lines[1:]), description.step]
    return [line for line, end in zip(lines, until, strict=True) if line["step"] < min(end, description.step)]


def _metrics(folder: str, description: Description, run: RunConfig) -> _Metrics:
    """Return what the run of a checkpoint (runs/NAME/checkpoints/TAG) has reported up to its step."""
    found = _Metrics()
    path = _run_file(folder, description, METRICS)
    if path is None:
        return found
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    for line in lines:
        if line["step"] > description.step:
            continue
        if "loss" in line:
            found.train.append((line["tokens"], line["loss"]))
            found.rates.append(line["tokens_per_s"])
        elif "val_loss" in line:
            found.validation.append((tokens_before(run, line["step"]), line["val_loss"]))
        else:
            found.read.update(line)
    return found


def _section(title: str, rows: Iterator[Row]) -> str:
    lines = [f"| {_cell(name)} | {_cell(text)} |" for name, text in rows]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines, ""])


def _cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
