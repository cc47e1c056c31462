"""A tokenizer of Llama 3's shape from text to text: build, train, resume, evaluate, export, generate.

Tensor parallelism does not divide its vocabulary; the padding shows in no file, no id and no number.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import TRAIN, alone, forked, succeed
from tiny_run import SEQ_LEN, Corpus, Run
from tokenizer_files import RANKS, write_llama3
from transformers import AutoTokenizer

from llama_ds.checkpoint.manifest import describe
from llama_ds.data.building.build import build_source
from llama_ds.data.text.tokenizer import Tokenizer
from tools import convert, evaluate, generate

VOCABULARY = RANKS + 256
TEXT = "def main(argv):\n    return 12345, '漢字'  # <|end_of_text|>"


@pytest.mark.slow
def test_from_text_to_text(
    corpus: Corpus, make_run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta, hf = write_llama3(tmp_path)
    text = str(corpus.shards.parent / "code")
    for name, tokenizer in (("meta", meta), ("hf", hf)):
        build_source("code", text, tokenizer, str(tmp_path / "shards" / name), SEQ_LEN, 0.2, document_chars=1500)
    one, two = (sorted((tmp_path / "shards" / name / "code").glob("*.tar")) for name in ("meta", "hf"))
    assert one and [path.read_bytes() for path in one] == [path.read_bytes() for path in two]

    source = {"name": "code", "path": str(tmp_path / "shards" / "meta" / "code"), "weight": 1.0}
    changes = {
        "data.tokenizer": meta, "data.sources": [source], "data.document_mask": True,
        "model.vocab_size": VOCABULARY,
    }  # fmt: skip
    run = make_run("llama3", changes)
    cut = ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.micro_batch=8", "checkpoint.stop_at=3")
    succeed(forked(2, TRAIN, run.file, *cut), run.log)
    assert "resumed at step 3" in succeed(alone(TRAIN, run.file, "checkpoint.resume=must"), run.log)
    found = describe(str(run.newest))
    assert (found.bos_id, found.eos_id) == (RANKS, RANKS + 1)
    assert (run.newest / "tokenizer.model").read_bytes() == Path(meta).read_bytes()

    exported = tmp_path / "exported"
    assert convert.main([str(run.newest), str(exported), "--to", "hf"]) == 0  # compares logits with transformers'
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((exported / name).read_text())
        assert (ids["bos_token_id"], ids["eos_token_id"]) == (RANKS, RANKS + 1)
    assert json.loads((exported / "config.json").read_text())["vocab_size"] == VOCABULARY
    theirs, ours = AutoTokenizer.from_pretrained(exported), Tokenizer(meta)
    assert len(theirs) == VOCABULARY
    assert theirs(TEXT)["input_ids"] == [RANKS, *ours.encode(TEXT)]

    texts = []
    for folder in (run.dir, exported):
        capsys.readouterr()
        words = [str(folder), "--prompt", "def ", "--temperature", "0", "--max-new-tokens", "8", "--json"]
        assert generate.main(words) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0] == texts[1] and texts[0][0]["text"]

    losses = []
    for words in ([], ["--hf", str(exported)]):  # with masked documents
        assert evaluate.main([str(run.newest), *words, "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses == pytest.approx([run.validation_loss] * 2, rel=1e-5)
