"""The report on runs: what it reads, what it says of it, and that the page needs nothing else."""

from __future__ import annotations

import base64
import json
import math
import re
import threading
import urllib.request
from array import array
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_ds.errors import UserError
from llama_ds.evaluation.follow import RESULTS
from llama_ds.experiments.norm_map import layer_norms
from llama_ds.experiments.records import FOLLOWED, Curve, read_run, read_runs, training_hours
from llama_ds.experiments.report_data import facts, notes, page_data, panels
from llama_ds.experiments.report_page import page
from llama_ds.experiments.serve import ReportServer
from llama_ds.experiments.text_curve import text_curve
from tests.tools.calling import Tools

HOUR = 3600.0


def write_run(folder: Path, lines: list[dict[str, Any]], config: dict[str, Any] | None = None, end: str = "") -> str:
    """Write a run's folder; `end` follows the lines of metrics.jsonl."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    if config is not None:
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return str(folder)


def steps(*losses: float, step_s: float = HOUR, rate: float = 100.0) -> list[dict[str, Any]]:
    """Return a line for every second step."""
    return [
        {
            "step": 2 * (n + 1),
            "tokens": 2 * (n + 1) * 2**40,
            "loss": loss,
            "mfu": None,
            "step_s": step_s,
            "tokens_per_s": rate,
        }
        for n, loss in enumerate(losses)
    ]


def decoded(text: str, kind: str) -> list[float]:
    return array(kind, base64.b64decode(text)).tolist()


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    being_written = '{"step": 9, "lo'
    broken = '{"step": 3, "loss": \n[]\n{"loss": 1.0}\n{"step": NaN, "loss": 1.0}\n\n' + being_written
    run = read_run(write_run(tmp_path / "a", steps(5.0, 4.0), end=broken))
    assert run.damaged == {str(tmp_path / "a" / "metrics.jsonl"): 4}
    assert (run.curves["loss"].steps, run.curves["loss"].values) == ([2, 4], [5.0, 4.0])
    assert "mfu" not in run.curves, "a number that is unknown has no curve"
    assert any("4 damaged lines left out" in note for note in notes([run]))


def test_a_diverged_loss_is_a_gap_in_the_curve(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", steps(5.0, math.nan, 4.0)))
    data = page_data([run])
    (shown,) = data["runs"]
    values = decoded(shown["curves"]["loss"]["y"], "f")
    assert values[0] == 5.0 and math.isnan(values[1]) and values[2] == 4.0
    json.loads(page(data).split('id="data">')[1].split("</script>")[0], parse_constant=pytest.fail)


def test_page_has_every_number(tmp_path: Path) -> None:
    lines = steps(5.0, 4.5, 4.25)
    validation = {"val_loss": 4.3, "val_loss/web": 4.4, "bits_per_byte": 1.2, "bits_per_byte/web": 1.3}
    lines.append({"step": 6, "val_perplexity": 73.7, **validation, "val_tokens": 9, "val_tokens/web": 4})
    lines.append(
        {"step": 6, "tasks_tokens": 9, "tasks/piqa": 0.625, "tasks_stderr/piqa": 0.02, "tasks_share/piqa": 0.5}
    )
    lines.append({"step": 6, "norms/a": 1.0, "norms/b": 2.0})
    data = page_data([read_run(write_run(tmp_path / "a", lines))])
    (run,) = data["runs"]
    axis, tokens = (run["curves"]["tokens"][key] for key in "xy")
    assert decoded(run["axes"][axis], "d") == [2, 4, 6]
    assert decoded(tokens, "d") == [2 * 2**40, 4 * 2**40, 6 * 2**40], "more than float32 holds"
    assert [(one["title"], one["names"]) for one in data["panels"]] == [
        ("Loss", ["loss", "val_loss", "val_loss/web"]),
        ("Bits per byte", ["bits_per_byte", "bits_per_byte/web"]),
        ("piqa", ["tasks/piqa"]),
        ("norms", ["norms/a", "norms/b"]),
    ]
    assert data["tasks"] == [{"run": "a", "task": "piqa", "step": 6, "accuracy": 0.625, "stderr": 0.02}]


def test_results_of_an_evaluation_beside_the_run_are_shown(tmp_path: Path) -> None:
    """`tools/evaluate.py --follow` appends them in no order; of a step evaluated again the latest counts, but the run's
    own results come first."""
    assert FOLLOWED == RESULTS
    run = write_run(tmp_path / "a", [*steps(5.0, 4.5), {"step": 4, "tasks/piqa": 0.7}])
    lines = [{"step": 6, "tasks/piqa": 0.5}, {"step": 2, "tasks/piqa": 0.25}, {"step": 6, "tasks/piqa": 0.625}]
    beside = [{**line, "saved": 9, "names": "x"} for line in [*lines, {"step": 4, "tasks/piqa": 0.1}]]
    (Path(run) / FOLLOWED).write_text("".join(json.dumps(line) + "\n" for line in beside) + '{"step": 8, "tas')
    curves = read_run(run).curves
    assert curves["tasks/piqa"] == Curve([2, 4, 6], [0.25, 0.7, 0.625])
    assert "saved" not in curves


def test_every_metric_of_a_run_has_a_panel_or_is_an_axis() -> None:
    names = ["loss", "lr", "grad_norm", "data_wait_s", "peak_mem_gib", "tokens/web", "new_metric", "tokens_per_s"]
    shown = [name for panel in panels(names) for name in panel["names"]]
    assert sorted(shown) == sorted(set(names) - {"tokens_per_s"})


def test_hours_count_steps_once(tmp_path: Path) -> None:
    lines = steps(5.0, 4.0, step_s=1800.0)  # two steps of half an hour before each line
    assert training_hours(read_run(write_run(tmp_path / "a", lines)).curves).values == [1.0, 2.0]


def test_facts_of_a_supervised_run(tmp_path: Path) -> None:
    web = {"val_loss/web": 3.5, "bits_per_byte/web": 0.9, "val_tokens/web": 5120}
    lines = [*steps(5.0, 4.0, 4.5), {"step": 4, "val_loss": 3.5}, {"step": 6, "val_loss": 3.75, **web}]
    run = read_run(write_run(tmp_path / "a", lines, {"training": {"steps": 100}}))
    machine = {"step": 0, "ranks": 8, "device": "A100", "versions": {"torch": "2.13.0"}, "command": ["train.py", "x"]}
    (tmp_path / "a" / "machines.jsonl").write_text(
        json.dumps(machine | {"code": {"commit": "0123456789abcdef", "changes": "code_1.diff"}}) + "\n"
    )
    for job, times in (("0001", (0.0, 5 * HOUR)), ("0002", (90 * HOUR, 93 * HOUR))):
        (tmp_path / "a" / "jobs" / job).mkdir(parents=True)
        events = [{"time": time, "event": "restart", "text": "<b>again</b>"} for time in times]
        (tmp_path / "a" / "jobs" / job / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    run = read_run(str(tmp_path / "a"))
    assert dict(facts(run, power_w=400)) == {
        "Steps": "6 of 100",
        "Tokens": f"{6 * 2**40:,} at step 6",
        "Loss": "4.5000 at step 6",
        "Validation loss": "3.7500 at step 6",
        "Validation loss of web": "3.5000, 0.9000 bits per byte, 5,120 tokens",
        "Lowest validation loss": "3.5000 at step 4",
        "Throughput, median": "100 tokens/s",
        "Time of steps": "6 h 00 min",
        "Time of jobs": "8 h 00 min in 2",
        "Share of it in steps that count": "75.0%",
        "Restarts": "4",
        "Ranks": "8 x A100",
        "Software": "torch 2.13.0",
        "Code": "commit 0123456789ab with the changes in code_1.diff",
        "Command": "train.py x",
        # 6 h x 8 GPUs x 0.4 kW x 1.1, and 0.385 kg/kWh: the LLaMA paper's formula
        "Energy of steps": "21.1 kWh, 8.13 kg CO2eq (GPU-hours x 400 W x PUE 1.1; 0.385 kg/kWh)",
    }
    assert "<b>again" not in page(page_data([run]))


def test_the_page_says_where_the_time_went_and_shows_samples(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_run(folder, [{**line, "step_s": 1.0} for line in steps(5.0, 4.0)])
    (folder / "jobs" / "0001").mkdir(parents=True)
    events: list[dict[str, Any]] = [{"time": 0, "event": "attempt started", "world": 2}]
    events += [{"time": 1, "event": "ranks joined"}, {"time": 10, "event": "progress", "step": 0, "seconds": {}}]
    events += [{"time": 18, "event": "progress", "step": 8, "seconds": {}}]
    events += [{"time": 20, "event": "death", "step": 8, "hosts": ["<n1>"]}, {"time": 20, "event": "gave up"}]
    (folder / "jobs" / "0001" / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    samples = [{"step": n, "prompt": "<b>", "text": f"  {n}\n"} for n in range(1, 1001)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*samples, {"step": 3, "text": 1}]))
    slow = [{"step": n, "time": n, "text": f"SLOW: rank {n}"} for n in range(15, 1200)]
    (folder / "warnings.jsonl").write_text("".join(json.dumps(one) + "\n" for one in slow))
    data = page_data([read_run(str(folder))])
    assert data["events"][0]["text"] == f"{5 - 1 + 1185 - 1000} earlier ones are left out"
    assert data["events"][-1] | {"at": ""} == {
        **{"run": "a", "at": "", "job": "", "event": "warning", "step": 1199, "text": "SLOW: rank 1199"}
    }
    assert dict(data["runs"][0]["facts"])["Effective training time"] == "40.0% of it"
    (found,) = data["goodput"]
    assert found["phases"][0][:3] == ["training", "0 min 08 s", "40.0%"]
    assert found["causes"] == [["death", "1", "0", "0 min 02 s"]]
    assert data["runs"][0]["marks"] == [[8, "death at step 8: <n1>"]]
    shown = [row["step"] for row in data["samples"]]
    assert shown[0] == 1000 and 300 < len(shown) <= 400 and shown == sorted(shown, reverse=True)
    text = page(data)
    assert "<i>&lt;b&gt;</i>  1000\n" in text and "death at step 8: &lt;n1&gt;" in text


def test_runs_that_cannot_be_compared_are_said_to_be(tmp_path: Path) -> None:
    config = {
        "data": {"tokenizer": "one.model", "seq_len": 2048, "sources": [{"name": "web"}]},
        "optimizer": {"lr": 1e-4},
    }
    other = {
        "data": {"tokenizer": "two.model", "seq_len": 2048, "sources": [{"name": "web"}]},
        "optimizer": {"lr": 3e-4},
    }
    runs = [
        read_run(write_run(tmp_path / name, steps(5.0), settings))
        for name, settings in (("a", config), ("b", config), ("c", other))
    ]
    assert list(notes(runs[:2])) == []
    (note,) = notes(runs)
    assert "tokenizer" in note and "cannot be compared" in note
    assert page_data(runs)["differences"] == [
        ["data.tokenizer", "one.model", "one.model", "two.model"],
        ["optimizer.lr", "0.0001", "0.0001", "0.0003"],
    ]


def test_page_needs_no_network_and_no_text_ends_its_script(tmp_path: Path) -> None:
    name = "</script><script>alert(1)"
    folder = tmp_path / "a"
    lines = [*steps(5.0), {"step": 2, "tokens/" + name: 1.0}]
    text = page(page_data([read_run(write_run(folder, lines, {"name": name}))]))
    assert text.count("</script>") == 2, "the data's and the program's"
    assert not re.search(r"""(src|href)=|url\(|@import|https?://""", text)


def test_names_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    folders = [write_run(tmp_path / side / "same", steps(5.0)) for side in "xy"]
    assert [run.name for run in read_runs(folders)] == folders
    with pytest.raises(UserError, match="named twice"):
        read_runs([folders[0], folders[0] + "/"])


def test_a_served_page_goes_on_with_its_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps(5.0))
    made = []

    def make() -> str:
        made.append(1)
        return page(page_data(read_runs([folder])), 10)

    with ReportServer(0, [folder], make) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def loss() -> str:
            text = urllib.request.urlopen(server.address + "page").read().decode()
            return dict(re.findall(r"<b>(Loss)</b></td><td>([^<]*)", text))["Loss"]

        assert server.address.startswith("http://127.0.0.1:")
        assert (loss(), loss(), len(made)) == ("5.0000 at step 2",) * 2 + (1,), "made once for one state"
        with open(Path(folder, "metrics.jsonl"), "a") as file:
            file.write(json.dumps({"step": 4, "loss": 4.5}) + "\n")
        assert loss() == "4.5000 at step 4"
        with pytest.raises(UserError, match="--port"):
            ReportServer(server.server_address[1], [folder], make)
        server.shutdown()


def test_tool_writes_the_page_and_says_what_differs(tmp_path: Path) -> None:
    tools = Tools(tmp_path)
    first = write_run(tmp_path / "a", steps(5.0), {"seed": 1})
    second = write_run(tmp_path / "b", steps(4.0), {"seed": 2})
    done = tools.call("tools/report.py", first, second, "--json")
    found = json.loads(done.out)
    assert done.code == 0 and found["page"] == f"{first}/report.html"
    assert [run["facts"]["Loss"] for run in found["runs"]] == ["5.0000 at step 2", "4.0000 at step 2"]
    assert Path(found["page"]).read_text().startswith("<!DOCTYPE html>")
    done = tools.call("tools/report.py", "diff", first, second)
    assert (done.code, done.out) == (0, "seed: 1 | 2\n")
    for words, wrong in (([str(tmp_path)], "has no metrics.jsonl"), (["diff", first], "two runs, not 1")):
        done = tools.call("tools/report.py", *words)
        assert done.code == 2 and wrong in done.err and done.err.count("\n") == 1


def test_curve_as_text_has_the_means_in_their_places() -> None:
    curve = Curve(range(1, 9), [4.0, 4.0, 3.0, 3.0, 2.0, 2.0, math.nan, 0.0])
    assert text_curve(curve, width=7, height=2).splitlines() == [
        "4.000 ██▄▄▁▁",
        "0.000 ██████▁",
        "      step 1 8",
    ]
    assert text_curve(Curve([1], [math.nan])) == ""
    assert text_curve(curve, 7, 2, encoding="latin-1").splitlines()[:2] == ["4.000 ####", "0.000 ######"]


def norm_line(step: int, down: float | None) -> dict[str, Any]:
    """Return a line of two layers, in which the gradient of the second down projection is `down`."""
    noise = 1 + step % 3 / 100
    rows = {"embedding": [0.5 * noise], "q_proj": [noise, noise], "down_proj": [noise, down], "head": [2.0]}
    return {"step": step, "norms": dict.fromkeys(("gradient", "weight", "update"), rows)}


def test_the_page_says_whose_gradient_rose_before_a_spike(tmp_path: Path) -> None:
    """It rises at step 60, ten steps before the loss; what rises with the loss comes later."""
    losses = [{"step": n, "loss": 3.0 + n % 3 / 100 + 2 * (n >= 70)} for n in range(1, 80)]
    norms = [norm_line(n, 1 + n % 2 / 100 + 4 * (n >= 60)) for n in range(3, 80, 3)]
    norms += [{"step": 80, "norms": {"gradient": {"q_proj": ["x"]}}}, {"step": 80, "norms": {"weight": {}}}]
    text = page(page_data([read_run(write_run(tmp_path / "a", [*losses, *norms]))]))
    assert "the gradient of down_proj of layer 2 rose first, at step 60, to 5.0 times its median" in text
    assert text.count("relative to the layer's median") == 3
    assert [text.count(f">{name}</text>") for name in ("embedding", "layer 1", "layer 2", "head")] == [3, 3, 3, 3]


def test_a_layer_has_the_norm_of_all_its_weights() -> None:
    """A weight whose norm was not finite leaves a gap."""
    rows = layer_norms([norm_line(3, 1.0), norm_line(6, None)], "gradient")
    assert rows == {
        "embedding": [0.5, 0.5],
        "layer 1": [math.sqrt(2), math.sqrt(2)],
        "layer 2": [math.sqrt(2), None],
        "head": [2.0, 2.0],
    }
