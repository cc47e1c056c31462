"""`benchmark.py data` compares readers of the same rows and builders of the same ids, and writes JSON."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_ds.benchmarks.data.bench import QUICK
from llama_ds.benchmarks.data.rivals import digest_of, stacked, time_passes
from llama_ds.benchmarks.data.run import set_up
from llama_ds.errors import UserError
from tests import warm

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*args: object) -> subprocess.CompletedProcess[str]:
    return warm.run(ROOT / "tools" / "benchmark.py", "data", *args)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    out = tmp_path_factory.mktemp("measured") / "data.json"
    done = benchmark("--quick", "--repeats", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.mark.slow
def test_all_read_the_same_rows(measured: tuple[dict[str, Any], str]) -> None:
    read = measured[0]["read"]
    assert set(read["contestants"]) == {"llama_ds_reader", "llama_ds_source", "webdataset"}
    rows, tokens = read["rows"], read["rows"] * read["seq_len"]
    drawn = np.random.default_rng(0).integers(0, measured[0]["vocab_size"], (rows, read["seq_len"] + 1), "<u2")
    assert read["digest"] == f"{digest_of(drawn):016x}"  # the benchmark fails if a contestant's digest differs
    for row in read["contestants"].values():
        assert row["rows_per_s"] == pytest.approx(rows / row["median_s"])
        assert row["tokens_per_s"] == pytest.approx(tokens / row["median_s"])
        assert row["median_peak_bytes"] > 10_000_000  # numpy alone takes more
    ours, theirs = (read["contestants"][name] for name in ("llama_ds_reader", "webdataset"))
    assert read["speed_over"] == {"webdataset": pytest.approx(theirs["median_s"] / ours["median_s"])}
    assert read["check"]["bytes_per_s"] > 0 and read["check"]["tokens_per_s"] < ours["tokens_per_s"]


@pytest.mark.slow
def test_all_build_the_same_ids(measured: tuple[dict[str, Any], str]) -> None:
    build = measured[0]["build"]
    names = {"sentencepiece_1", "sentencepiece_2", "llama_ds_1", "llama_ds_2", "hf_tokenizers_1"}
    assert set(build["contestants"]) == names and build["documents"] > 0
    for name, row in build["contestants"].items():
        assert row["workers"] == int(name[-1])
        rate = build["text_ids"] / row["median_s"] / row["workers"]
        assert row["tokens_per_s_per_core"] == pytest.approx(rate)
    ours, bare = build["contestants"]["llama_ds_2"], build["contestants"]["sentencepiece_2"]
    assert build["speed_over"]["sentencepiece_2"] == pytest.approx(bare["median_s"] / ours["median_s"])


@pytest.mark.slow
def test_opening_and_resuming_are_measured(measured: tuple[dict[str, Any], str]) -> None:
    for contestants in measured[0]["open"].values():
        assert set(contestants) == {"llama_ds", "webdataset"}
        for row in contestants.values():
            assert row["median_process_s"] > row["median_s"] > 0
            assert row["median_peak_bytes"] >= row["median_imported_bytes"]
    assert list(measured[0]["open"]) == ["10", "1000"]
    resume = measured[0]["resume"]
    assert (resume["step"], resume["dp"], resume["sources"], resume["tokens"]) == (300_000, 32, 7, 1_400_000_000_000)
    assert resume["next_rows"] >= 1000 and resume["shards"] > 30_000  # 2048 rows per step, 16,384 per shard
    assert resume["median_resumed_s"] > resume["median_opened_s"] > resume["median_imported_s"] > 0


@pytest.mark.slow
def test_the_table_says_what_was_left_out(measured: tuple[dict[str, Any], str]) -> None:
    lines = measured[1].splitlines()
    for name in ("mosaicml_streaming", "hf_datasets_map"):
        (line,) = (line for line in lines if line.startswith(name))
        assert "not installed" in line
    assert any(line.startswith("resume llama_65b.yaml at step 300,000") for line in lines)


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("/no/python", "cannot be started"),
        ("/bin/false", "cannot run the benchmark"),
        ("/bin/true", r"cannot run the benchmark \(nothing\)"),
        ("/bin/echo", "cannot run the benchmark"),
    ],
)
def test_an_interpreter_that_will_not_do_is_the_users_mistake(python: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{python}: {message}"):
        set_up(str(tmp_path), [], None, lambda tokenizer: {}, QUICK, 1, python, lambda name: None)


def test_a_digest_tells_rows_apart_but_not_their_order() -> None:
    rows = np.random.default_rng(1).integers(0, 100, (8, 5), "<u2")
    assert digest_of(rows) == digest_of(rows[::-1]) == digest_of(rows.astype(np.int32))
    other = rows.copy()
    other[3, 2] += 1
    assert digest_of(rows) not in (digest_of(other), digest_of(rows[:-1]), digest_of(np.concatenate([rows, rows[:1]])))
    found = time_passes(lambda: stacked(iter(rows), 3), passes=2)
    assert found["rows"] == 8 and len(found["passes"]) == 2 and int(found["digest"], 16) == digest_of(rows)
