"""Compare lm-eval's HFLM on an export with this project's log-likelihoods and texts by its own model of the harness.

Usage: in_lm_eval.py FOLDER, with the project on PYTHONPATH

HFLM puts bos before a text that begins a prediction, and its default lets the tokenizer do the same: a rolling
log-likelihood then begins with two. add_bos_token=False is right there, and the default for tasks with a context.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from comparing import MODELS, Expected
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from llama_ds.evaluation.generation import cut_at
from llama_ds.evaluation.lm_eval_model import HarnessModel

TOLERANCE = 1e-3  # nats, of sums over a text in fp32
REQUESTS = 200
TEXTS = 24  # continuations
REQUEST_TOLERANCE = 1e-4  # nats, of a request of few tokens in fp32


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
    ours.generate_until(asked[:1])
    print(f"{where}: {len(pairs_of_texts)} generated texts equal")


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
