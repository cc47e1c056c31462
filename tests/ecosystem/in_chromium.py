"""Open a report of 100,000 steps in Chromium without a network, and use it. Usage: in_chromium.py FOLDER"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from llama_ds.experiments.records import read_runs
from llama_ds.experiments.report_data import page_data
from llama_ds.experiments.report_page import page

STEPS, DEATH = 100_000, 40_000
LEFT, RIGHT = 58, 10  # margins of a panel in report.js
DRAWN = "document.body.dataset.drawn"
TWO_FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def main(folder: Path) -> None:
    """Make the page, open it, and use it as a reader does."""
    folder = folder / "report"
    folder.mkdir()
    path = folder / "report.html"
    runs = [write_run(folder / name, height) for name, height in (("first", 8.0), ("second", 9.0))]
    path.write_text(page(page_data(read_runs(runs))))
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        sys.exit("error: chromium is not installed; install: apt-get install chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            context = browser.new_context(color_scheme=scheme, offline=True)
            shown = context.new_page()
            asked: list[str] = []
            errors: list[str] = []
            shown.on("request", lambda request, asked=asked: asked.append(request.url))
            shown.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            times = [opened(shown, path) for _ in range(3)]
            used(shown)
            assert not errors, errors
            assert {url.split(":")[0] for url in asked} == {"file"}, asked
            shown.screenshot(path=folder / f"{scheme}.png", full_page=True)
            seconds = statistics.median(times)
            print(f"report of two runs of {STEPS:,} steps, {scheme}: open in {seconds:.2f} s, median of 3")
            context.close()
        browser.close()


def write_run(folder: Path, height: float) -> str:
    """Write the metrics, samples and events of a run, one of whose hosts died."""
    write_job(folder / "jobs" / "0001")
    with open(folder / "samples.jsonl", "w") as file:
        for step in range(1000, STEPS + 1, 1000):
            for prompt in ("def main():\n    ", "Once upon a time"):
                file.write(json.dumps({"step": step, "prompt": prompt, "text": f" words of step {step}\n"}) + "\n")
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, STEPS + 1):
            loss = height / math.sqrt(1 + step / 1000) + 0.05 * math.sin(step)
            line = {"step": step, "tokens": step * 4_194_304, "loss": loss, "lr": 1e-4, "grad_norm": 0.3}
            line |= {"tokens_per_s": 8e5, "tokens_per_s_per_gpu": 380.0, "mfu": 0.49, "hfu": 0.52, "step_s": 5.4}
            file.write(json.dumps(line | {"data_wait_s": 0.01, "peak_mem_gib": 71.0}) + "\n")
    return str(folder)


def write_job(folder: Path) -> None:
    """Write the events of a job with a failure at step DEATH, and a progress event for each minute."""
    folder.mkdir(parents=True)
    time_of = 5.4
    events: list[dict[str, object]] = [{"time": 0, "event": "attempt started", "world": 2048}]
    events += [{"time": 60, "event": "ranks joined"}]
    events += [
        {"time": 99 + time_of * step, "event": "progress", "step": step, "seconds": {}} for step in range(DEATH)[::11]
    ]
    died = 99 + time_of * DEATH
    events += [{"time": died, "event": "death", "step": DEATH, "hosts": ["node7"]}]
    events += [{"time": died + 10, "event": "restart", "pause_s": 1.0}]
    events += [{"time": died + 20, "event": "attempt started", "world": 2048}]
    late = died + 99 - time_of * (DEATH - 100)
    steps = range(DEATH - 100, STEPS + 1)[::11]
    events += [{"time": late + time_of * step, "event": "progress", "step": step, "seconds": {}} for step in steps]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def opened(shown: Page, path: Path) -> float:
    """Open the page and return the seconds until its curves stand."""
    begin = time.monotonic()
    shown.goto(path.as_uri())
    shown.wait_for_function(DRAWN)
    return time.monotonic() - begin


def used(shown: Page) -> None:
    """Hover, zoom and change the axis; each must change what the page says."""
    assert int(shown.evaluate(DRAWN)) == 7, "loss, rate, norm, throughput, utilisation, wait, memory: one has no panel"
    canvas = shown.locator("canvas").first
    canvas.scroll_into_view_if_needed()  # the table of facts is above it
    box = canvas.bounding_box()
    assert box is not None
    left, top, width = box["x"], box["y"] + box["height"] / 2, box["width"]

    def hover(share: float) -> list[tuple[float, float]]:
        """Return value and place of each line's nearest point."""
        shown.mouse.move(left + share * width, top)
        shown.evaluate(TWO_FRAMES)
        texts = shown.locator(".panel").first.locator("b").all_inner_texts()
        return [(float(value), number(place)) for value, place in (text.split(" at ") for text in texts)]

    def number(text: str) -> float:
        sizes = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
        return float(text[:-1]) * sizes[text[-1]] if text[-1] in sizes else float(text)

    (early, at), (other, _) = hover(0.2)
    (late, later), _ = hover(0.8)
    assert early > late and other > early and later > at > 1000, (early, late, other)
    shown.mouse.move(left + 0.3 * width, top)
    shown.mouse.down()
    shown.mouse.move(left + 0.4 * width, top)
    shown.mouse.up()
    zoomed = [hover(share)[0][1] for share in (0.2, 0.8)]
    assert at < zoomed[0] < zoomed[1] < later, "a drag zooms all panels"
    shown.locator("#reset").click()
    hover((LEFT + DEATH / STEPS * (width - LEFT - RIGHT)) / width)
    assert "first: death at step 40000: node7" in str(canvas.get_attribute("title")), "a failure is a mark"
    hover(0.2)
    assert canvas.get_attribute("title") == ""
    texts = shown.locator("h2").all_inner_texts()
    assert {"Samples", "Where the time of first went", "Where the time of second went"} <= set(texts), texts
    shown.select_option("#axis", "tokens")
    assert hover(0.2)[0][1] > 1e9, "over tokens"
    shown.locator("#smooth").fill("0.9")
    shown.check("#log")
    assert hover(0.8)[0][0] < early
    shown.mouse.move(0, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
