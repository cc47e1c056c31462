"""Compare lm-eval's HFLM on an export with this project's log-likelihoods. Usage: in_lm_eval.py FOLDER

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

TOLERANCE = 1e-3  # nats, of sums over a text in fp32


def main(folder: Path) -> None:
    """Compare all models."""
    for name in MODELS:
        expected, where = Expected(folder / name), f"lm-eval {version('lm-eval')}, {name}"
        text, context = expected.prompts[1], expected.prompts[1].split(" ")[0]
        default, without = (model(expected, **settings) for settings in ({}, {"add_bos_token": False}))
        rolling = [m.loglikelihood_rolling([request(text)])[0] for m in (default, without)]
        check(f"{where}, rolling, add_bos_token=False", rolling[1], expected.rolling)
        (found,) = default.loglikelihood([request(context, text.removeprefix(context))])
        check(f"{where}, with a context, default", found[0], expected.continuation)
        print(
            f"{where}: rolling with the default, which doubles bos: {rolling[0]:.4f} nats, not {expected.rolling:.4f}"
        )


def model(expected: Expected, **settings: bool) -> Any:
    """Return lm-eval's model of an export."""
    folder = str(expected.folder / "hf")
    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1, **settings)


def request(*arguments: str) -> Instance:
    """Return a request as tasks make it."""
    return Instance("loglikelihood", {}, arguments, 0)


def check(where: str, found: float, wanted: float) -> None:
    """Compare two log-likelihoods."""
    if abs(found - wanted) > TOLERANCE:
        raise SystemExit(f"{where}: {found:.4f} nats, not {wanted:.4f}")
    print(f"{where}: {found:.4f} nats, equal to {abs(found - wanted):.1g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
