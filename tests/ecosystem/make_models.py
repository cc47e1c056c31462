"""Make small models with tokenizers of each kind, export them, and note what this project computes with them.

Usage: python tests/ecosystem/make_models.py FOLDER, with the project and its tests on PYTHONPATH

FOLDER/NAME has a run's checkpoint (run), its exports (hf, model.gguf, q8_0.gguf), expected.json and logits.npy.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from tokenizer_files import ODD, write_llama3
from written_ranks import SHAPES, write_rank

from llama_ds.checkpoint import store
from llama_ds.checkpoint.carried import TOKENIZER
from llama_ds.checkpoint.load_model import load_model, open_model
from llama_ds.checkpoint.manifest import Description, write_manifest
from llama_ds.config.run_file import resolved
from llama_ds.config.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from llama_ds.data.text.tokenizer import Tokenizer, train_tokenizer
from llama_ds.layout.layout import Layout
from tools import convert

TEXTS, GREEDY, SEQ_LEN = 3000, 50, 256
PADDING = 24  # rows of zeros after the vocabulary's
PROMPTS = ("def main():\n    return", "The first 2048 words", "漢字 é\n")
MODULES = Path(sysconfig.get_paths()["stdlib"]) / "json"


def main(folder: Path) -> None:
    """Make all models."""
    folder.mkdir(parents=True)
    wide = replace(SHAPES["gqa"], hidden_size=64, head_dim=32, intermediate_size=96)
    plain = train_tokenizer([str(MODULES)], str(folder / "plain"), 800)
    meta, _ = write_llama3(folder)
    tokenizers = {"sentencepiece": plain, "sentencepiece-prefix": _with_prefix(folder), "llama3": meta}
    shapes = {"llama3": replace(wide, rope_scaling=SHAPES["llama3"].rope_scaling, tie_word_embeddings=True)}
    for name, path in tokenizers.items():
        _make(folder / name, path, replace(shapes.get(name, wide), vocab_size=Tokenizer(path).vocab_size))


def _make(folder: Path, tokenizer: str, model: ModelConfig) -> None:
    run, ours = _run(tokenizer, model), Tokenizer(tokenizer)
    checkpoint = folder / "run" / "checkpoints" / store.tag_of(1)
    checkpoint.mkdir(parents=True)
    description = Description(1, 1, 1, "fp32", Layout(micro_batch=1).as_data(), resolved(run), optimizer_steps=1)
    description = replace(description, bos_id=ours.bos_id, eos_id=ours.eos_id)
    records = [write_rank(run, str(checkpoint), 0, 1, True, "fp32")]
    shutil.copyfile(tokenizer, checkpoint / TOKENIZER)
    write_manifest(str(checkpoint), description, records)
    (checkpoint.parent / store.LATEST).write_text(checkpoint.name)
    rows = model.vocab_size + PADDING
    quantized = ["q8_0.gguf", "--to", "gguf", "--dtype", "q8_0"]
    for words in (["hf", "--to", "hf"], ["model.gguf", "--to", "gguf"], quantized):
        if convert.main([str(folder / "run"), str(folder / words[0]), *words[1:], "--vocab-size", str(rows)]):
            sys.exit(f"{folder}: the conversion to {words[0]} failed")
    _expect(folder, ours, rows)


@torch.no_grad()
def _expect(folder: Path, ours: Tokenizer, rows: int) -> None:
    loaded = load_model(open_model(str(folder / "run"), None, rows), "cpu", torch.float32, document_mask=False)
    prompts = [[ours.bos_id, *ours.encode(prompt)] for prompt in PROMPTS]
    greedy = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(GREEDY):
            logits = loaded(torch.tensor([ids]))[0, -1]
            logits[ours.eos_id] = -torch.inf  # others would stop there
            ids.append(int(logits.argmax()))
        greedy.append(ids[len(prompt) :])
    np.save(folder / "logits.npy", loaded(torch.tensor(prompts[:1]))[0].numpy())
    texts = _random_texts()
    log_probs = loaded(torch.tensor(prompts[1:2]))[0].log_softmax(-1)
    scores = [log_probs[i, token].item() for i, token in enumerate(prompts[1][1:])]
    context = len(ours.encode(PROMPTS[1].split(" ")[0]))
    expected = {
        "bos": ours.bos_id,
        "eos": ours.eos_id,
        "prompts": PROMPTS,
        "prompt_ids": prompts,
        "texts": texts,
        "ids": [ours.encode(text) for text in texts],
        "greedy": greedy,
        "rolling": sum(scores),  # log-likelihood of the second prompt, and of it after its first word
        "continuation": sum(scores[context:]),
    }
    (folder / "expected.json").write_text(json.dumps(expected))


def _random_texts() -> list[str]:
    """Return texts of words, code, white space and characters of all planes, without U+2581 (docs/conversion.md)."""
    rng = random.Random(19)
    words = [*"".join(path.read_text("utf-8") for path in sorted(MODULES.glob("*.py"))).split(" "), *ODD.split(" ")]
    planes = [chr(i) for i in (*range(0x20, 0x250), *range(0x370, 0x530), *range(0x3040, 0x3100), 0x1F600, 0x10FFFF)]
    kinds = (
        lambda: rng.choice(words),
        lambda: rng.choice(planes),
        lambda: " " * rng.randrange(5),
        lambda: rng.choice("\n\t\r\x00'\"<>|0123456789"),
        lambda: chr(rng.randrange(0xD800)),
    )
    found = ["", " ", ODD, "<s>", "</s> a", "<|end_of_text|>", "<unk>"]
    while len(found) < TEXTS:
        found.append(rng.choice(("", " ")).join(rng.choice(kinds)() for _ in range(rng.randrange(1, 30))))
    return [text.replace("\u2581", "_") for text in found]


def _with_prefix(folder: Path) -> str:
    """Train a tokenizer that puts a space before every text, as LLaMA's own does."""
    lines = [line for path in sorted(MODULES.glob("*.py")) for line in path.open()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "prefix"), vocab_size=700, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    return str(folder / "prefix.model")


def _run(tokenizer: str, model: ModelConfig) -> RunConfig:
    return RunConfig(
        name="small",
        seed=5,
        output_dir="runs",
        model=model,
        data=DataConfig(tokenizer, SEQ_LEN, (SourceConfig("code", os.devnull, 1.0),)),
        training=TrainingConfig(1, 1, SEQ_LEN, initializer_range=0.2),
        optimizer=OptimizerConfig(lr=1e-3),
        parallel=ParallelConfig(micro_batch=1),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
