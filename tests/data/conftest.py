"""One small corpus, one tokenizer and two built sources for all data tests."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
from built_sources import SEQ_LEN, VOCAB_SIZE, Built

from llama_ds.data.building.build import build_source
from llama_ds.data.text.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("built")
    modules = sorted((Path(sysconfig.get_paths()["stdlib"]) / "json").glob("*.py"))
    prose = [{"text": f"Chapter {i}.\n\n" + f"It was the {i}th day of the voyage; " * 40} for i in range(60)]
    (root / "prose.jsonl").write_text("".join(json.dumps(record) + "\n" for record in prose))
    (root / "code").mkdir()
    for module in modules:
        (root / "code" / module.name).write_bytes(module.read_bytes())
    code, prose_path = str(root / "code"), str(root / "prose.jsonl")
    tokenizer = train_tokenizer([code, prose_path], str(root / "tokenizer"), VOCAB_SIZE)
    build_source("code", code, tokenizer, str(root / "shards"), SEQ_LEN, 0.2, rows_per_shard=20, document_chars=2000)
    build_source("prose", prose_path, tokenizer, str(root / "shards"), SEQ_LEN, 0.2, rows_per_shard=20)
    return Built(code, prose_path, tokenizer, root / "shards")
