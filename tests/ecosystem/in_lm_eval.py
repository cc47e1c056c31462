"""Compare lm-eval's HFLM on an export with this project's log-likelihoods and texts by its own model of the harness.

Usage: in_lm_eval.py FOLDER, with the project on PYTHONPATH

HFLM puts bos before a text that begins a prediction, and its default lets the tokenizer do the same: a rolling
log-likelihood then begins with two. add_bos_token=False is right there, and the default for tasks with a context.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from comparing import MODELS, Expected
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llama_ds.evaluation.evaluate import Work, evaluate, prepare
from llama_ds.evaluation.generated_answers import plain_words
from llama_ds.evaluation.generation import GenerationRequest, cut_at
from llama_ds.evaluation.generation_tasks import NQ
from llama_ds.evaluation.lm_eval_model import HarnessModel
from llama_ds.evaluation.suite import TASKS, find_tasks
from llama_ds.evaluation.tasks import chosen, shown_examples
from tests import warm
from tests.evaluation.exported_ranks import RANKS
from tests.evaluation.test_generated_tasks import LINES as QUESTIONS
from tests.evaluation.test_tasks import LINES as CHOICES
from tests.evaluation.test_tasks import write
from tools import evaluate as tool

TOLERANCE = 1e-3  # nats, of sums over a text in fp32
REQUESTS = 200
TEXTS = 24  # continuations
LAYOUT_REQUESTS = 60  # on eight ranks
REQUEST_TOLERANCE = 1e-4  # nats, of a request of few tokens in fp32
LIMIT = 30  # examples of a task
SUITE = ("miniature", "common_sense", "race", "mmlu")


def main(folder: Path) -> None:
    """Compare all models."""
    for name in MODELS:
        expected, where = Expected(folder / name), f"lm-eval {version('lm-eval')}, {name}"
        text, context = expected.prompts[1], expected.prompts[1].split(" ")[0]
        default, without = (model(expected, **settings) for settings in ({}, {"add_bos_token": False}))
        rolling = [m.loglikelihood_rolling([request(text)])[0] for m in (default, without)]
        check(f"{where}, rolling, add_bos_token=False", rolling[1], expected.rolling)
        compare_requests(where, default, expected)
        (found,) = default.loglikelihood([request(context, text.removeprefix(context))])
        check(f"{where}, with a context, default", found[0], expected.continuation)
        print(
            f"{where}: rolling with the default, which doubles bos: {rolling[0]:.4f} nats, not {expected.rolling:.4f}"
        )
        if name == MODELS[0]:
            with tempfile.TemporaryDirectory() as scratch:
                compare_tasks(where, default, expected, Path(scratch))
                compare_answers(where, default, expected, Path(scratch))
                compare_layout(where, default, expected, Path(scratch))


def compare_requests(where: str, theirs: Any, expected: Expected) -> None:
    """Compare the harness' model hf with ours on the export, which pads the vocabulary, request by request."""
    ours = HarnessModel.from_folder(str(expected.folder / "hf"), dtype="fp32")
    texts = [text for text in expected.texts if 8 < len(text.strip()) < 60 and "<" not in text][:REQUESTS]
    pairs = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    requests = [request(context, continuation) for context, continuation in pairs if context.strip()]
    found = ours.loglikelihood(requests)
    wanted = theirs.loglikelihood(requests)
    largest = max(abs(one[0] - other[0]) for one, other in zip(found, wanted, strict=True))
    greedy = [one[1] for one in found] == [other[1] for other in wanted]
    if largest > REQUEST_TOLERANCE or not greedy:
        raise SystemExit(f"{where}: requests differ by {largest:.3g} nats, greedy flags equal: {greedy}")
    print(f"{where}: {len(requests)} requests equal to {largest:.1g} nats, and greedy flags too")
    asked = [until(text[: 3 + n % 40], n) for n, text in enumerate(texts[:TEXTS])]
    written = ours.scorer.generator.generate([ours.wanted(*one.args) for one in asked])
    # Their tokenizer decodes both: random models write invalid UTF-8, which libraries decode differently. They also
    # write bos, which ends a text here.
    pairs_of_texts = [
        (cut_at(theirs.tok_decode(own.ids), one.args[1]["until"]), other)
        for own, one, other in zip(written, asked, theirs.generate_until(asked, disable_tqdm=True), strict=True)
        if own.ids[-1] != expected.bos
    ]
    wrong = [pair for pair in pairs_of_texts if pair[0] != pair[1]]
    if wrong or len(set(pairs_of_texts)) < len(asked) // 2:
        raise SystemExit(f"{where}: {len(wrong)} of {len(asked)} texts differ, as {wrong[:1]!r}")
    drawn = Instance("generate_until", {}, ("x = ", {"max_gen_toks": 20, "do_sample": True, "temperature": 1.0}), 0)
    if len(set(ours.generate_until([drawn] * 3))) < 3:
        raise SystemExit(f"{where}: repeated requests are not drawn independently")
    print(f"{where}: {len(pairs_of_texts)} generated texts equal")


def compare_tasks(where: str, theirs: Any, expected: Expected, scratch: Path) -> None:
    """Let the harness run the task files of this project on both models, and compare with `evaluate`."""
    data, shown = scratch / "data", 1
    for name, (line, *_) in CHOICES.items():
        write(data, name, line)
    for name, (lines, *_) in QUESTIONS.items():
        write(data, name, *lines)
    out, options = str(scratch / "tasks"), ("--data", str(data), "--shots", str(shown), "--limit", str(LIMIT))
    assert tool.main(["harness", f"{','.join(SUITE)},closed_book,mathematics", *options, "--out", out]) == 0
    manager = TaskManager(include_path=out, include_defaults=False)
    names = [f"llama_ds_{name}" for name in TASKS if name not in ("humaneval", "mbpp")]
    loaded = manager.load([f"llama_ds_{name}" for name in (*SUITE, "closed_book", "mathematics")])["tasks"]
    if loaded.keys() != set(names):
        raise SystemExit(f"{where}: the harness loads {sorted(loaded)}, not {sorted(names)}")
    ours = HarnessModel.from_folder(str(expected.folder / "hf"), dtype="fp32")
    works = prepare(find_tasks(SUITE), str(data), shown, LIMIT)
    largest, count = 0.0, 0
    for harness in (theirs, ours):
        tasks = [f"llama_ds_{work.task.name}" for work in works]
        found = simple_evaluate(harness, tasks=tasks, task_manager=manager, bootstrap_iters=2)
        for work in works:
            own, name = evaluate(ours.scorer, work), f"llama_ds_{work.task.name}"
            result, samples = found["results"][name], found["samples"][name]
            metrics = {"plain": "acc", "characters": "acc_norm", "answer": "acc_answer"}
            reported = {key: result[f"{metrics[key]},none"] for key in own.accuracies}
            if reported != own.accuracies or found["versions"][name] != work.task.version:
                raise SystemExit(f"{where}: {name}: {reported}, not {own.accuracies}")
            error = result[f"{metrics[work.task.normalization]}_stderr,none"]
            if own.examples > 1 and abs(error - own.stderr) > 1e-9:
                raise SystemExit(f"{where}: {name}: its standard error is {error}, not {own.stderr}")
            values = [value for sample in samples for (value, _) in sample["filtered_resps"]]
            wanted = log_likelihoods(ours, work)
            largest = max(largest, *(abs(float(a) - b) for a, b in zip(values, wanted, strict=True)))
            count += len(wanted)
    if largest > REQUEST_TOLERANCE:
        raise SystemExit(f"{where}: requests of the task files differ by {largest:.3g} nats")
    print(
        f"{where}: {len(names)} task files load; {len(works)} run, {count} requests equal to {largest:.1g} nats, and "
        "accuracies too"
    )


def log_likelihoods(ours: HarnessModel, work: Work) -> list[float]:
    """Return the log-likelihoods of a task's requests by this project's evaluation."""
    requests = [
        request
        for example in work.examples
        for request in chosen(work.task, shown_examples(work.shown, work.task, work.shots, example), example)
    ]
    return [score.log_likelihood for score in ours.scorer.log_likelihoods(requests)]


def compare_answers(where: str, theirs: Any, expected: Expected, scratch: Path) -> None:
    """Ask for answers of which every other one is what the model writes: half of them are right."""
    ours = HarnessModel.from_folder(str(expected.folder / "hf"), dtype="fp32")
    asked = [f"who wrote {text}" for text in expected.texts if text.strip() and text.isascii() and text.isprintable()][
        :160
    ]
    prompts = [f"Answer these questions:\nQ: {question}\nA:" for question in asked]
    written = ours.scorer.generator.generate([GenerationRequest(one, NQ.stops, NQ.max_tokens) for one in prompts])
    pairs = [
        (question, text.text)
        for question, text in zip(asked, written, strict=True)
        if text.text.isascii() and plain_words(text.text)
    ]
    lines = [{"question": q, "answer": [text if n % 2 else "nobody"]} for n, (q, text) in enumerate(pairs)]
    (scratch / "asked" / "nq").mkdir(parents=True)
    (scratch / "asked" / "nq" / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = str(scratch / "answers")
    assert tool.main(["harness", "nq", "--data", str(scratch / "asked"), "--shots", "0", "--out", out]) == 0
    manager = TaskManager(include_path=out, include_defaults=False)
    wanted = (len(pairs) // 2) / len(pairs)
    for harness in (theirs, ours):
        found = simple_evaluate(harness, tasks=["llama_ds_nq"], task_manager=manager, bootstrap_iters=0)
        accuracy = found["results"]["llama_ds_nq"]["acc,none"]
        if abs(accuracy - wanted) > 1e-9 or len(pairs) < 8:
            raise SystemExit(f"{where}: {accuracy} of {len(pairs)} answers are right, not {wanted}")
    print(f"{where}: {len(pairs)} answers judged by the task file of nq alike")


def compare_layout(where: str, theirs: Any, expected: Expected, scratch: Path) -> None:
    """Compare the harness' model hf with eight ranks of an engine: pp 2 x tp 2 x dp 2 (see `exported_ranks.py`)."""
    texts = [text for text in expected.texts if 8 < len(text.strip()) < 60 and "<" not in text][:LAYOUT_REQUESTS]
    pairs = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts if text[: len(text) // 2].strip()]
    prompts = [(text[: 3 + n], ["return"], 12) for n, text in enumerate(texts[:TEXTS])]
    (scratch / "asked.json").write_text(json.dumps([pairs, prompts]))
    words = (expected.folder / "hf", scratch / "asked.json", scratch / "out.json")
    done = warm.run("-m", "tests.evaluation.exported_ranks", *words, ranks=RANKS)
    if done.returncode:
        raise SystemExit(f"{where}: {RANKS} ranks fail: {done.stderr[-4000:]}")
    found = json.loads((scratch / "out.json").read_text())
    wanted = theirs.loglikelihood([request(*pair) for pair in pairs])
    for rows in ("branched", "packed"):
        largest = max(abs(one[0] - other[0]) for one, other in zip(found[rows], wanted, strict=True))
        greedy = [one[1] for one in found[rows]] == [other[1] for other in wanted]
        if largest > REQUEST_TOLERANCE or not greedy:
            raise SystemExit(f"{where}: {rows} rows of {RANKS} ranks differ by {largest:.3g}, greedy: {greedy}")
        print(f"{where}: pp 2 x tp 2 x dp 2, {rows} rows: {len(pairs)} requests equal to {largest:.1g} nats")
    arguments = [(text, {"until": stops, "max_gen_toks": new, "do_sample": False}) for text, stops, new in prompts]
    asked = [Instance("generate_until", {}, one, 0) for one in arguments]
    compared = 0
    for ids, one, other in zip(found["texts"], asked, theirs.generate_until(asked, disable_tqdm=True), strict=True):
        if ids[-1] != expected.bos:  # it ends a text here
            compared += 1
            if cut_at(theirs.tok_decode(ids), one.args[1]["until"]) != other:
                raise SystemExit(f"{where}: after {one.args[0]!r} {RANKS} ranks write other than {other!r}")
    if compared < TEXTS // 2:
        raise SystemExit(f"{where}: only {compared} texts could be compared")
    print(f"{where}: pp 2 x tp 2 x dp 2: {compared} generated texts equal")


def model(expected: Expected, **settings: bool) -> Any:
    """Return lm-eval's model of an export."""
    folder = str(expected.folder / "hf")
    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1, **settings)


def request(*arguments: str) -> Instance:
    """Return a request as tasks make it."""
    return Instance("loglikelihood", {}, arguments, 0)


def until(text: str, number: int) -> Instance:
    """Return a request to continue a text, with stop strings of several kinds."""
    stops = [["\n"], [")", "  "], ["return"]][number % 3]
    return Instance("generate_until", {}, (text, {"until": stops, "max_gen_toks": 20, "do_sample": False}), 0)


def check(where: str, found: float, wanted: float) -> None:
    """Compare two log-likelihoods."""
    if abs(found - wanted) > TOLERANCE:
        raise SystemExit(f"{where}: {found:.4f} nats, not {wanted:.4f}")
    print(f"{where}: {found:.4f} nats, equal to {abs(found - wanted):.1g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
