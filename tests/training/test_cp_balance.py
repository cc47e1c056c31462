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


@pytest.mark.parametrize("marks", [LLAMA_MARKS, DocumentMarks(2, 2)], ids=["bos", "eos"])
def test_work_is_the_pairs_that_the_models_mask_leaves(marks: DocumentMarks) -> None:
    ids = np.random.default_rng(0).integers(1, 12, (3, 48))
    ids[1, 40:] = ~ids[1, 40:]  # filler
    starts = document_starts(torch.from_numpy(np.where(ids < 0, ~ids, ids)), marks).tolist()
    wanted = [
        sum(query - row[query] + 1 for row in starts for part in own_ranges(48, rank, CpSizes(3)) for query in part)
        for rank in range(3)
    ]
    assert ring_work(ids, marks, 3).tolist() == wanted


def test_a_step_lasts_as_long_as_the_slowest_rank_of_each_micro_batch() -> None:
    """A row of one document costs all ranks the same; one whose front half begins documents makes rank 1 wait."""
    balance = CpBalance(CpSizes(2, 2), LLAMA_MARKS)
    whole, cut = np.full((1, 9), 5), np.full((1, 9), 5)
    cut[0, [2, 4, 6]] = LLAMA_MARKS.begin
    balance.add(0, whole)
    assert balance.take(1) == 1.0 and balance.take(1) is None
    balance.add(1, whole)
    balance.add(1, np.roll(cut, 1))  # chunks of 2 tokens, the first document of 3
    balance.add(2, whole)
    first, second = ring_work(np.roll(cut, 1)[:, :-1], LLAMA_MARKS, 2)
    assert balance.take(2) == (18 + max(first, second)) / (18 + (first + second) / 2) > 1.0
    assert balance.take(3) == 1.0


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
    assert json.loads(line)["cp_imbalance"] == 1.0
    assert " | cp imbalance 1.00 | mem " in capsys.readouterr().out
