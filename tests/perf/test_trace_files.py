"""Folders of recorded steps: errors in them, the merged trace, and limits that fail a job."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded_steps import rank, two_ranks, write

from llama_ds.errors import UserError
from llama_ds.job.trace_format import MARKER, PROFILE_FILE
from llama_ds.perf.trace.files import analyse_folder
from llama_ds.perf.trace.kinds import METRICS
from llama_ds.perf.trace.limits import parse_limit
from llama_ds.perf.trace.merge import merge
from llama_ds.perf.trace.read import Event, RankClock, rank_files, read_rank
from tests import warm
from tests.chrome_format import check_chrome_format

ROOT = Path(__file__).resolve().parents[2]


def analyse(*arguments: object) -> subprocess.CompletedProcess[str]:
    return warm.run(ROOT / "tools" / "profile_run.py", "analyse", *arguments)


@pytest.mark.slow
def test_limits_decide_the_exit_code(tmp_path: Path) -> None:
    write(tmp_path, two_ranks())  # bubble 47.5, compute 42.86 percent
    kept = analyse(tmp_path, "--fail-if", "bubble>47.6", "--fail-if", "compute<42.8", "--json")
    assert (kept.returncode, kept.stderr) == (0, "")
    (found,) = json.loads(kept.stdout).values()
    assert found["metrics"]["bubble"] == pytest.approx(47.5)
    failed = analyse(tmp_path, "--fail-if", "bubble > 47.4%", "--fail-if", "compute<=42.9", "--fail-if", "data>0")
    assert failed.returncode == 1
    assert failed.stderr.splitlines() == [
        f"failed: {tmp_path}: bubble is 47.50 percent: fails at > 47.4",
        f"failed: {tmp_path}: compute is 42.86 percent: fails at <= 42.9",
    ]
    unknown = analyse(tmp_path, "--fail-if", "buble>20")
    assert unknown.returncode == 2 and "did you mean 'bubble'?" in unknown.stderr and not unknown.stdout
    missing = analyse(tmp_path, "--fail-if", "gemm<50")
    assert missing.returncode == 2 and "--fail-if gemm: these traces do not have it; record with" in missing.stderr


@pytest.mark.parametrize("text", ["bubble", "bubble=20", "bubble>", ">20", "bubble>20>30", "bubble>a"])
def test_malformed_limits_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="write METRIC, one of > < >= <=, and percent"):
        parse_limit(text, METRICS)


def test_analysing_imports_nothing_heavy() -> None:
    """The analysis runs on a login node without torch, and starts quickly."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools import profile_run; "
        "from llama_ds.perf.trace import files, merge, picture, report; "
        "print({'torch', 'numpy', 'transformers', 'deepspeed'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder; give one of rank"):
        rank_files(tmp_path / "none")
    with pytest.raises(UserError, match=r"no rank\*.json in it; set logging.trace_step"):
        rank_files(tmp_path)
    write(
        tmp_path, [rank(number, Event("step", 0, 1), world=12, pp=12) for number in range(12) if number not in (1, 5)]
    )
    with pytest.raises(UserError, match=r"2 of 12 ranks' files are missing: rank00001.json, rank00005.json; messages"):
        analyse_folder(tmp_path)


def test_files_of_two_recordings_are_refused(tmp_path: Path) -> None:
    first, last = two_ranks()
    write(tmp_path, [first, replace(last, about={**last.about, "first_step": 8})])
    with pytest.raises(UserError, match=r"rank00001.json: first_step is 8, rank 0's is 7; .*record into an empty"):
        analyse_folder(tmp_path)
    write(tmp_path, [first, last, rank(2, Event("step", 0, 1), world=3)])
    with pytest.raises(UserError, match=r"rank00002.json: rank00000.json is from a job of 2 ranks"):
        analyse_folder(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"format": 2', '"format": 1'),
        lambda text: text.replace('"clock": [[', '"clock": [["x", '),
        lambda text: text.replace('["F", 130', '["F", null'),
        lambda text: text.replace('"schedule": "1f1b"', '"schedule": "2f2b"'),
        lambda text: text.replace('["step"', '["stop"'),
        lambda text: text.replace('"pp": 2', '"pp": 0'),
        lambda text: text.replace('"pp": 2', '"pp": 3'),
    ],
)
def test_damaged_files_are_named_in_one_line(damage: Any, tmp_path: Path) -> None:
    write(tmp_path, two_ranks())
    path = tmp_path / "rank00001.json"
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    with pytest.raises(UserError, match=f"^{path}: .*record again$") as error:
        analyse_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_times_that_order_a_v_are_in_any_unit(tmp_path: Path) -> None:
    times = (12_000_000, 14_000_000, 10_000_000, 900)  # nanoseconds
    about = {"schedule": "zb_v", "virtual_stages": 2, "micro_batches": 4}
    write(tmp_path, [replace(one, about={**one.about, **about, "pass_times": times}) for one in two_ranks()])
    assert read_rank(tmp_path / "rank00001.json").schedule.pass_times == times


def test_damaged_profile_is_named(tmp_path: Path) -> None:
    write(tmp_path, two_ranks())
    valid = gzip.compress(json.dumps({"traceEvents": []}).encode())
    path = tmp_path / "profile_rank00000.json.gz"
    for content in (valid[:-9], b"{", b"\x1f\x8b\x00"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: is not a complete file of torch's profiler"):
            analyse_folder(tmp_path)


def test_the_merged_trace_follows_the_chrome_format(tmp_path: Path) -> None:
    ranks = two_ranks()
    ranks[0].events.append(Event("reduce", 650, 695))  # overlaps another one
    write(tmp_path, ranks)
    events = json.loads(gzip.decompress(merge(tmp_path).read_bytes()))["traceEvents"]
    check_chrome_format(events)
    named = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert named == {0: "rank 0: pp 0 dp 0 tp 0, host0", 1: "rank 1: pp 1 dp 0 tp 0, host1"}
    threads = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert threads == {"schedule", "communication", "communication 2"}
    arrows = [(e["ph"], e["name"], e["pid"], e["ts"]) for e in events if e["ph"] in "sf"]
    assert sorted(arrows) == [
        ("f", "activation", 1, 130),
        ("f", "grad", 0, 460),
        ("s", "activation", 0, 100),
        ("s", "grad", 1, 430),
    ]


def test_a_profile_is_merged_on_the_first_ranks_clock(tmp_path: Path) -> None:
    """Kernels would lie beside the computation that launched them, the further the longer the recording."""
    first, last = two_ranks()
    clock = RankClock(((0.0, 100.0, 1.0), (1000.0, 200.0, 1.0)))  # rank 0's clock shows 1.1 t + 100
    write(tmp_path, [first, replace(last, clock=clock)])
    marker = {"ph": "X", "cat": "user_annotation", "name": f"{MARKER}505000", "pid": 9, "tid": 9, "ts": 5, "dur": 1}
    kernel = {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 9, "tid": 9, "ts": 300, "dur": 10}
    (tmp_path / PROFILE_FILE.format(1)).write_text(json.dumps({"traceEvents": [marker, kernel]}))
    events = json.loads(gzip.decompress(merge(tmp_path).read_bytes()))["traceEvents"]
    (found,) = [event for event in events if event["name"] == "gemm"]
    assert (found["pid"], found["ts"]) == (1, 980)  # at 800 by the rank's own clock
