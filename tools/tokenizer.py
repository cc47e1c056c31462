#!/usr/bin/env python3
"""Train a sentencepiece tokenizer; use and check one of any kind."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds.command_line import new_parser, run, size, subcommands, whole
from llama_ds.data.text.corpus import documents
from llama_ds.data.text.reading_options import add_reading_options, reading_options
from llama_ds.data.text.tokenizer import Tokenizer, train_tokenizer
from llama_ds.errors import UserError

EXAMPLES = """examples:
  tools/tokenizer.py train --input 'books/**/*.txt' code.jsonl --vocab-size 32000 --out tokenizers/mine
  tools/tokenizer.py encode --model tokenizers/mine.model 'Hello, world'
  tools/tokenizer.py decode --model tokenizers/mine.model 319 1542 88
  tools/tokenizer.py check --model models/Llama-3-8B/tokenizer.json --input 'books/**/*.txt'
"""
MODEL = "a sentencepiece model, a tokenizer.json, or Llama 3's tokenizer.model"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(None, __doc__, EXAMPLES)
    add = subcommands(parser)
    command = add("train", train, "train a BPE model")
    command.add_argument("--input", nargs="+", required=True, metavar="PATTERN", help="files, folders or globs")
    command.add_argument(
        "--vocab-size", type=whole(1, 2**31 - 1), required=True, help="number of ids, with unk, bos, eos and 256 bytes"
    )
    command.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX.model")
    command.add_argument("--sample-mb", type=size, default=16.0, help="training text (default: %(default)s)")
    add_reading_options(command)
    command = add("encode", encode, "print the ids of a text")
    command.add_argument("--model", required=True, metavar="FILE", help=MODEL)
    command.add_argument("text", nargs="?", help="default: standard input")
    command = add("decode", decode, "print the text of ids")
    command.add_argument("--model", required=True, metavar="FILE", help=MODEL)
    command.add_argument("ids", nargs="*", type=whole(0), help="default: standard input")
    command = add("check", check, "check that decode(encode(x)) == x on documents")
    command.add_argument("--model", required=True, metavar="FILE", help=MODEL)
    command.add_argument("--input", nargs="+", required=True, metavar="PATTERN")
    add_reading_options(command)
    return parser


def train(args: argparse.Namespace) -> None:
    """Train a model."""
    path = train_tokenizer(args.input, args.out, args.vocab_size, args.sample_mb, reading_options(args))
    print(f"{path}: {args.vocab_size} ids, sha256 {Tokenizer(path).sha256}")


def encode(args: argparse.Namespace) -> None:
    """Print the ids of a text."""
    text = args.text if args.text is not None else sys.stdin.buffer.read().decode()
    print(*Tokenizer(args.model).encode(text))


def decode(args: argparse.Namespace) -> None:
    """Print the text of ids."""
    tokenizer = Tokenizer(args.model)
    ids = args.ids or [int(word) for word in sys.stdin.read().split()]
    if bad := [i for i in ids if not 0 <= i < tokenizer.vocab_size]:
        raise UserError(
            f"{args.model}: id {bad[0]} is outside 0 to {tokenizer.vocab_size - 1}; use the model that encoded the text"
        )
    sys.stdout.buffer.write(tokenizer.decode(ids).encode())


def check(args: argparse.Namespace) -> None:
    """Check the round trip on documents."""
    tokenizer, count, ids, size = Tokenizer(args.model), 0, 0, 0
    for pattern in args.input:
        for document in documents(pattern, options=reading_options(args)):
            encoded = tokenizer.encode(document.text)
            if tokenizer.decode(encoded) != document.text:
                raise UserError(
                    f"{document.path}: a document changes in the round trip through {args.model}; use a tokenizer that "
                    "does not normalize, such as one of tools/tokenizer.py train"
                )
            count, ids, size = count + 1, ids + len(encoded), size + len(document.text.encode())
    print(f"{count} documents round-trip: {size} bytes, {ids} ids, {size / max(1, ids):.3f} bytes per id")


if __name__ == "__main__":
    sys.exit(main())
