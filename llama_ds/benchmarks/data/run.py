"""Runs the data benchmark: prepares corpus, tokenizer, sources and manifests, and measures all contestants."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
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
FEWEST_SPLIT = 1000  # documents from which some are held out; of fewer, none may be
ANSWER_S = 60.0  # time for another interpreter to name its packages


def set_up(
    folder: str,
    corpus: Sequence[str],
    tokenizer: str | None,
    hf_json: Callable[[Tokenizer], dict[str, Any]],
    sizes: DataBenchSizes,
    repeats: int,
    streaming_python: str | None,
    tick: Tick,
) -> DataBench:
    """Return the benchmark with its texts and tokenizer in `folder`.

    Args:
        corpus: patterns of texts; empty: texts found on this machine.
        tokenizer: a model; None: train one.
        hf_json: returns the content of tokenizer.json for a tokenizer.
        tick: called with the name of each stage.

    Raises:
        UserError: the documents, the tokenizer or the interpreter cannot be used.
    """
    model = None if tokenizer is None else Tokenizer(tokenizer)
    versions = {} if streaming_python is None else {"streaming_python": _versions(streaming_python)}
    tick("gather texts")
    patterns = corpus or list(gather_local_corpus(os.path.join(folder, "corpus"), sizes.corpus_mb).values())
    texts = os.path.join(folder, "texts.jsonl")
    counts = gather_texts(patterns, texts, sizes.corpus_mb)
    if not counts["text_bytes"]:
        raise UserError(f"command line: --corpus {' '.join(corpus)}: holds no text; name files of texts")
    if counts["documents"] < FEWEST_SPLIT:
        sizes = replace(sizes, validation_fraction=0.0)
    tick("train the tokenizer")
    model = model or _trained(texts, os.path.join(folder, "tokenizer"), sizes.vocab_size)
    tokenizer_json = os.path.join(folder, "tokenizer.json")
    with open(tokenizer_json, "w", encoding="utf-8") as file:
        json.dump(hf_json(model), file)
    versions["here"] = rival(sys.executable, "versions").measure()
    return DataBench(
        folder, texts, counts["documents"], counts["text_bytes"], model, tokenizer_json, sizes, repeats,
        streaming_python or "", versions, tick,
    )  # fmt: skip


def _trained(texts: str, prefix: str, vocab_size: int) -> Tokenizer:
    try:
        return Tokenizer(train_tokenizer([texts], prefix, vocab_size))
    except UserError as error:
        raise UserError(
            f"command line: --corpus: its texts make no tokenizer of {vocab_size} ids "
            f"({str(error).partition(': ')[2].partition(';')[0]}); name more texts, or a model with --tokenizer"
        ) from None


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
        return replace(rival(python, "versions"), limit_s=ANSWER_S).measure()
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(
            f"{python}: cannot run the benchmark ({reason}); give a Python interpreter with mosaicml-streaming"
        ) from None
