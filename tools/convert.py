#!/usr/bin/env python3
"""Convert a model between this project's checkpoints, Hugging Face's format and Meta's, and prove the result.

SRC is a run folder or its checkpoints folder (the newest), one checkpoint, a Hugging Face folder or a Meta folder.
DST is a new folder. It is written as DST.partial, where a conversion that was killed goes on, and gets its name when it
is whole and proven. With --to deepspeed it is one checkpoint, from which a run begins by checkpoint.start_from.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from tqdm import tqdm

from llama_ds.checkpoint.conversion.convert import Options, convert, plan_of
from llama_ds.checkpoint.conversion.proof import Proof, prove
from llama_ds.checkpoint.formats.hf_tokenizer import imitation
from llama_ds.checkpoint.formats.huggingface import HfTokenizer, holds_huggingface
from llama_ds.checkpoint.formats.plan import Target
from llama_ds.checkpoint.formats.views import Rows
from llama_ds.checkpoint.load_model import KINDS, open_model
from llama_ds.checkpoint.weights import DTYPES, ModelFiles
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError
from llama_ds.layout.weights import EMBEDDING_KEY

EXAMPLES = """examples:
  tools/convert.py runs/quickstart runs/quickstart/hf --to hf
  tools/convert.py models/Llama-2-7b-hf runs/start --from hf --to deepspeed --tp 2
  tools/convert.py runs/quickstart/checkpoints/step_00000100 exported --to meta --tp 2 --dtype bf16
"""


def main(argv: list[str] | None = None) -> int:
    """Convert and return the exit code."""
    try:
        return run(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=formatter)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("destination", metavar="DST")
    parser.add_argument("--from", dest="kind", choices=KINDS, help="what SRC is (default: what its files look like)")
    parser.add_argument("--to", choices=KINDS, required=True, help="what DST becomes")
    parser.add_argument("--tp", type=int, default=1, help="parts to cut matrices into; Meta's model-parallel size")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages that DeepSpeed's own loader expects")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the source's)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="rows of the result's tables: zeros added, or cut")
    parser.add_argument("--workers", type=int, default=Options.workers, help="threads (default: %(default)s)")
    parser.add_argument("--no-logits", action="store_true", help="prove without running the model: it may be too large")
    parser.add_argument("--overwrite", action="store_true", help="replace DST, and what is left of another DST.partial")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was found."""
    for name in ("workers", "vocab_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"command line: --{name.replace('_', '-')} {getattr(args, name)} is not positive")
    files = open_model(args.source, args.kind, args.vocab_size)
    target = Target(args.dtype or files.dtype, args.tp, args.pp)
    tokenizer = sentencepiece_tokenizer(files) if args.to == "hf" and not holds_huggingface(files.path) else None
    plan = plan_of(files, args.to, target, tokenizer)
    options = Options(args.overwrite, args.workers)
    with closing(Bars()) as bars:

        def proof_of(folder: str) -> Proof:
            judge = transformers_logits if args.to == "hf" else None
            return prove(files, open_model(folder, args.to), options, bars.show, judge, not args.no_logits)

        proof = convert(files, plan, args.destination, options, proof_of, bars.show)
    report(files, args.destination, args.to, target.dtype, len(plan.files), plan.nbytes)
    print("\n".join(proof.lines()))
    return 0


class Bars:
    """A progress bar over bytes for each thing that is done."""

    def __init__(self) -> None:
        self._what, self._bar = "", tqdm(disable=True)

    def show(self, what: str, done: int, total: int) -> None:
        """Show that of what is being done `done` bytes of `total` are."""
        if what != self._what:
            self.close()
            self._what, self._bar = what, tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar that is shown."""
        self._bar.close()


def report(files: ModelFiles, destination: str, kind: str, dtype: str, count: int, nbytes: int) -> None:
    """Print what was converted to what."""
    print(f"{destination}: {kind}, {dtype}, {count} file{'s' * (count > 1)}, {nbytes / 1e9:.3f} GB, from {files.path}")
    table = files.tensors[EMBEDDING_KEY]
    if isinstance(table, Rows) and table.source.shape[0] != table.shape[0]:
        change = table.shape[0] - table.source.shape[0]
        what = f"{change} rows of zeros added" if change > 0 else f"the last {-change} rows left out"
        print(f"vocabulary: {table.source.shape[0]} -> {table.shape[0]} rows, {what}")
    if files.tokenizer is None and kind != "hf":
        print(f"no tokenizer was written: {files.path} has no tokenizer.model")


@torch.no_grad()
def transformers_logits(folder: str, ids: Tensor) -> Tensor:
    """Return the logits (1, T, V) that transformers computes in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=ids, use_cache=False).logits


def sentencepiece_tokenizer(files: ModelFiles) -> HfTokenizer | None:
    """Return what the model's tokenizer.model says to transformers; None where there is none."""
    if files.tokenizer is None:
        return None
    try:
        ours = Tokenizer(files.tokenizer)
    except UserError as error:
        print(f"warning: {error}; no tokenizer.json is written", file=sys.stderr)
        return None
    return HfTokenizer(hf_tokenizer(files.tokenizer), ours.bos_id, ours.eos_id)


def hf_tokenizer(path: str) -> dict[str, Any] | None:
    """Return tokenizer.json for a sentencepiece model; None, with a warning, where it would give other ids."""
    content = imitation(Tokenizer(path))
    if content is None:
        print(
            f"warning: {path}: not a BPE model without normalisation, so no tokenizer.json is written", file=sys.stderr
        )
    return content


if __name__ == "__main__":
    sys.exit(main())
