#!/usr/bin/env python3
"""Generate text by transformers with a model of any format: a run, a checkpoint, a Hugging Face or a Meta folder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokenizers
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from llama_ds.checkpoint.formats.hf_config import hf_config
from llama_ds.checkpoint.formats.hf_tokenizer import imitation, tokenizer_config
from llama_ds.checkpoint.load_model import KINDS, kind_of, open_model
from llama_ds.checkpoint.names import hf_name
from llama_ds.checkpoint.weights import DTYPES, ModelFiles
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

EXAMPLES = """examples:
  tools/generate.py runs/quickstart/hf
  tools/generate.py runs/quickstart --num 2
  tools/generate.py runs/quickstart/hf --prompt 'def main(' --prompt 'import ' --max-new-tokens 200 --temperature 0
  tools/generate.py runs/quickstart/hf --prompt 'Once upon a time' --num 4 --seed 7 --json
"""
PROMPTS = ("def read_file(path):\n", "import os\n", "The following ")


def main(argv: list[str] | None = None) -> int:
    """Generate and return the exit code."""
    args = parse(argv)
    try:
        return generate(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=formatter)
    parser.add_argument("model", help="a run or a checkpoint, a Hugging Face folder or a Meta folder")
    parser.add_argument("--from", dest="kind", choices=KINDS, help="which of these it is (default: by its files)")
    parser.add_argument("--prompt", action="append", help="text to go on from; repeat for more (default: a few)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability kept (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: %(default)s)")
    parser.add_argument("--num", type=int, default=1, help="texts per prompt (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a list of {prompt, text}")
    return parser.parse_args(argv)


def generate(args: argparse.Namespace) -> int:
    """Print what the model makes of the prompts."""
    check(args)
    tokenizer, model = load(args.model, args.kind or kind_of(args.model))
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    set_seed(args.seed)
    texts = []
    for prompt in args.prompt or PROMPTS:
        for text in continuations(model, tokenizer, prompt, args):
            texts.append({"prompt": prompt, "text": text})
            if not args.json:
                print(f"--- {prompt!r}\n{prompt}{text}", flush=True)
    if args.json:
        print(json.dumps(texts, indent=1))
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse numbers that sampling cannot take."""
    for name, sound, rule in (
        ("temperature", args.temperature >= 0, "0 or more"),
        ("top-p", 0 < args.top_p <= 1, "in (0, 1]"),
        ("max-new-tokens", args.max_new_tokens > 0, "1 or more"),
        ("num", args.num > 0, "1 or more"),
    ):
        if not sound:
            raise UserError(f"command line: --{name} {getattr(args, name.replace('-', '_'))} is not {rule}")


def load(path: str, kind: str) -> tuple[Any, Any]:
    """Return transformers' tokenizer and model of a folder of any kind."""
    files = open_model(path, kind)
    if kind == "hf":
        if not os.path.exists(os.path.join(path, "tokenizer.json")):
            raise UserError(f"{path}: no tokenizer.json in it; convert its model again by tools/convert.py")
        return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    if files.tokenizer is None:
        raise UserError(f"{files.path}: no tokenizer.model in it; put the model's own there")
    content = imitation(Tokenizer(files.tokenizer))
    if content is None:
        raise UserError(f"{files.tokenizer}: not a BPE model without normalisation, so transformers cannot imitate it")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokenizer_config()), transformers_model(files)


def transformers_model(files: ModelFiles) -> Any:
    """Return transformers' model with the weights of `files`, a layer at a time."""
    dtype = DTYPES[files.dtype]
    config = LlamaConfig(**hf_config(files.model, files.seq_len, str(dtype).removeprefix("torch.")))
    model = LlamaForCausalLM(config).to(dtype)
    for layer in files.layers():
        named = {hf_name(layer, name, files.model.num_hidden_layers): w for name, w in files.layer(layer).items()}
        model.load_state_dict(named, strict=False)
    return model


def continuations(model: Any, tokenizer: Any, prompt: str, args: argparse.Namespace) -> list[str]:
    """Return `args.num` texts that follow `prompt`."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    ids = model.generate(
        **inputs,
        **sampling,
        max_new_tokens=args.max_new_tokens,
        num_return_sequences=args.num if args.temperature > 0 else 1,
        # Either ends a document: every document of the training rows begins with bos.
        eos_token_id=[tokenizer.bos_token_id, tokenizer.eos_token_id],
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main())
