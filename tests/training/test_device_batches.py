"""Micro-batches arrive on the device intact, copied on a separate stream by the read-ahead thread."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llama_ds.config.context_parallel import CpSizes
from llama_ds.config.document_marks import DocumentMarks
from llama_ds.config.schema import ModelConfig
from llama_ds.data.read_ahead import ReadAhead
from llama_ds.layout.layout import Layout
from llama_ds.layout.row_cuts import own_ranges
from llama_ds.model.attention import CausalAttention
from llama_ds.model.context_parallel import WholeRows
from llama_ds.model.decoder import LayerContext
from llama_ds.model.embedding import VocabParallelEmbedding, document_starts
from llama_ds.model.loss import IGNORED, NextTokenLoss
from llama_ds.model.rope import RotaryTables
from llama_ds.model.tensor_parallel import SingleRank
from llama_ds.training.device_batches import MicroBatch, ids_and_labels, on_device, row_share, training_pair
from llama_ds.training.validation import Validation, validation_batches
from tests.model.test_context_parallel import own_tokens


def batches() -> list[MicroBatch]:
    rows = [np.random.default_rng(i).integers(0, 60000, (4, 257)).astype(np.int32) for i in range(20)]
    rows[7][3, 100:] = ~2  # filler
    return [MicroBatch(batch, 4 * 256 - 8) for batch in rows]


def test_a_cpu_gets_the_arrays_themselves() -> None:
    given = batches()
    assert all(a is b for a, b in zip(given, on_device(iter(given), torch.device("cpu")), strict=True))


def test_filler_is_an_input_and_no_label() -> None:
    loss, cpu = NextTokenLoss(SingleRank()), torch.device("cpu")
    context: Any = SimpleNamespace(cp=WholeRows())
    rows = np.array([[1, 5, 6, 2, 1], [6, 2, ~2, ~2, ~2]], np.int32)
    ids, labels = training_pair(MicroBatch(rows, 4.5), cpu, loss, context)
    assert isinstance(ids, torch.Tensor) and ids.tolist() == [[1, 5, 6, 2], [6, 2, 2, 2]]
    assert labels.tolist() == [[5, 6, 2, 1], [2, IGNORED, IGNORED, IGNORED]]
    assert loss.labels == 4.5
    training_pair(rows, cpu, loss, context)
    assert loss.labels == 5
    training_pair(rows[:1], cpu, loss, context)
    assert loss.labels == 4


@pytest.mark.parametrize("marks", [None, DocumentMarks(1, 2), DocumentMarks(None, 2)])
@pytest.mark.parametrize(
    "sizes",
    [CpSizes(2), CpSizes(4), CpSizes(1, 4), CpSizes(2, 2), CpSizes(4, striped=True), CpSizes(2, 2, striped=True)],
)
def test_a_rank_gets_its_tokens_and_where_documents_begin(sizes: CpSizes, marks: DocumentMarks | None) -> None:
    """Equal to whole rows, cut afterwards: ids, labels over every cut, filler, document starts of whole rows.

    Bytes: ids and labels of a chunk overlap but for one column; those of stripes do not, and are 1 / cp of a row's ids
    and labels. Documents take a bit for each token.
    """
    tokens, cpu, loss = 48, torch.device("cpu"), NextTokenLoss(SingleRank())
    rows = np.random.default_rng(0).integers(0, 6, (3, tokens + 1))
    rows[2, 20:] = ~rows[2, 20:]  # filler
    whole_ids, whole_labels = ids_and_labels(rows, cpu)
    for rank in range(sizes.ranks):
        cp = SimpleNamespace(rank=rank, size=sizes.ranks, sizes=sizes)
        context: Any = SimpleNamespace(cp=cp, document_mask=marks is not None, marks=marks)
        given, found = MicroBatch(rows, 116.0), []
        for batch in (given, *on_device(iter([given]), cpu, row_share(context, tokens))):
            ids, labels = training_pair(batch, cpu, loss, context)
            if marks:
                ids, starts = ids
                assert torch.equal(starts, document_starts(whole_ids, marks)) and starts.dtype == torch.int32
            assert isinstance(ids, torch.Tensor) and ids.dtype == labels.dtype == torch.int64
            assert torch.equal(ids, own_tokens(whole_ids, cp)) and torch.equal(labels, own_tokens(whole_labels, cp))
            assert loss.labels == 116.0
            found.append(batch.rows)
        own = tokens // sizes.ranks
        columns = 2 * own if sizes.striped else own + len(own_ranges(tokens, rank, sizes))
        assert found[1].nbytes == 3 * (4 * columns + (8 if marks else 0))


def test_ids_that_do_not_show_all_documents_or_labels_are_refused() -> None:
    """A rank would otherwise mask, or divide, by its own part of a row only."""
    cp: Any = SimpleNamespace(rank=0, size=2, sizes=CpSizes(2))
    with pytest.raises(ValueError, match="cannot count the labels"):
        NextTokenLoss(SingleRank(), cp=cp)((torch.ones(1, 2, 3), torch.ones(5, 3)), torch.ones(1, 2).long())
    model = ModelConfig(16, 8, 16, 1, 1, 1, 8)
    tables = RotaryTables(model, 4)
    context = LayerContext(model, 7, SingleRank(), CausalAttention("sdpa"), tables, cp, document_mask=True)
    embedding = VocabParallelEmbedding(context)
    with pytest.raises(ValueError, match="do not say where the documents of a row begin"):
        embedding(torch.zeros(1, 2).long())


def test_the_validation_loss_is_divided_by_the_labels_of_all_ranks() -> None:
    rows = np.arange(8 * 5).reshape(8, 5)
    sources: Any = SimpleNamespace(
        check_validation=lambda rows, unit: None,
        validation_micro_batches=lambda count, rank, dp, micro: np.split(rows[4 * rank : 4 * rank + 4], 4 // micro),
        validation_labels=lambda count: [7, 20],
    )
    run: Any = SimpleNamespace(evaluation=SimpleNamespace(rows=8))
    layout = Layout(pp=2, dp=2, tp=1, micro_batch=2, accumulation=1)
    engine: Any = SimpleNamespace(reads_data=True, dp_rank=1)
    batches = validation_batches(run, layout, sources, engine)
    assert all(isinstance(batch, MicroBatch) and batch.labels == 27 / 4 for batch in batches)
    assert np.array_equal(np.concatenate([batch.rows for batch in batches]), rows[4:])  # type: ignore[union-attr]
    engine.reads_data = False
    assert len(validation_batches(run, layout, sources, engine)) == 2


def test_validation_rows_count_for_their_source() -> None:
    """The second of two ranks has row 3 of source a, whose rows end within its first micro-batch, and all rows of b."""
    rows = np.arange(2, 42).reshape(8, 5)
    sources: Any = SimpleNamespace(
        config=SimpleNamespace(sources=[SimpleNamespace(name=name) for name in "axb"]),
        tokenizer=SimpleNamespace(bos_id=1, eos_id=2, decode=lambda ids: "é" * len(ids)),
        check_validation=lambda rows, unit: None,
        validation_rows=lambda count: rows,
        validation_shares=lambda count: [5, 0, 3],
        validation_micro_batches=lambda count, rank, dp, micro: np.split(rows[4 * rank : 4 * rank + 4], 4 // micro),
        validation_labels=lambda count: [20, 0, 12],
    )
    run: Any = SimpleNamespace(evaluation=SimpleNamespace(rows=8, interval=3))
    engine: Any = SimpleNamespace(reads_data=True, dp_rank=1, loss=NextTokenLoss(SingleRank()))

    def evaluate(batches: list[MicroBatch], count: int) -> float:
        for batch in batches:
            losses = torch.from_numpy(batch.rows[:, 1:]).float()  # type: ignore[union-attr]
            engine.loss.scores.append((losses, losses > 0))
        return 0.0

    engine.evaluate = evaluate
    validation = Validation(run, Layout(pp=1, dp=2, tp=1, micro_batch=2, accumulation=1), sources, engine)
    found = validation.losses()
    assert {name: one.nats for name, one in found.items()} == {"a": rows[4, 1:].sum(), "b": rows[5:, 1:].sum()}
    assert [(one.rows, one.labels, one.text_bytes) for one in found.values()] == [(5, 20, 40), (3, 12, 24)]
    assert [step for step in range(1, 8) if validation.due(step, step == 7)] == [3, 6, 7]


@pytest.mark.gpu
def test_a_gpu_gets_them_while_it_computes() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ahead = ReadAhead(on_device(iter(batches()), device), depth=4)
    busy = torch.randn(4096, 4096, device=device)
    for wanted in batches():
        for _ in range(4):  # keeps the current stream busy, so that a missing wait for the copy would show
            busy = busy @ busy / 4096
        in_flight = next(ahead)
        pair, plain = ids_and_labels(in_flight, device), ids_and_labels(wanted, torch.device("cpu"))
        for found, expected in zip(pair, plain, strict=True):
            assert found.dtype == torch.int64 and found.device == device and torch.equal(found.cpu(), expected)
    ahead.close()
