"""Plans of rows with documents count the pairs of tokens that runs count of such rows, and say what they assume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ds.config.context_parallel import CpSizes
from llama_ds.config.document_marks import LLAMA_MARKS
from llama_ds.config.run_file import find_run_file, load_run
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout
from llama_ds.layout.planned_documents import packed_rows, ring_imbalance, ring_pairs
from llama_ds.perf.plan import hardware
from llama_ds.perf.plan.estimate import as_data, estimate, report
from llama_ds.perf.plan.sharing_costs import sharing_costs
from llama_ds.training.cp_balance import CpBalance, ring_work
from llama_ds.training.plan import describe

A100 = hardware.load("a100-80gb")


def ids_of(rows: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Return ids (rows, T + 1) whose marks begin these documents."""
    ids = np.full((len(rows), sum(rows[0]) + 1), 5)
    for row, lengths in zip(ids, rows, strict=True):
        row[np.cumsum([0, *lengths[:-1]])] = LLAMA_MARKS.begin
    return ids


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=4),
    st.sampled_from([CpSizes(2), CpSizes(3), CpSizes(2, 2), CpSizes(4, 1, True), CpSizes(3, 2, True), CpSizes(1, 2)]),
    st.integers(1, 3),
)
def test_planned_work_of_a_ring_is_what_a_run_measures(lengths: list[int], sizes: CpSizes, micro_batch: int) -> None:
    """Exactly: the pairs of every rank, and `cp_imbalance` over micro-batches of the same rows."""
    planned = packed_rows(tuple(lengths), 48, 6)
    rows, balance = planned.rows, CpBalance(sizes, LLAMA_MARKS)
    for first in range(0, len(rows), micro_batch):
        ids = ids_of(rows[first : first + micro_batch])
        balance.add(0, ids)
        pairs = [ring_pairs(row, sizes) for row in rows[first : first + micro_batch]]
        assert ring_work(ids[:, :-1], LLAMA_MARKS, sizes).tolist() == [sum(of) for of in zip(*pairs, strict=True)]
    measured = balance.take(1)
    assert measured is not None
    assert 1 + ring_imbalance(planned, sizes, micro_batch) == pytest.approx(measured, rel=1e-14)
    assert sum(sum(ring_pairs(row, sizes)) for row in rows) == round(planned.keys * 6 * 48)


def test_rows_cut_one_stream_of_documents() -> None:
    assert packed_rows((5,), 8, 3).rows == ((5, 3), (2, 5, 1), (4, 4))
    drawn = packed_rows((3, 40, 7), 16, 50).rows
    assert {sum(row) for row in drawn} == {16} and (16,) in drawn and {3, 7} < {n for row in drawn for n in row}


def long_rows(*options: str) -> RunConfig:
    sizes = ["data.seq_len=131072", "training.global_batch=128", "parallel.cp=8", "parallel.recompute=full"]
    return load_run(find_run_file("llama3_8b"), [*sizes, *options])


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_an_estimate_counts_the_documents_that_the_run_file_states(method: str) -> None:
    """Documents of 1,024 tokens divide the rows: a token sees 512.5 on average, by hand. Memory stays."""
    one = estimate(long_rows(f"parallel.cp_method={method}"), 256, A100)
    whole = estimate(long_rows(f"parallel.cp_method={method}", "data.document_tokens=[131072]"), 256, A100)
    many = estimate(long_rows(f"parallel.cp_method={method}", "data.document_tokens=[1024]"), 256, A100)
    unmasked = estimate(
        long_rows(f"parallel.cp_method={method}", "data.document_tokens=[1024]", "data.document_mask=false"), 256, A100
    )
    assert one.step.seconds == whole.step.seconds and unmasked.step.seconds == pytest.approx(one.step.seconds)
    assert many.step.job.documents.keys == 512.5 and as_data(many)["documents"]["mean_keys"] == 512.5
    saved = one.step.stages[0].whole.attention - many.step.stages[0].whole.attention
    assert saved > 0.9 * one.step.stages[0].whole.attention and many.peak_bytes == one.peak_bytes
    assert many.step.seconds < one.step.seconds and 0.1 < many.step.mfu(A100) < 0.6
    assert "because data.document_tokens does not state the documents' lengths" in report(one)
    words = "documents of 1,024 tokens on average, as data.document_tokens states: a token sees 512 tokens on average"
    assert words in report(many) and ("cut in chunks" in report(many)) == (method == "ring")


def test_a_dry_run_says_what_it_counts() -> None:
    run = long_rows("data.document_tokens=[700,40000]", "parallel.cp_method=ring")
    text = describe(run, resolve_layout(run, 256), {"bf16": {"enabled": True}})
    keys = packed_rows((700, 40000), 131072).keys
    assert f"{keys:,.0f} keys per token: documents of 20,350 tokens on average" in text
    assert "attention of the slowest rank of the ring 1.000" in text
    # Over micro-batches, as the estimate and `cp_imbalance`: 1.0024 for one row, 1.0008 for two.
    run = long_rows("data.document_tokens=[3,9,40]", "parallel.cp_method=ring", "parallel.micro_batch=2")
    planned = sharing_costs(A100, estimate(run, 256, A100).step)
    assert planned and planned.imbalance > 5e-4
    text = describe(run, resolve_layout(run, 256), {"bf16": {"enabled": True}})
    assert f"attention of the slowest rank of the ring {1 + planned.imbalance:.4f} of the mean" in text


def test_documents_without_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.document_tokens\.1 = 0 is not positive; give the tokens of a document"):
        long_rows("data.document_tokens=[700,0]")
