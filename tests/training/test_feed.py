"""Batches of four ranks: read once per host, equal on both ends of the pipeline, with damage replaced alike."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_ds.config.run_file import load_run
from llama_ds.config.text import dump_yaml
from llama_ds.data.building.build import build_source
from llama_ds.data.documents import document_begins
from llama_ds.data.filler import count_labels
from llama_ds.data.order import BadShard
from llama_ds.data.source.manifest import checksum_line, checksums_name, shard_name
from llama_ds.data.stream import Dataset, open_data
from llama_ds.data.text.tokenizer import train_tokenizer
from tests import warm

SEQ_LEN, VOCAB_SIZE, BATCH, RANKS = 16, 340, 8, 4
STEPS = 24

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a separate host name per process needs root")

Outcome = list[dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Intact shards, and copies that are damaged or different."""
    root = tmp_path_factory.mktemp("feed")
    for name, text in (("a", "one sentence of the first source"), ("b", "of the second another one")):
        records = [{"text": f"{i} {text} {i * i} " * 12} for i in range(60)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = [str(root / "a.jsonl"), str(root / "b.jsonl")]
    tokenizer = train_tokenizer(files, str(root / "tokenizer"), VOCAB_SIZE)
    for name, file in zip("ab", files, strict=True):
        build_source(name, file, tokenizer, str(root / "sound"), SEQ_LEN, 0.1, rows_per_shard=40)
    build_source("a", files[0], tokenizer, str(root / "longer"), SEQ_LEN, 0.1, rows_per_shard=40)
    build_source("b", files[0], tokenizer, str(root / "longer"), SEQ_LEN, 0.1, rows_per_shard=40)
    for copy in ("flipped", "cut", "other rows", "other rows later", "spoilt"):
        shutil.copytree(root / "sound", root / copy)
    flip(root / "flipped" / "b" / shard_name("train", first_shards(root)[0]))
    cut = root / "cut" / "b" / shard_name("train", first_shards(root)[0])
    cut.write_bytes(cut.read_bytes()[:5000])
    for shard in sorted((root / "other rows" / "a").glob("train-*.tar")):
        reverse_rows(shard)
    reverse_rows(root / "other rows later" / "a" / shard_name("train", late_shard(root)))
    return root


def first_shards(root: Path) -> list[int]:
    """The shards of source b in the order in which the run first reads them."""
    data = dataset(root)
    rows = data.order.rows(0, STEPS * BATCH)
    shards, _ = data.sources.train[1].geometry.locate(rows.row[rows.source == 1])
    return list(dict.fromkeys(shards.tolist()))


def late_shard(root: Path) -> int:
    """A shard of source a that the first step does not read, and the first period does."""
    data = dataset(root)
    source, read = data.sources.train[0], []
    for step in range(4):
        rows = data.order.at(step)
        read.append(set(source.geometry.locate(rows.row[rows.source == 0])[0].tolist()))
    return min(set.union(*read[1:]) - read[0])


def dataset(root: Path) -> Dataset:
    return open_data(load_run(run_file(root, "sound")))


def flip(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[520] ^= 1
    shard.write_bytes(data)


def reverse_rows(shard: Path) -> None:
    """Reverse the rows of a shard and update its checksum, so that it is intact but different."""
    data = bytearray(shard.read_bytes())
    stride, width = 1024, 2 * (SEQ_LEN + 1)
    starts = [start for start in range(512, len(data) - stride, stride) if data[start - 512]]
    rows = [data[start : start + width] for start in starts]
    for start, row in zip(starts, reversed(rows), strict=True):
        data[start : start + width] = row
    shard.write_bytes(data)
    index = shard.parent / checksums_name("train", 0)
    number = int(shard.stem.split("-")[1])
    lines = index.read_text().splitlines(keepends=True)
    lines[number] = checksum_line("train", number, hashlib.sha256(data).hexdigest())
    index.write_text("".join(lines))


def run_file(root: Path, shards: str) -> str:
    folder = f"pipe:cat {root}/sound/%s/{{}}" if shards == "remote" else f"{root}/{shards}/%s"
    sources = [{"name": n, "path": folder % n, "weight": w} for n, w in (("a", 0.6), ("b", 0.4))]
    path = root / f"{shards}.yaml"
    model = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 4}
    run = {
        "name": "run",
        "output_dir": str(root / "runs"),
        "deepspeed": {"bf16": {"enabled": False}, "zero_optimization": {"stage": 1}},
        "model": {**model, "num_attention_heads": 4},
        "data": {
            "tokenizer": str(root / "tokenizer.model"),
            "seq_len": SEQ_LEN,
            "sources": sources,
            "check_interval": 4,
        },
        "training": {"global_batch": BATCH, "steps": STEPS},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "parallel": {"pp": 2, "tp": 2, "micro_batch": 2},
    }
    path.write_text(dump_yaml(run))
    return str(path)


def scenario(root: Path, shards: list[str], **change: Any) -> dict[str, Any]:
    return {
        "run_files": [run_file(root, s) for s in shards],
        "hosts": ["one"] * RANKS,
        "reads": [True] * RANKS,
        "dp_ranks": [0] * RANKS,
        "steps": [0, STEPS],
        "overrides": [],
        "spoil": "",
        "spoil_after": [],
        **change,
    }


TWO_HOSTS = ["one", "one", "two", "two"]
PP4 = {"reads": [True, False, False, True], "overrides": ["parallel.pp=4", "parallel.tp=1"]}
DP2 = {"dp_ranks": [0, 1, 0, 1], "overrides": ["parallel.tp=1"]}
CP2 = {"overrides": ["parallel.tp=1", "parallel.cp=2", "parallel.cp_method=ring", "data.document_mask=true"]}


def scenarios(root: Path) -> dict[str, dict[str, Any]]:
    sound, half = ["sound"] * RANKS, ["sound", "sound"]
    every = {
        "one host": scenario(root, sound),
        "two hosts": scenario(root, sound, hosts=TWO_HOSTS),
        "pp 4": scenario(root, sound, hosts=TWO_HOSTS, **PP4),
        "pp 2 dp 2": scenario(root, sound, hosts=TWO_HOSTS, **DP2),
        "every step": scenario(root, sound, hosts=TWO_HOSTS, overrides=["data.check_interval=1"]),
        "from step 7": scenario(root, sound, steps=[7, STEPS]),
        "pp 2 cp 2": scenario(root, sound, hosts=TWO_HOSTS, steps=[7, STEPS], **CP2),
        "one host's copy is damaged": scenario(root, [*half, "flipped", "flipped"], hosts=TWO_HOSTS),
        "each host's copy is damaged": scenario(root, ["flipped", "flipped", "cut", "cut"], hosts=TWO_HOSTS),
        "from step 7 damaged": scenario(root, [*half, "flipped", "flipped"], hosts=TWO_HOSTS, steps=[7, STEPS]),
        "none may be": scenario(
            root, [*half, "flipped", "flipped"], hosts=TWO_HOSTS, overrides=["data.max_bad_shards=0"]
        ),
        "other rows": scenario(root, [*half, "other rows", "other rows"], hosts=TWO_HOSTS),
        "other rows later": scenario(root, [*half, "other rows later", "other rows later"], hosts=TWO_HOSTS),
        "other manifest": scenario(root, ["sound", "longer", "sound", "sound"], hosts=TWO_HOSTS),
        "other seed": scenario(root, sound, hosts=TWO_HOSTS) | {"seed": True},
        "full cache": scenario(
            root,
            [*half, "remote", "remote"],
            hosts=TWO_HOSTS,
            overrides=[f"data.cache_dir={root}/cache", "data.cache_gib=0.000001"],
        ),
        "spoilt": scenario(root, ["spoilt"] * RANKS, spoil=str(root / "spoilt" / "a"), spoil_after=[3]),
    }
    for name, settings in every.items():
        settings["overrides"] = [*settings["overrides"], f"name={folder_name(name)}"]
    return every


def folder_name(scenario: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in scenario)


@pytest.fixture(scope="module")
def outcome(root: Path) -> Callable[[str], Outcome]:
    every = scenarios(root)
    other = Path(run_file(root, "sound")).read_text() + "seed: 3\n"
    (root / "other seed.yaml").write_text(other)
    every["other seed"]["run_files"][3] = str(root / "other seed.yaml")
    (root / "scenarios.json").write_text(json.dumps(every))
    done = warm.run("-m", "tests.training.feed_worker", root, ranks=RANKS)
    assert done.returncode == 0 and done.stdout.count("fine") == RANKS, done.stdout + done.stderr[-4000:]
    return lambda name: [dict(np.load(root / f"{name}.r{rank}.npz")) for rank in range(RANKS)]


def read_alone(data: Dataset, first: int, dp_rank: int = 0, dp_size: int = 1) -> np.ndarray:
    """The rows of each step as one process reads them from intact shards: (steps, rows, T + 1)."""
    return np.array([data.read(data.order.at(step, dp_rank, dp_size)) for step in range(first, STEPS)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one host", "two hosts", "pp 4", "pp 2 dp 2", "every step", "from step 7"])
def test_ranks_get_the_rows_of_the_order(name: str, root: Path, outcome: Callable[[str], Outcome]) -> None:
    data, settings = dataset(root), scenarios(root)[name]
    dp = len(set(settings["dp_ranks"]))
    for rank, seen in enumerate(outcome(name)):
        assert not seen["error"]
        if settings["reads"][rank]:
            wanted = read_alone(data, settings["steps"][0], settings["dp_ranks"][rank], dp)
            assert np.array_equal(seen["batches"].reshape(wanted.shape), wanted)
            whole = read_alone(data, settings["steps"][0])
            assert seen["labels"].tolist() == [count_labels(rows) for rows in whole]
        else:
            assert seen["batches"].size == 0


@pytest.mark.slow
def test_ranks_that_share_rows_get_their_share(root: Path, outcome: Callable[[str], Outcome]) -> None:
    """Ranks 0 and 2 have the even tokens of both ends of the pipeline, all know where documents begin."""
    data = dataset(root)
    rows = read_alone(data, 7)
    marks, labels = data.sources.tokenizer.marks, [count_labels(of_step) for of_step in rows]
    for rank, seen in enumerate(outcome("pp 2 cp 2")):
        assert not seen["error"] and seen["labels"].tolist() == labels
        own = seen["batches"].reshape(-1, SEQ_LEN + 1)  # as many ids and labels as a row has, and a word of bits
        wanted = rows.reshape(-1, SEQ_LEN + 1)
        assert np.array_equal(own[:, : SEQ_LEN // 2], wanted[:, rank % 2 : SEQ_LEN : 2])
        assert np.array_equal(own[:, SEQ_LEN // 2 : SEQ_LEN], wanted[:, rank % 2 + 1 :: 2])
        begins = document_begins(wanted[:, :-1], marks)
        assert begins.any() and np.array_equal(own[:, SEQ_LEN], begins @ (1 << np.arange(SEQ_LEN)))


@pytest.mark.slow
def test_one_rank_of_a_host_reads_for_all(outcome: Callable[[str], Outcome]) -> None:
    def readers(name: str) -> list[bool]:
        return [bool(seen["reads"]) for seen in outcome(name)]

    assert readers("one host") == [True, False, False, False]
    assert readers("two hosts") == [True, False, True, False]
    assert readers("pp 4") == [True, False, False, True]
    assert readers("pp 2 dp 2") == [True, True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one host's copy is damaged", "each host's copy is damaged", "from step 7 damaged"])
def test_damage_on_one_host_is_replaced_on_all(name: str, root: Path, outcome: Callable[[str], Outcome]) -> None:
    """The replacement applies from the recorded step on, as if the damage had been known from the start."""
    ranks, data, first = outcome(name), dataset(root), scenarios(root)[name]["steps"][0]
    (bad,) = json.loads(str(ranks[0]["bad"]))
    assert (bad["source"], bad["shard"]) == ("b", first_shards(root)[0]) and "sha256" in bad["reason"]
    assert bad["step"] == first
    sound = read_alone(data, first)
    data.replace([BadShard(**bad)], max_bad=1)
    wanted = read_alone(data, first)
    assert not np.array_equal(sound, wanted)
    for seen in ranks:
        assert not seen["error"] and json.loads(str(seen["bad"])) == [bad]
        assert np.array_equal(seen["batches"].reshape(wanted.shape), wanted)
    written = json.loads((root / "runs" / folder_name(name) / "data.json").read_text())
    assert written["bad"] == [bad]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none may be", ("1 shards are damaged, data.max_bad_shards = 0", "step 0, b, shard")),
        ("other rows", ("step 1: ranks 0, 1 | 2, 3 of data-parallel rank 0 read different batches",)),
        ("other rows later", ("ranks 0, 1 | 2, 3 of data-parallel rank 0 read different batches",)),
        ("other manifest", ("step 0: ranks 0, 2, 3 | 1 have a different data order",)),
        ("other seed", ("step 0: ranks 0, 1, 2 | 3 have a different data order",)),
        ("full cache", ("data.cache_gib: ", "cannot hold one shard")),
        ("spoilt", ("was cut short after it had been checked",)),
    ],
)
def test_ranks_that_cannot_go_on_alike_stop_alike(
    name: str, words: tuple[str, ...], outcome: Callable[[str], Outcome]
) -> None:
    ranks = outcome(name)
    assert len({str(seen["error"]) for seen in ranks}) == 1
    assert all(word in str(ranks[0]["error"]) for word in words), ranks[0]["error"]
