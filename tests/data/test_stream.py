"""A run's rows do not depend on its layout or on where it resumed, and what cannot train is refused at the start."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from built_sources import SEQ_LEN, VOCAB_SIZE, Built

from llama_ds.config.schema import DataConfig, SourceConfig
from llama_ds.data.stream import Dataset, MicroBatches, open_data
from llama_ds.errors import UserError

BATCH = 12


@pytest.fixture(scope="module")
def config(built: Built) -> DataConfig:
    sources = (
        SourceConfig("code", str(built.shards / "code"), 0.7),
        SourceConfig("prose", str(built.shards / "prose"), 0.3),
    )
    return DataConfig(built.tokenizer, SEQ_LEN, sources)


@pytest.fixture(scope="module")
def dataset(config: DataConfig) -> Dataset:
    return open_data(config, VOCAB_SIZE, seed=7)


def steps(dataset: Dataset, first: int, count: int, dp: int, micro: int) -> np.ndarray:
    accumulation = BATCH // dp // micro
    ranks = []
    for rank in range(dp):
        batches = dataset.micro_batches(first, rank, dp, micro, BATCH, accumulation)
        ranks.append(np.stack(list(islice(batches, count * accumulation))).reshape(count, BATCH // dp, SEQ_LEN + 1))
        batches.close()
    return np.concatenate(ranks, axis=1)


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_every_layout_reads_the_same_rows(dataset: Dataset, dp: int, micro: int) -> None:
    rows = steps(dataset, 0, 3, dp, micro)
    assert rows.dtype == np.int64
    assert np.array_equal(rows, steps(dataset, 0, 3, 1, 12))
    expected = [dataset.sources[s].row(r) for s, _, r in dataset.order.rows(0, 3 * BATCH)]
    assert np.array_equal(rows.reshape(-1, SEQ_LEN + 1), np.array(expected))


def test_a_resumed_run_reads_on(dataset: Dataset) -> None:
    assert np.array_equal(steps(dataset, 2, 3, 2, 2), steps(dataset, 0, 5, 2, 2)[2:])


def test_validation_rows_are_fixed_and_shared_by_weight(dataset: Dataset) -> None:
    rows = dataset.validation_rows(12)
    code, prose = dataset.validation
    assert np.array_equal(rows, np.array([*(code.row(i) for i in range(8)), *(prose.row(i) for i in range(4))]))
    for dp, micro in ((1, 3), (2, 2), (4, 3)):
        parts = [dataset.validation_micro_batches(12, rank, dp, micro) for rank in range(dp)]
        assert all(batch.shape == (micro, SEQ_LEN + 1) for part in parts for batch in part)
        assert np.array_equal(np.concatenate([batch for part in parts for batch in part]), rows)
    assert dataset.validation_micro_batches(0, 0, 2, 2) == []


def test_validation_that_does_not_fit_says_what_would(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"evaluation\.rows = 13 .* dp 2 \* parallel\.micro_batch 3 = 6; use 12 or 18"):
        dataset.validation_micro_batches(13, 0, 2, 3)
    with pytest.raises(UserError, match=r"validation split has \d+ rows, evaluation needs 700 of its 1000"):
        dataset.validation_rows(1000)


def with_first_source(config: DataConfig, **change: Any) -> DataConfig:
    return replace(config, sources=(replace(config.sources[0], **change), *config.sources[1:]))


def test_a_run_that_does_not_fit_its_shards_is_refused(config: DataConfig, built: Built) -> None:
    with pytest.raises(UserError, match=rf"data\.seq_len = 128, but .*set data\.seq_len to {SEQ_LEN}"):
        open_data(replace(config, seq_len=128), VOCAB_SIZE, 0)
    with pytest.raises(UserError, match=rf"model\.vocab_size = 32000, but .*set model\.vocab_size to {VOCAB_SIZE}"):
        open_data(config, 32000, 0)
    with pytest.raises(UserError, match=r"missing/manifest\.json: cannot read"):
        open_data(with_first_source(config, path="missing"), VOCAB_SIZE, 0)
    with pytest.raises(UserError, match=r"no\.model: cannot read the tokenizer"):
        open_data(replace(config, tokenizer="no.model"), VOCAB_SIZE, 0)


def test_stated_epochs_are_held_against_the_manifest(config: DataConfig, dataset: Dataset) -> None:
    rows = dataset.sources[0].rows
    total = round(2 * rows / 0.7)
    open_data(with_first_source(config, epochs=2.1), VOCAB_SIZE, 0, total)
    with pytest.raises(UserError, match=rf"code states epochs = 3, but {total} rows .* {rows} rows .* make 2; set"):
        open_data(with_first_source(config, epochs=3.0), VOCAB_SIZE, 0, total)
    assert dataset.order.epochs(total)["code"] == pytest.approx(2, rel=0.05)


def test_an_error_while_reading_reaches_the_consumer() -> None:
    def read() -> Iterator[np.ndarray]:
        yield np.zeros(1)
        raise UserError("shard gone")

    batches = MicroBatches(read(), depth=4)
    next(batches)
    with pytest.raises(UserError, match="shard gone"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_closing_ends_the_thread_and_waiting_is_counted() -> None:
    gate = threading.Event()

    def read() -> Iterator[np.ndarray]:
        gate.wait()
        while True:
            yield np.zeros(1)

    before = threading.active_count()
    batches = MicroBatches(read(), depth=2)
    assert batches.wait_s == 0.0
    gate.set()
    next(batches)
    assert batches.wait_s > 0.0
    batches.close()
    batches.close()
    assert threading.active_count() == before
