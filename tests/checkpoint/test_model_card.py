"""The model card of an export says what the run recorded, and names what nobody recorded."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree
from pathlib import Path

import pytest
import yaml
from written_ranks import SHAPES, Write

from llama_ds.perf.loss_curve import MAX_POINTS, loss_curve
from tools import convert

SVG = "{http://www.w3.org/2000/svg}"


def rows(card: str) -> dict[str, str]:
    """Return the rows of the card's tables."""
    lines = [
        line.strip("| ").split(" | ", 1) for line in card.splitlines() if line.startswith("| ") and line != "| | |"
    ]
    return dict(line for line in lines if len(line) == 2)


def export(source: object, out: Path) -> tuple[dict[str, object], dict[str, str]]:
    """Return the front matter and the rows of the card of an export."""
    assert convert.main([str(source), str(out), "--to", "hf", "--card", "--no-logits"]) == 0
    card = (out / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert body.startswith(f"# {out.name}\n") or body.startswith(f"\n# {out.name}\n")
    return yaml.safe_load(front), rows(body)


def test_the_card_of_a_run(write: Write, tmp_path: Path) -> None:
    source = Path(write(1, True, model=SHAPES["gqa"]))
    step = {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_s_per_gpu": 1.0, "mfu": None, "hfu": None, "step_s": 1.0}
    lines: list[dict[str, object]] = [
        {"step": n, "tokens": n * 128, "loss": 7.0 - n / 10, "tokens_per_s": 1000.0 + n, **step} for n in range(1, 10)
    ]
    lines.insert(5, {"step": 5, "val_loss": 6.25, "val_perplexity": 518.0})
    lines.insert(9, {"step": 7, "tokens/code": 896, "epochs/code": 0.03125})
    (source / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    starts = [(0, 2, "CPU A", "2.12"), (3, 4, "CPU B", "2.12"), (5, 8, "CPU C", "2.13"), (5, 4, "CPU B", "2.13")]
    starts.append((7, 1, "CPU D", "2.14"))  # later than the checkpoint; CPU C trained nothing
    machines = [{"step": s, "ranks": r, "device": d, "versions": {"torch": v}} for s, r, d, v in starts]
    (source / "machines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in machines))
    front, found = export(source, tmp_path / "tiny-model")
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["llama", "llama_ds"]}
    weights = 2 * 800 * 32 + 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 88 + 2 * 32) + 32
    assert found["Parameters"] == f"{weights:,}"
    assert found["Attention heads"] == "4 query, 2 key-value, of size 8"
    assert (found["Steps"], found["Tokens"]) == ("7 of 10", "896")
    assert found["Learning rate"].startswith("0.001, ")
    assert found["code"].startswith("weight 1; read 896 tokens, 0.031 epochs; holds ")
    assert "built from" in found["code"] and "duplicates not removed" in found["code"]
    # Step 7 is the checkpoint's: what the run did later is of another model.
    assert found["Training loss"] == "6.3000 nats per token, at 896 tokens"
    assert found["Validation loss"] == "6.2500 nats per token on held-out rows, at 640 tokens"
    assert found["Throughput"] == "1,004 tokens/s, median of the reported steps"
    assert found["Energy"] == found["Benchmarks"] == "not recorded"
    assert found["Hardware"] == "2 ranks, CPU A; then 4 ranks, CPU B"
    assert found["Of the training"] == "torch 2.12; then torch 2.13"
    assert "llama_ds " in found["Of this export"] and "torch " in found["Of this export"]
    card = (tmp_path / "tiny-model" / "README.md").read_text()
    assert "(loss_curve.svg)" in card and str(tmp_path) not in card  # no paths of this machine
    picture = xml.etree.ElementTree.parse(tmp_path / "tiny-model" / "loss_curve.svg").getroot()
    line = picture.find(f"{SVG}polyline")
    assert line is not None and len(line.attrib["points"].split()) == 7


def test_the_card_of_a_model_of_unknown_training(write: Write, tmp_path: Path) -> None:
    source = write(1, True, model=SHAPES["llama3"])
    assert convert.main([source, str(tmp_path / "hf"), "--to", "hf", "--no-logits"]) == 0
    _, found = export(tmp_path / "hf", tmp_path / "again")
    assert found["Rotary embedding"] == "theta 500000, scaled by 8 (Llama 3)" and "Tokens" not in found
    card = (tmp_path / "again" / "README.md").read_text()
    assert "Data, settings, losses, hardware and energy of the training: not recorded." in card
    assert not (tmp_path / "again" / "loss_curve.svg").exists()


def test_results_of_lm_eval_and_the_energy_are_added(write: Write, tmp_path: Path) -> None:
    """The file has the form that lm-eval 0.4.13 writes."""
    results = {
        "results": {
            "hellaswag": {"alias": "hellaswag", "sample_len": 10, "acc,none": 0.5, "acc_stderr,none": 0.05,
                          "acc_norm,none": 0.625, "acc_norm_stderr,none": "N/A"},
            "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.01},
            "group": {"alias": "group", " ": " "},
        },
        "n-shot": {"hellaswag": 0, "gsm8k": 5}, "lm_eval_version": "0.4.13",
    }  # fmt: skip
    (tmp_path / "results_1.json").write_text(json.dumps(results))
    words = [
        "--to",
        "hf",
        "--card",
        "--no-logits",
        "--energy-kwh",
        "1.5",
        "--results",
        str(tmp_path / "results_1.json"),
    ]
    assert convert.main([write(1, True, model=SHAPES["gqa"]), str(tmp_path / "out"), *words]) == 0
    found = rows((tmp_path / "out" / "README.md").read_text())
    assert found["Energy"] == "1.5 kWh, as the publisher states" and "Benchmarks" not in found and "group" not in found
    assert found["hellaswag"] == "acc 0.5000 ± 0.0500, acc_norm 0.6250 (0-shot, lm-eval 0.4.13)"
    assert found["gsm8k"] == "exact_match (strict-match) 0.2500 ± 0.0100 (5-shot, lm-eval 0.4.13)"


@pytest.mark.parametrize(
    ("content", "words", "named"),
    [
        ("{}", ["--card"], "contains no results of lm-eval; give a results_*.json"),
        ("x", ["--card"], "cannot be read as JSON"),
        ("{}", [], "--results and --energy-kwh apply only to a model card; add --card"),
    ],
)
def test_other_files_are_no_results(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: list[str], named: str
) -> None:
    (tmp_path / "r.json").write_text(content)
    source = write(1, True, model=SHAPES["gqa"])
    assert convert.main([source, str(tmp_path / "o"), "--to", "hf", *words, "--results", str(tmp_path / "r.json")]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_only_exports_to_hugging_face_have_a_card(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main([str(tmp_path), str(tmp_path / "out"), "--to", "meta", "--card"]) == 2
    assert "--card applies only to hf, not to meta; leave it out" in capsys.readouterr().err


def test_a_long_curve_is_thinned_and_infinite_losses_are_left_out() -> None:
    train = [(float(i), math.inf if i == 3 else 9 - math.log1p(i)) for i in range(100_000)]
    picture = loss_curve(train, [(50_000.0, math.nan), (99_999.0, 1.5)])
    root = xml.etree.ElementTree.fromstring(picture)
    line = root.find(f"{SVG}polyline")
    assert line is not None and len(line.attrib["points"].split()) <= MAX_POINTS
    assert len(root.findall(f"{SVG}circle")) == 2  # one in the legend
    assert len(picture) < 40_000
    assert loss_curve([], []).startswith("<svg ")
