"""The imbalance of a ring's ranks, counted on the host from ids, is that of the pairs that the model computes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llama_ds.config.context_parallel import CpSizes
from llama_ds.config.document_marks import LLAMA_MARKS, DocumentMarks
from llama_ds.config.run_file import load_run
from llama_ds.job.run_end import RunEnd
from llama_ds.layout.row_cuts import own_ranges
from llama_ds.model.embedding import document_starts
from llama_ds.training.cp_balance import CpBalance, balance_of, ring_work
from tests.training.test_reporter import QUICKSTART, report


@pytest.mark.parametrize("sizes", [CpSizes(3), CpSizes(3, 1, True)], ids=["zigzag", "stripes"])
@pytest.mark.parametrize("marks", [LLAMA_MARKS, DocumentMarks(2, 2)], ids=["bos", "eos"])
def test_work_is_the_pairs_that_the_models_mask_leaves(marks: DocumentMarks, sizes: CpSizes) -> None:
    ids = np.random.default_rng(0).integers(1, 12, (3, 48))
    ids[1, 40:] = ~ids[1, 40:]  # filler
    starts = document_starts(torch.from_numpy(np.where(ids < 0, ~ids, ids)), marks).tolist()
    wanted = [
        sum(query - row[query] + 1 for row in starts for part in own_ranges(48, rank, sizes) for query in part)
        for rank in range(3)
    ]
    assert ring_work(ids, marks, sizes).tolist() == wanted


def test_a_step_lasts_as_long_as_the_slowest_rank_of_each_micro_batch() -> None:
    """In stripes, rank 1 of a ring of two has one pair more for each two tokens: 20 of 36 in a row of one document."""
    balance = CpBalance(CpSizes(2, 2, True), LLAMA_MARKS)
    whole, cut = np.full((1, 9), 5), np.full((1, 9), 5)
    cut[0, [2, 4, 6]] = LLAMA_MARKS.begin
    balance.add(0, whole)
    assert balance.take(1) == 20 / 18 and balance.take(1) is None
    balance.add(1, whole)
    balance.add(1, cut)  # four documents of two tokens: rank 1 has 8 of 12 pairs
    balance.add(2, whole)
    assert balance.take(2) == (20 + 8) / (18 + 6)
    assert balance.take(3) == 20 / 18


@pytest.mark.parametrize(("tokens", "median", "ring"), [(8192, 700, 4), (131_072, 700, 8)])
def test_stripes_leave_little_to_wait_for_where_chunks_leave_much(tokens: int, median: int, ring: int) -> None:
    """Rows packed with documents of log-normal lengths, as those of web pages are."""
    random = np.random.default_rng(1)
    ids = np.full((4, tokens), 5)
    for row in ids:
        ends = random.lognormal(np.log(median), 1.1, tokens // 100).astype(int).cumsum() + 1
        row[ends[ends < tokens]] = LLAMA_MARKS.begin
    stripes, chunks = (ring_work(ids, LLAMA_MARKS, CpSizes(ring, 1, striped)) for striped in (True, False))
    assert stripes.max() < 1.002 * stripes.mean() and chunks.max() > 1.1 * chunks.mean()


def test_runs_report_it_where_ranks_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ring = ["parallel.cp=2", "parallel.cp_method=ring"]
    masked = load_run(QUICKSTART, [*ring, "data.document_mask=true"])
    others = [*([*ring, "data.document_mask=false"], ["parallel.cp=2", "parallel.cp_method=all_to_all"], [])]
    assert all(balance_of(load_run(QUICKSTART, list(other)), LLAMA_MARKS) is None for other in others)
    reporter = report(tmp_path, "cpu")
    balance = balance_of(masked, LLAMA_MARKS)
    assert balance
    balance.add(0, np.full((1, 9), 5))
    reporter._meter._feed = SimpleNamespace(wait_s=0.0, balance=balance)  # type: ignore[assignment]
    reporter.step_done(1, 1e-3, 2.0, last=False)  # type: ignore[arg-type]
    reporter.close(RunEnd.FINISHED)
    (line,) = (tmp_path / "reported" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["cp_imbalance"] == 20 / 18
    assert " | cp imbalance 1.11 | mem " in capsys.readouterr().out
