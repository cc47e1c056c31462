#!/usr/bin/env python3
"""Generate text in transformers with a model of any format: a run, a checkpoint, or a folder of another format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds.checkpoint.choices import KINDS
from llama_ds.command_line import Answer, add_json, new_parser, real, run, whole

EXAMPLES = """examples:
  tools/generate.py runs/quickstart/hf
  tools/generate.py runs/quickstart --num 2
  tools/generate.py runs/quickstart/hf --prompt 'def main(' --prompt 'import ' --max-new-tokens 200 --temperature 0
  tools/generate.py runs/quickstart/hf --prompt 'Once upon a time' --num 4 --seed 7 --json
"""
PROMPTS = ("def read_file(path):\n", "import os\n", "The following ")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(generate, __doc__, EXAMPLES)
    parser.add_argument("model", help="a run, a checkpoint, or a folder of Hugging Face, Meta or Megatron-LM")
    parser.add_argument("--from", dest="kind", choices=KINDS, help="its format (default: detected from its files)")
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated (default: a few)")
    parser.add_argument("--max-new-tokens", type=whole(), default=64, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=real(), default=0.8, help="0: greedy decoding (default: %(default)s)")
    parser.add_argument(
        "--top-p", type=real(0, 1, above=True), default=0.95, help="nucleus sampling threshold (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, help="seed of the sampling (default: %(default)s)"
    )
    parser.add_argument("--num", type=whole(), default=1, help="texts per prompt (default: %(default)s)")
    add_json(parser, "a list of {prompt, text}")
    return parser


def generate(args: argparse.Namespace) -> Answer:
    """Return the continuations of the prompts; without --json print each one as soon as it is generated."""
    import torch
    from transformers import set_seed

    from llama_ds.benchmarks.generation import Sampling, continuations, load

    tokenizer, model = load(args.model, args.kind)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    set_seed(args.seed)
    how = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.num)
    texts = []
    for prompt in args.prompt or PROMPTS:
        for text in continuations(model, tokenizer, prompt, how):
            texts.append({"prompt": prompt, "text": text})
            if not args.json:
                print(f"--- {prompt!r}\n{prompt}{text}", flush=True)
    return Answer(texts, "")


if __name__ == "__main__":
    sys.exit(main())
