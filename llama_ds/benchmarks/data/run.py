"""Runs the data benchmark: prepares corpus, tokenizer, sources and manifests, and measures all contestants."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from llama_ds.benchmarks.data import building, opening, reading
from llama_ds.benchmarks.data.bench import DataBench, DataBenchSizes
from llama_ds.benchmarks.data.processes import rival
from llama_ds.benchmarks.data.simulated_data import gather_texts
from llama_ds.data.text.gather import gather_local_corpus
from llama_ds.data.text.tokenizer import Tokenizer, train_tokenizer
from llama_ds.errors import UserError
from llama_ds.machine import machine as this_machine

Tick = Callable[[str], object]


def set_up(
    folder: str,
    corpus: Sequence[str],
    tokenizer: str,
    hf_json: Callable[[Tokenizer], dict[str, Any]],
    sizes: DataBenchSizes,
    repeats: int,
    streaming_python: str,
    tick: Tick,
) -> DataBench:
    """Return the benchmark with its texts and tokenizer in `folder`.

    Args:
        corpus: patterns of texts; empty: texts found on this machine.
        tokenizer: a model; "": train one.
        hf_json: returns the content of tokenizer.json for a tokenizer.
        tick: called with the name of each stage.

    Raises:
        UserError: the documents, the tokenizer or the interpreter cannot be used.
    """
    versions = {"here": rival(sys.executable, "versions").measure()}
    if streaming_python:
        versions["streaming_python"] = _versions(streaming_python)
    tick("gather texts")
    patterns = corpus or list(gather_local_corpus(os.path.join(folder, "corpus"), sizes.corpus_mb).values())
    texts = os.path.join(folder, "texts.jsonl")
    counts = gather_texts(patterns, texts, sizes.corpus_mb)
    tick("train the tokenizer")
    model = Tokenizer(tokenizer or train_tokenizer([texts], os.path.join(folder, "tokenizer"), sizes.vocab_size))
    tokenizer_json = os.path.join(folder, "tokenizer.json")
    with open(tokenizer_json, "w", encoding="utf-8") as file:
        json.dump(hf_json(model), file)
    return DataBench(
        folder, texts, counts["documents"], counts["text_bytes"], model, tokenizer_json, sizes, repeats,
        streaming_python, versions, tick,
    )  # fmt: skip


PARTS = ("build", "read", "open", "resume")


def measure(bench: DataBench, parts: Sequence[str], resumed_run: str) -> dict[str, Any]:
    """Measure `parts` of PARTS; "resume" simulates the run in the run file `resumed_run`."""
    machine = this_machine()
    if {"read", "open"} & set(parts):
        bench.tick("write rows")
        digest = reading.prepare(bench)
        bench.tick("write manifests")
        opening.prepare(bench)
    tasks = {
        "read": lambda: reading.measure(bench, digest),
        "open": lambda: opening.measure(bench),
        "resume": lambda: opening.measure_resume(bench, resumed_run),
        "build": lambda: building.measure(bench),
    }
    return {
        "machine": machine,
        "versions": bench.versions,
        "repeats": bench.repeats,
        "sizes": asdict(bench.sizes),
        "vocab_size": bench.tokenizer.vocab_size,
        **{part: task() for part, task in tasks.items() if part in parts},
    }


def _versions(python: str) -> dict[str, str]:
    """Return the versions of the packages that an interpreter has."""
    try:
        return rival(python, "versions").measure()
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(
            f"{python}: cannot run the benchmark ({reason}); give a Python interpreter with mosaicml-streaming"
        ) from None
