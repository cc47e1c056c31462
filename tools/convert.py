#!/usr/bin/env python3
"""Convert checkpoints to other formats."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokenizers
from tqdm import tqdm

from llama_ds.checkpoint.hf_tokenizer import tokenizer_json
from llama_ds.checkpoint.huggingface import export
from llama_ds.checkpoint.load_model import locate
from llama_ds.checkpoint.store import TOKENIZER
from llama_ds.checkpoint.weights import DTYPES
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

EXAMPLES = """examples:
  tools/convert.py deepspeed-to-hf runs/quickstart runs/quickstart/hf
  tools/convert.py deepspeed-to-hf runs/quickstart/checkpoints/step_00000100 exported --dtype bf16
"""
# What sentencepiece models differ in: normalisation, spaces, digits, bytes, control names, U+2581.
PROBE = "  Two  spaces, ﬁne 2048 ｆｕｌｌ e\u0301é 漢字 😀\t\x00\r\n\u3000<s>\u2581 end "


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    args = parse(argv)
    try:
        return {"deepspeed-to-hf": deepspeed_to_hf}[args.command](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "deepspeed-to-hf",
        help="write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    command.add_argument("checkpoint", help="a run folder or its checkpoints folder (the newest), or one checkpoint")
    command.add_argument("out", help="folder to write")
    command.add_argument("--dtype", choices=DTYPES, help="of the weights (default: what training computed in)")
    command.add_argument("--overwrite", action="store_true", help="replace the folder")
    return parser.parse_args(argv)


def deepspeed_to_hf(args: argparse.Namespace) -> int:
    """Export one checkpoint."""
    source = locate(args.checkpoint)
    tokenizer = hf_tokenizer(os.path.join(source, TOKENIZER))
    with tqdm(unit="layer", desc="export", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        description = export(source, args.out, tokenizer, args.dtype, args.overwrite, progress)
    print(f"{args.out}: step {description.step}, {args.dtype or description.dtype}, from {source}")
    return 0


def hf_tokenizer(path: str) -> dict[str, Any] | None:
    """Return tokenizer.json for a sentencepiece model; None, with a warning, where it would give other ids."""
    ours = Tokenizer(path)
    content = tokenizer_json(ours.pieces(), ours.prefixed)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True  # as split_special_tokens has it
    if theirs.encode(PROBE, add_special_tokens=False).ids == ours.encode(PROBE):
        return content
    print(f"warning: {path}: not a BPE model without normalisation, so no tokenizer.json is written", file=sys.stderr)
    return None


if __name__ == "__main__":
    sys.exit(main())
