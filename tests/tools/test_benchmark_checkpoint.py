"""The checkpoint benchmark measures every contestant in turns, and its table agrees with its results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from tools import benchmark

TINY = [
    *("model.hidden_size=64", "model.intermediate_size=176", "model.num_hidden_layers=2"),
    *("model.num_attention_heads=4", "model.num_key_value_heads=4", "model.vocab_size=512"),
]
PARAMETERS = 2 * (4 * 64**2 + 3 * 64 * 176 + 2 * 64) + 2 * 512 * 64 + 64


@pytest.mark.slow
def test_a_small_run_is_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "measured.json"
    words = ["checkpoint", *TINY, "--repeats", "2", "--folder", str(tmp_path), "--out", str(out)]
    assert benchmark.main(words) == 0
    table = capfd.readouterr().out
    results = json.loads(out.read_text())
    assert results["parameters"] >= PARAMETERS  # both tensor-parallel ranks count the norms
    assert 16 * PARAMETERS < results["bytes"] < 20 * PARAMETERS + 500_000  # weight, master, moments and headers
    assert results["convert"]["bytes"] == 4 * PARAMETERS
    for kind, names in (("save", 5), ("load", 5), ("convert", 2)):
        timed = {name: seconds for name, seconds in results[kind].items() if isinstance(seconds, list)}
        assert len(timed) == names and all(len(s) == 2 and min(s) > 0 for s in timed.values())
    save, summary = results["save"], results["summary"]
    assert summary["stall_of_save"] == statistics.median(save["ours_stall"]) / statistics.median(save["ours"]) < 1
    assert f"{summary['save_of_disk']:.2f}, load {summary['load_of_disk']:.2f}" in table
    assert [path.name for path in tmp_path.iterdir()] == ["measured.json"], "files of the benchmark remain"
