"""Compare an export in the transformers of this environment with this project. Usage: in_transformers.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from comparing import MODELS, Expected


def main(folder: Path) -> None:
    """Compare all models."""
    for name in MODELS:
        compare(Expected(folder / name), f"transformers {transformers.__version__}, {name}")


@torch.no_grad()
def compare(expected: Expected, where: str) -> None:
    """Compare one model."""
    export = expected.folder / "hf"
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(export)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    expected.check_ids(where, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    expected.check_texts(where, lambda ids: tokenizer.decode(ids))
    expected.check_begin(where, lambda text: tokenizer(text)["input_ids"])
    ids = tokenizer(expected.prompts[0], return_tensors="pt")["input_ids"]
    expected.check_logits(where, model(input_ids=ids).logits[0].numpy())

    def continuation(prompt: str, count: int) -> list[int]:
        inputs = tokenizer(prompt, return_tensors="pt")
        found = model.generate(**inputs, do_sample=False, max_new_tokens=count, suppress_tokens=[expected.eos])
        return found[0, inputs["input_ids"].shape[1] :].tolist()

    expected.check_greedy(where, continuation)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
