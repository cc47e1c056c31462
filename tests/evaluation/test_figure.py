"""The figure of benchmarks over tokens: panels, curves and reference lines from what runs wrote."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from llama_ds.errors import UserError
from llama_ds.evaluation.figure import HEIGHT, LABEL, LEFT, TOP, WIDTH, figure, read_curves, read_references
from llama_ds.evaluation.suite import TASKS

SVG = "{http://www.w3.org/2000/svg}"


def write_run(folder: Path, *results: tuple[int, float]) -> str:
    folder.mkdir()
    lines: list[dict[str, float]] = [{"step": 1, "loss": 5.0}]
    lines += [{"step": 1, "tasks_tokens": t, "tasks/piqa": p, "tasks_stderr/piqa": 0.1} for t, p in results]
    damaged = 'garbage\n[1]\n{"tasks_tokens": "x", "tasks/piqa": 1}\n{"step": 3, "cut'
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + damaged)
    return str(folder)


def test_curves_and_references_are_where_they_belong(tmp_path: Path) -> None:
    """From 40 to 80 percent: 60 is at half the height; half of the tokens at half the width."""
    runs = [write_run(tmp_path / "7b", (1000, 0.40), (2000, 0.60)), write_run(tmp_path / "13b & co", (2000, 0.80))]
    (tmp_path / "paper.json").write_text('{"piqa": {"Chinchilla": 70}, "boolq": {"GPT-3": 60.5}}')
    drawn = ElementTree.fromstring(figure(read_curves(runs), read_references(str(tmp_path / "paper.json"))))
    lines = [line.attrib["points"] for line in drawn.iter(f"{SVG}polyline")]
    middle, right = LEFT + WIDTH / 2, LEFT + WIDTH
    assert lines == [f"{middle:.1f},{TOP + HEIGHT:.1f} {right:.1f},{TOP + HEIGHT / 2:.1f}", f"{right:.1f},{TOP:.1f}"]
    (dashed,) = [line for line in drawn.iter(f"{SVG}line") if "stroke-dasharray" in line.attrib]
    assert float(dashed.attrib["y1"]) == pytest.approx(TOP + HEIGHT / 4, abs=0.1)
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert {"piqa", "Chinchilla", "7b", "13b & co"} <= set(texts) and "boolq" not in texts


def test_the_papers_results_have_labels_apart(tmp_path: Path) -> None:
    """Four sizes, and Chinchilla where the paper has its result; their lines lie closer than a label is high."""
    references = read_references("paper")
    assert references.keys() == {name for name, task in TASKS.items() if task.dataset}
    sizes = {f"LLaMA {size}" for size in ("7B", "13B", "33B", "65B")}
    assert all(lines.keys() - {"Chinchilla 70B"} == sizes for lines in references.values())
    drawn = ElementTree.fromstring(figure(read_curves([write_run(tmp_path / "7b", (9, 0.7))]), references))
    labels = [float(text.attrib["y"]) for text in drawn.iter(f"{SVG}text") if (text.text or "").startswith("LLaMA")]
    assert len(labels) == 4 and all(above - below >= LABEL for above, below in pairwise(labels))


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl: missing"):
        read_curves([str(tmp_path)])
    with pytest.raises(UserError, match=r"has no results of tasks; set evaluation.tasks"):
        read_curves([write_run(tmp_path / "plain")])
    with pytest.raises(UserError, match=r"none.json: No such file or directory; give a JSON file, or the word paper"):
        read_references(str(tmp_path / "none.json"))
    for content in ("[1]", '{"piqa": 3}', '{"piqa": {"a": "x"}}', '{"piqa": {"a": 0.8e3}}', "{"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=r"bad.json: not of the form"):
            read_references(str(tmp_path / "bad.json"))
    (tmp_path / "bad.json").write_text('{"pika": {"Chinchilla": 81.8}}')
    with pytest.raises(UserError, match=r"bad.json: task 'pika': unknown \(did you mean 'piqa'\?\)"):
        read_references(str(tmp_path / "bad.json"))
