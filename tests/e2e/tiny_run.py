"""The tiny run that the tests start: its corpus, its run file, and what it leaves."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launching import ROOT

from llama_ds.config.text import dump_yaml
from llama_ds.data.building.build import build_source
from llama_ds.data.text.tokenizer import train_tokenizer

SEQ_LEN, VOCAB_SIZE, GLOBAL_BATCH, STEPS = 48, 384, 8, 6
MODULES = ("bisect", "heapq", "keyword", "linecache", "queue", "sched", "shelve", "token", "types", "weakref")

DATA: dict[str, Any] = {
    "seed": 5,
    "deepspeed": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}},
    "model": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "data": {"seq_len": SEQ_LEN},
    "compute": {"self_test": "off"},  # test_run_self_test.py turns it on; elsewhere it would only cost time
    "training": {"global_batch": GLOBAL_BATCH, "steps": STEPS},
    "optimizer": {"lr": 3e-3, "warmup_steps": 2},
    "parallel": {"micro_batch": 2},
    "evaluation": {"rows": 16},
}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, changes to the run above
    "alone": (1, {}),
    "pp2": (2, {"parallel.pp": 2, "logging.boards": [{"name": "tensorboard"}], "logging.norms": 2}),
    "pp2_tp2": (4, {"parallel.pp": 2, "parallel.tp": 2, "parallel.sequence_parallel": True}),
    "dp2_zero2": (2, {"deepspeed.zero_optimization.stage": 2}),
    "dp2_zero3": (2, {"deepspeed.zero_optimization.stage": 3}),
    "tied": (2, {"parallel.pp": 2, "model.tie_word_embeddings": True}),
    "tied_zero3": (2, {"parallel.tp": 2, "deepspeed.zero_optimization.stage": 3, "model.tie_word_embeddings": True}),
    "bf16": (2, {"parallel.pp": 2, "deepspeed.bf16.enabled": True}),
}


@dataclass(frozen=True)
class Corpus:
    """A tokenizer, and the shards of the sources "code" and "prose" that were packed with it."""

    tokenizer: Path
    shards: Path


@dataclass(frozen=True)
class Run:
    """A run file and the folder that its run writes to."""

    file: Path
    dir: Path

    @property
    def log(self) -> Path:
        """The log file of its processes."""
        return self.file.with_suffix(".log")

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.dir / "checkpoints"

    @property
    def newest(self) -> Path:
        """The checkpoint that `latest` names."""
        return self.checkpoints / (self.checkpoints / "latest").read_text()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        """The training loss of every step; asserts that each step occurs once and in order."""
        lines = [line for line in self.metrics if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["loss"] for line in lines]

    @property
    def validation_loss(self) -> float:
        """The last validation loss."""
        return self.validation["val_loss"]

    @property
    def validation(self) -> dict[str, float]:
        """The results of the last validation: of all rows, and of each source."""
        return [line for line in self.metrics if "val_loss" in line][-1]


def build_corpus(root: Path) -> Corpus:
    """Train the tokenizer and pack the shards, on modules of the standard library and this project's prose."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    (root / "code").mkdir()
    for module in MODULES:
        (root / "code" / f"{module}.py").write_bytes((stdlib / f"{module}.py").read_bytes())
    texts = [(ROOT / name).read_text() for name in ("LICENSE", "CONTRIBUTING.md")]
    (root / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    patterns = {"code": str(root / "code"), "prose": str(root / "prose.jsonl")}
    tokenizer = train_tokenizer(list(patterns.values()), str(root / "tokenizer"), VOCAB_SIZE)
    for name, pattern in patterns.items():
        build_source(
            name, pattern, tokenizer, str(root / "shards"), SEQ_LEN, 0.2, rows_per_shard=64, document_chars=1500
        )
    return Corpus(Path(tokenizer), root / "shards")


def write_run(root: Path, name: str, corpus: Corpus, changes: Mapping[str, Any]) -> Run:
    """Write root/NAME.yaml, the tiny run on `corpus` with `changes` by dotted key; it writes to root/NAME."""
    data = deepcopy(DATA) | {"name": name, "output_dir": str(root)}
    data["data"]["tokenizer"] = str(corpus.tokenizer)
    weights = {"code": 0.75, "prose": 0.25}
    data["data"]["sources"] = [{"name": n, "path": str(corpus.shards / n), "weight": w} for n, w in weights.items()]
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        section_data = data
        for section in sections:
            section_data = section_data.setdefault(section, {})
        section_data[key] = value
    file = root / f"{name}.yaml"
    file.write_text(dump_yaml(data))
    return Run(file, root / name)
