"""Rows of a run do not depend on its layout or on resuming; damaged shards are replaced; wrong data is refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built_sources import BATCH, SEQ_LEN, VOCAB_SIZE, Built, run_on, with_source

from llama_ds.config.schema import RunConfig
from llama_ds.data.building.build import build_source
from llama_ds.data.filler import count_labels, plain_ids
from llama_ds.data.mixture import DataState, state_from_json
from llama_ds.data.order import BadShard
from llama_ds.data.read_ahead import ReadAhead
from llama_ds.data.source.manifest import shard_name
from llama_ds.data.source.store import open_store
from llama_ds.data.source.verify import repair, verify_source
from llama_ds.data.sources import Sources, open_sources
from llama_ds.data.stream import Dataset, Reader, open_data
from llama_ds.errors import UserError


@pytest.fixture(scope="module")
def run(built: Built, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return run_on(built, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def dataset(run: RunConfig) -> Dataset:
    return open_data(run)


@pytest.fixture(scope="module")
def sources(run: RunConfig) -> Sources:
    return open_sources(run.data, VOCAB_SIZE)


def steps(dataset: Dataset, first: int, count: int, dp: int = 1, micro: int = BATCH) -> np.ndarray:
    ranks = []
    for rank in range(dp):
        reader = Reader(dataset, range(first, first + count), rank, dp, micro)
        batches = list(reader.batches())
        assert all(batch.shape == (micro, SEQ_LEN + 1) and batch.dtype == np.int32 for batch in batches)
        ranks.append(np.stack(batches).reshape(count, BATCH // dp, SEQ_LEN + 1))
        reader.close()
    return np.concatenate(ranks, axis=1)


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_every_layout_reads_the_same_rows(dataset: Dataset, dp: int, micro: int) -> None:
    rows = steps(dataset, 0, 3, dp, micro)
    assert np.array_equal(rows, steps(dataset, 0, 3))
    expected = [dataset.order.at(step) for step in range(3)]
    read = [dataset.sources.train[s].row(r) for at in expected for s, r in zip(at.source, at.row, strict=True)]
    assert np.array_equal(plain_ids(rows.reshape(-1, SEQ_LEN + 1)), np.array(read))


def test_filler_is_no_label_of_any_row_or_step(dataset: Dataset) -> None:
    eos = dataset.sources.tokenizer.eos_id
    ends = set()
    for step in range(60):
        at = dataset.order.at(step)
        real = 0
        for index, number in zip(at.source, at.row, strict=True):
            source = dataset.sources.train[index]
            real += (labels := min(SEQ_LEN, source.geometry.ids - 1 - number * SEQ_LEN))
            ends.add((index, labels))
        rows = steps(dataset, step, 1)[0]
        assert (rows[:, 1:] >= 0).sum() == real == dataset.labels(step)
        assert (rows[rows < 0] == ~eos).all()
        for row in dataset.rows(step * BATCH, BATCH):
            assert row.ids.min() >= 0 and (row.ids[row.labels + 1 :] == eos).all()
        assert sum(row.labels for row in dataset.rows(step * BATCH, BATCH)) == real
    assert {index for index, labels in ends if labels < SEQ_LEN} == {0, 1}  # the last rows of both sources were read


def test_a_resumed_run_reads_the_same_rows(run: RunConfig, dataset: Dataset) -> None:
    whole = steps(dataset, 0, 30)
    for at in (1, 7, 29):
        state = state_from_json(json.loads(json.dumps(dataset.state.as_json())), "checkpoint")
        resumed = open_data(run, state, at, "checkpoint")
        assert resumed.state == dataset.state
        assert np.array_equal(steps(resumed, at, 30 - at, 2, 2), whole[at:])


def test_a_mixture_changes_at_its_token_and_epochs_follow(built: Built, tmp_path: Path) -> None:
    at = 100 * BATCH * SEQ_LEN - 5  # in step 99: the stage starts at the first step that begins after this token
    stages = [{"at_tokens": at, "weights": {"prose": 1.0}}]
    staged, plain = open_data(run_on(built, tmp_path, mixture=stages)), open_data(run_on(built, tmp_path))
    assert np.array_equal(steps(staged, 0, 100), steps(plain, 0, 100))
    assert all((staged.order.at(step).source == 1).all() for step in range(100, 130))
    code, prose = staged.order.consumed(200).values()
    assert code == plain.order.consumed(100)["code"]
    assert prose[0] == 200 * BATCH - code[0] and prose[1] == prose[0] / staged.sources.train[1].rows


def test_new_weights_on_resume_do_not_change_the_past(built: Built, tmp_path: Path) -> None:
    first = open_data(run_on(built, tmp_path))
    other = run_on(built, tmp_path, "data.sources.0.weight=0.1", "data.sources.1.weight=0.9")
    changed = open_data(other, first.state, 20, "checkpoint")
    assert np.array_equal(steps(changed, 0, 20), steps(first, 0, 20))
    code = sum((changed.order.at(step).source == 0).sum() for step in range(20, 120))
    assert code / (100 * BATCH) == pytest.approx(0.1, abs=0.02)
    again = open_data(other, changed.state, 50, "checkpoint")
    assert again.state == changed.state and np.array_equal(steps(again, 45, 10), steps(changed, 45, 10))


def test_a_grown_source_is_read_and_the_past_stays(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built.shards, tmp_path / "shards")
    grown = replace(built, shards=tmp_path / "shards")
    run = run_on(grown, tmp_path)
    before = open_data(run)
    old, old_rows = steps(before, 0, 20), before.sources.train[1].rows
    build_source("prose", built.code, built.tokenizer, str(grown.shards), SEQ_LEN, 0.2, 20, append=True)
    after = open_data(run, before.state, 20, "checkpoint")
    assert after.sources.train[1].rows > old_rows
    assert np.array_equal(steps(after, 0, 20), old)
    read = np.concatenate([rows.row[rows.source == 1] for rows in map(after.order.at, range(20, 200))])
    assert read.max() >= old_rows
    shutil.rmtree(grown.shards / "prose")
    build_source("prose", built.code, built.tokenizer, str(grown.shards), SEQ_LEN, 0.0, 20)
    with pytest.raises(UserError, match=r"checkpoint: has read source prose of .* it was rebuilt, not added to"):
        open_data(run, after.state, 30, "checkpoint")


def test_a_new_source_joins_a_resumed_run(built: Built, tmp_path: Path) -> None:
    run = run_on(built, tmp_path)
    before = open_data(run)
    third = {"name": "again", "path": str(built.shards / "code"), "weight": 0.5, "reread": True}
    own = [{"name": s.name, "path": s.path, "weight": s.weight / 2} for s in run.data.sources]
    after = open_data(run_on(built, tmp_path, sources=[third, *own]), before.state, 20, "checkpoint")
    assert np.array_equal(steps(after, 0, 20), steps(before, 0, 20))
    late = [after.order.names[i] for rows in map(after.order.at, range(20, 60)) for i in rows.source]
    assert late.count("again") / len(late) == pytest.approx(0.5, abs=0.05)


@pytest.fixture
def damaged(built: Built, tmp_path: Path) -> Built:
    """Return a copy with a flipped bit in shard 1 of code, a truncated shard 2, and zeros in shard 0 of prose."""
    shutil.copytree(built.shards, tmp_path / "shards")
    shards = [tmp_path / "shards" / "code" / shard_name("train", i) for i in (1, 2)]
    data = bytearray(shards[0].read_bytes())
    data[600] ^= 1
    shards[0].write_bytes(data)
    shards[1].write_bytes(shards[1].read_bytes()[:5000])
    broken = tmp_path / "shards" / "prose" / shard_name("train", 0)
    broken.write_bytes(bytes(1024) + broken.read_bytes()[1024:])
    return replace(built, shards=tmp_path / "shards")


def test_damaged_shards_are_found_before_they_are_read_and_replaced(
    damaged: Built, dataset: Dataset, tmp_path: Path
) -> None:
    data = open_data(run_on(damaged, tmp_path))
    reader = Reader(data, range(0, 110), 0, 1, BATCH)
    reader.prepare(0, 110)
    found = sorted(reader.find_bad(0, 110), key=lambda bad: (bad.source, bad.shard))
    assert [(b.step, b.source, b.shard, b.offset) for b in found] == [
        (0, "code", 1, None), (0, "code", 2, 5000), (0, "prose", 0, 0)
    ]  # fmt: skip
    assert "sha256" in found[0].reason and "5000 bytes" in found[1].reason
    data.replace(found, max_bad=3)
    assert reader.find_bad(0, 110) == []
    intact = steps(dataset, 0, 110).reshape(-1, SEQ_LEN + 1)
    repaired = steps(data, 0, 110).reshape(-1, SEQ_LEN + 1)
    plan, same = [dataset.order.at(step) for step in range(110)], (intact == repaired).all(1)
    assert 0 < same.sum() < len(same) and len(plan) * BATCH == len(same)
    every = {row.tobytes() for source in dataset.sources.train for row in source.read(np.arange(source.rows))}
    assert all(row.astype("<u2").tobytes() in every for row in plain_ids(repaired))
    # A run resumed from the recorded state reads the same rows.
    resumed = open_data(run_on(damaged, tmp_path), data.state, 13, "checkpoint")
    assert np.array_equal(steps(resumed, 13, 97).reshape(-1, SEQ_LEN + 1), repaired[13 * BATCH :])
    reader.close()


def test_too_much_damage_stops_the_run_with_its_ledger(damaged: Built, tmp_path: Path) -> None:
    data = open_data(run_on(damaged, tmp_path))
    reader = Reader(data, range(0, 110), 0, 1, BATCH)
    with pytest.raises(UserError, match=r"3 shards are damaged, data\.max_bad_shards = 2; .*step 0, code, shard 1: "):
        data.replace(reader.find_bad(0, 110), max_bad=2)
    everything = [BadShard(0, "prose", shard) for shard in range(data.sources.train[1].geometry.shards)]
    with pytest.raises(UserError, match=r"source prose: none of its .* shards is intact"):
        open_data(run_on(damaged, tmp_path)).replace(everything, max_bad=1000)
    reader.close()


def test_a_repaired_manifest_excludes_damaged_shards(damaged: Built, tmp_path: Path) -> None:
    for name in ("code", "prose"):
        store = open_store(str(damaged.shards / name))
        repair(store, verify_source(store))
    data = open_data(run_on(damaged, tmp_path, max_bad_shards=0))
    assert {(bad.source, bad.shard) for bad in data.state.bad} == {("code", 1), ("code", 2), ("prose", 0)}
    reader = Reader(data, range(0, 110), 0, 1, BATCH)
    assert reader.find_bad(0, 110) == [] and len(steps(data, 0, 40)) == 40
    reader.close()


def test_damage_listed_after_the_start_counts_from_the_resume(damaged: Built, dataset: Dataset, tmp_path: Path) -> None:
    store = open_store(str(damaged.shards / "code"))
    repair(store, verify_source(store))
    resumed = open_data(run_on(damaged, tmp_path), dataset.state, 20, "checkpoint")
    assert {(bad.step, bad.shard) for bad in resumed.state.bad} == {(20, 1), (20, 2)}
    assert all(
        np.array_equal(a, b) for s in range(20) for a, b in zip(resumed.order.at(s), dataset.order.at(s), strict=True)
    )


def test_a_shard_that_changes_during_the_run_ends_it(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built.shards, tmp_path / "shards")
    data = open_data(run_on(replace(built, shards=tmp_path / "shards"), tmp_path))
    reader = Reader(data, range(0, 110), 0, 1, BATCH)
    assert reader.find_bad(0, 110) == []
    for shard in (tmp_path / "shards" / "code").glob("train-*.tar"):
        shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(UserError, match=r"was cut short after it had been checked; .*resume the run"):
        list(reader.batches())
    reader.close()


def test_the_reader_does_not_read_beyond_its_bound(dataset: Dataset) -> None:
    reader = Reader(dataset, range(0, 10), 0, 1, BATCH, allowed=0)
    ahead = ReadAhead(reader.batches(), depth=20)
    reader.allow(3)
    assert len(list(islice(ahead, 3))) == 3
    assert ahead._queue.empty()
    waiting = threading.Thread(target=lambda: next(ahead))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    reader.allow(4)
    waiting.join(60)
    assert not waiting.is_alive()
    reader.close()
    ahead.close()


def test_validation_rows_are_fixed_and_shared_by_weight(sources: Sources) -> None:
    rows = sources.validation_rows(12)
    code, prose = sources.validation
    assert np.array_equal(rows, np.array([*(code.row(i) for i in range(8)), *(prose.row(i) for i in range(4))]))
    assert sum(sources.validation_labels(12)) == 12 * SEQ_LEN
    every = sources.validation_rows(rows_with_both_ends := code.rows * 10 // 7)
    assert sum(sources.validation_labels(rows_with_both_ends)) == count_labels(every) < every[:, 1:].size
    for dp, micro in ((1, 3), (2, 2), (4, 3)):
        parts = [sources.validation_micro_batches(12, rank, dp, micro) for rank in range(dp)]
        assert all(batch.shape == (micro, SEQ_LEN + 1) for part in parts for batch in part)
        assert np.array_equal(np.concatenate([batch for part in parts for batch in part]), rows)
    assert sources.validation_micro_batches(0, 0, 2, 2) == []


def test_an_unsuitable_number_of_validation_rows_is_refused(sources: Sources) -> None:
    with pytest.raises(UserError, match=r"evaluation\.rows = 13 .* dp \* parallel\.micro_batch = 6; use 12 or 18"):
        sources.validation_micro_batches(13, 0, 2, 3)
    with pytest.raises(UserError, match=r"validation split has \d+ rows, evaluation needs 700 of its 1000"):
        sources.validation_rows(1000)


def test_a_run_that_does_not_fit_its_shards_is_refused(run: RunConfig) -> None:
    def refused(change: dict[str, Any], vocab_size: int = VOCAB_SIZE) -> str:
        with pytest.raises(UserError) as error:
            open_sources(replace(run.data, **change), vocab_size)
        return str(error.value)

    assert f"data.seq_len = 128, but the shards of {run.data.sources[0].path}" in refused({"seq_len": 128})
    assert f"model.vocab_size = 100, but {run.data.tokenizer} has {VOCAB_SIZE} ids" in refused({}, 100)
    open_sources(run.data, VOCAB_SIZE + 64)  # published tables are often padded
    assert "no.model: cannot read the tokenizer" in refused({"tokenizer": "no.model"})
    missing = with_source(run, 0, path="missing")
    assert "missing/manifest.json: cannot read" in refused({"sources": missing.data.sources})


def test_stated_epochs_are_checked_against_the_manifest(run: RunConfig, dataset: Dataset) -> None:
    rows, epochs = dataset.order.consumed(200)["code"]
    assert epochs == rows / dataset.sources.train[0].rows
    open_data(with_source(run, 0, epochs=epochs * 1.05))
    with pytest.raises(UserError, match=rf"code states epochs = 30, but {rows} of the run's 2400 rows.*set epochs to"):
        open_data(with_source(run, 0, epochs=30.0))


@pytest.mark.parametrize("raw", [{}, {"segments": [{}], "bad": [], "rows_per_shard": {}}, {"segments": 3}])
def test_a_state_of_another_version_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="checkpoint: holds no state of the data"):
        state_from_json(raw, "checkpoint")


def test_the_fingerprint_tells_orders_apart(run: RunConfig, dataset: Dataset, built: Built, tmp_path: Path) -> None:
    assert open_data(run).fingerprint == dataset.fingerprint
    others = [
        open_data(run_on(built, tmp_path, "data.sources.0.weight=0.69", "data.sources.1.weight=0.31")),
        open_data(
            run, DataState(dataset.state.rows_per_shard, dataset.state.segments, (BadShard(3, "code", 0),)), 3, ""
        ),
    ]
    assert len({dataset.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_a_read_error_reaches_the_consumer() -> None:
    def read() -> Iterator[int]:
        yield 1
        raise UserError("shard gone")

    items = ReadAhead(read(), depth=4)
    next(items)
    with pytest.raises(UserError, match="shard gone"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_closing_ends_the_thread_and_waiting_is_counted() -> None:
    gate = threading.Event()

    def read() -> Iterator[int]:
        gate.wait()
        while True:
            yield 1

    before = threading.active_count()
    items = ReadAhead(read(), depth=2)
    assert items.wait_s == 0.0
    gate.set()
    next(items)
    assert items.wait_s > 0.0
    items.close()
    items.close()
    assert threading.active_count() == before
