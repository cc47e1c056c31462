"""tools/plan.py on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def plan(*args: object, torch: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the tool; without `torch`, importing torch fails."""
    block = "" if torch else "sys.modules['torch'] = None; "
    program = f"import sys, runpy; {block}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, str(ROOT / "tools" / "plan.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_estimate_prints_and_explains() -> None:
    done = plan("estimate", "65b", "--gpus", 2048, "--explain", "parallel.schedule=zb_h1")
    assert done.returncode == 0, done.stderr
    assert "tokens/s/GPU" in done.stdout and "data sheet" in done.stdout
    data = json.loads(plan("estimate", "65b", "--gpus", 2048, "--json").stdout)
    assert data["fits"] and data["layout"]["dp"] == 32


def test_search_prints_writes_and_draws(tmp_path: Path) -> None:
    html = tmp_path / "plan.html"
    done = plan(
        *("search", "--model", "7b", "--gpus", 64, "--gpu", "h100-80gb", "--seq-len", 4096),
        *("--global-batch-tokens", "1M", "--top", 3, "--html", html, "--write", tmp_path / "planned"),
    )
    assert done.returncode == 0, done.stderr
    assert "rejected:" in done.stdout and "1M tokens are 244.1 rows: rounded to 256" in done.stderr
    assert html.read_text().startswith("<!DOCTYPE html>")
    (run,) = (tmp_path / "planned").glob("*.yaml")
    again = plan("estimate", run, "--gpus", 64, "--gpu", "h100-80gb", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["fits"]
    run.write_text(run.read_text() + "# a change of the owner\n")
    done = plan(
        *("search", "--model", "7b", "--gpus", 64, "--gpu", "h100-80gb", "--seq-len", 4096),
        *("--global-batch-tokens", "1M", "--write", tmp_path / "planned"),
    )
    assert done.returncode == 2 and f"{run} exists" in done.stderr
    assert "a change of the owner" in run.read_text()


def test_validate_reads_any_file_of_the_format(tmp_path: Path) -> None:
    header, *rows = (ROOT / "docs/calibration/published_runs.csv").read_text().splitlines(keepends=True)
    (tmp_path / "some.csv").write_text("".join([header, *rows[::4]]))
    done = plan("validate", "--data", tmp_path / "some.csv", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["overall"]["all A100 | time"]["median"] < 0.07
    assert len(found["rows"]) == sum(item["rows"] for item in found["sources"].values())


def test_fit_writes_the_file_of_a_machine_of_ones_own(tmp_path: Path) -> None:
    """Its runs name it by its gpu_type."""
    described = (ROOT / "llama_ds/perf/plan/data/a100-80gb.yaml").read_text()
    (tmp_path / "ours.yaml").write_text(described.replace("name: a100-80gb", "name: ours"))
    header, *rows = (ROOT / "docs/calibration/published_runs.csv").read_text().splitlines(keepends=True)
    found = [row.replace("A100-80GB", "ours") for row in rows if "zb" in row.lower() or "seq_par" in row][:4]
    (tmp_path / "runs.csv").write_text("".join([header, *found]))
    done = plan("fit", "--data", tmp_path / "runs.csv", "--gpu", tmp_path / "ours.yaml", "--rounds", 1)
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'ours.yaml'}" in done.stderr
    assert "tools/plan.py fit to runs.csv" in (tmp_path / "ours.yaml").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.yaml", "runs.csv"]


def test_cost_gives_a_runs_price() -> None:
    done = plan("cost", "--model", "65b", "--gpus", 2048, "--tokens-per-second", 380.4, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gpu_hours"] == pytest.approx(1_022_362, rel=0.001)
    done = plan("cost", "--target-loss", 2.0, "--inference-tokens", "2T")
    assert "cheapest over its life" in done.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("estimate", "65b", "--gpus", 2048, "--gpu", "a100"), "--gpu a100: not a described machine"),
        (("estimate", "66b", "--gpus", 2048), "66b: no such model (did you mean '65b'?)"),
        (("estimate", "v", "--gpus", 2048), "v: no such model"),
        (("estimate", "65b", "--gpus", 2000), "world size 2000 is not a multiple"),
        (("estimate", "65b", "--gpus", 2048, "parallel.tp=3"), "parallel.tp = 3 does not divide"),
        (("search", "--model", "7b", "--gpus", 37), "On "),
        (("search", "--model", "7b", "--gpus", 8, "--global-batch-tokens", "lots"), "'lots' is not a number of tokens"),
        (
            ("search", "--model", "7b", "--gpus", 8, "--global-batch-tokens", "0"),
            "'0' is not a number of tokens from 1",
        ),
        (("search", "--model", "7b", "--gpus", 8, "--seq-len", ""), "data.seq_len"),
        (("search", "--model", "7b", "--gpus", "1e18"), "--gpus: '1e18' is above 1,000,000"),
        (("cost", "--model", "7b", "--gpus", 8, "--tokens", ""), "--tokens = '' is not a number of tokens"),
        (("cost", "--target-loss", "2", "--gpus", 8), "--gpus 8 has no effect with --target-loss"),
        (("cost", "--table15", "--model", "7b"), "--model 7b has no effect with --table15"),
        (
            ("cost", "--model", "7b", "--gpus", 8, "--inference-tokens", "5T"),
            "--inference-tokens 5T has no effect without --target-loss",
        ),
        (("goodput", "--published", "--gpus", 8), "--gpus 8 has no effect with --published"),
        (
            ("goodput", "--training-days", 5, "--step-s", 4, "--gpus", 8, "--memory-share", 0.5),
            "--memory-share 0.5 has no effect without --memory-save-s",
        ),
        (("search", "--model", "7b", "--gpus", 8, "--html", "docs"), "--html docs: cannot be written"),
        (("search", "--model", "7b", "--gpus", 8, "--write", "setup.py"), "--write setup.py: cannot be written"),
        (("search", "--model", "7b", "--gpus", 8, "--seq-len", "0"), "data.seq_len"),
        (("validate", "--data", "nowhere.csv"), "nowhere.csv: cannot be read"),
        (("validate", "--data", "setup.py"), "setup.py:1: column id is missing"),
        (("cost",), "cost: needs --model and --gpus"),
        (("cost", "--target-loss", "1.5"), "--target-loss 1.5"),
        (
            ("cost", "--model", "7b", "--gpus", 8, "--tokens-per-second", 0),
            "--tokens-per-second: '0' is not a finite number from 0.001",
        ),
        (("cost", "--target-loss", "2", "--training-mfu", "0"), "--training-mfu: '0' is not a finite number above 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args: tuple, words: str) -> None:
    done = plan(*args)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and words in line
    assert done.stdout == ""
