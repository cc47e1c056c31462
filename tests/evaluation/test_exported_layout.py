"""An exported model on eight ranks, pp 2 x tp 2 x dp 2 with dualpipe_v, sequence parallelism and document masks, scores
and writes what transformers does with the same files. `.ci/ecosystem lm_eval` compares it with lm-eval's model hf.

Tolerance: 1e-4 nats of a sum over at most 64 tokens in fp32 (measured: below 2e-5).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoint"))

from hf_models import saved_llama

from llama_ds.evaluation.requests import encode
from tests import warm
from tests.evaluation.exported_ranks import RANKS
from tests.evaluation.letters import TEXT, Letters, some_requests
from tests.evaluation.test_generation import by_transformers as text_by_transformers
from tests.evaluation.test_scoring import SEQ_LEN
from tests.evaluation.test_scoring import by_transformers as score_by_transformers

PROMPTS = [TEXT[:length] for length in (1, 7, 12, 13, 31, 44)]
NEW = 12


@pytest.mark.slow
def test_eight_ranks_give_the_scores_and_texts_of_transformers(tmp_path: Path) -> None:
    shape = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_key_value_heads": 4}
    exported = saved_llama(tmp_path / "hf", **shape)
    requests = some_requests(24, SEQ_LEN)
    pairs = [(one.context, one.continuation) for one in requests]
    (tmp_path / "asked.json").write_text(json.dumps([pairs, [[prompt, [], NEW] for prompt in PROMPTS]]))
    words = (tmp_path / "hf", tmp_path / "asked.json", tmp_path / "out.json")
    done = warm.run("-m", "tests.evaluation.exported_ranks", *words, ranks=RANKS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found = json.loads((tmp_path / "out.json").read_text())
    for rows in ("branched", "packed"):
        for request, (value, greedy) in zip(requests, found[rows], strict=True):
            wanted = score_by_transformers(exported, encode(Letters(), request, SEQ_LEN))  # type: ignore[arg-type]
            assert (value, greedy) == (pytest.approx(wanted[0], abs=1e-4), wanted[1]), (rows, request)
    assert found["texts"] == [text_by_transformers(exported, prompt, NEW) for prompt in PROMPTS]
