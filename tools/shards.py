#!/usr/bin/env python3
"""Gather a local corpus, build webdataset shards of packed rows, verify and describe them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from llama_ds.data.build import build_source
from llama_ds.data.gather import gather_local_corpus
from llama_ds.data.shards import MANIFEST, Manifest, open_source, read_manifest
from llama_ds.data.stream import validation_rows
from llama_ds.data.unigram import mixture_counts, unigram_loss
from llama_ds.data.verify import verify_source
from llama_ds.errors import UserError

EXAMPLES = """examples:
  tools/shards.py gather --out corpus --limit-mb 32
  tools/shards.py build --source code=corpus/code.jsonl --source prose=corpus/prose.jsonl \\
      --tokenizer corpus/tokenizer.model --seq-len 256 --out corpus/shards
  tools/shards.py verify corpus/shards
  tools/shards.py info corpus/shards --rows 100000 --weight code=0.7 --weight prose=0.3
  tools/shards.py unigram corpus/shards/code=0.7 corpus/shards/prose=0.3
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    args = parse(argv)
    try:
        commands = {"gather": gather, "build": build, "verify": verify, "info": info, "unigram": unigram}
        return commands[args.command](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("gather", help="collect Python sources and prose that this machine holds")
    command.add_argument("--out", required=True, metavar="DIR", help="writes DIR/code.jsonl and DIR/prose.jsonl")
    command.add_argument("--limit-mb", type=float, default=32.0, help="text in all (default: %(default)s)")
    command = commands.add_parser("build", help="tokenize and pack", epilog=EXAMPLES, formatter_class=formatter)
    command.add_argument("--source", action="append", required=True, metavar="NAME=PATTERN", type=_assignment)
    command.add_argument("--tokenizer", required=True, metavar="MODEL")
    command.add_argument("--out", required=True, metavar="DIR", help="writes DIR/NAME/")
    command.add_argument("--seq-len", type=int, required=True, help="labels per row; a row holds one id more")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    command.add_argument("--validation-fraction", type=float, default=0.01, help="of documents (default: %(default)s)")
    command.add_argument("--rows-per-shard", type=int, default=16384, help="(default: %(default)s)")
    command.add_argument("--document-chars", type=int, default=0, help="cut longer documents after line ends")
    command.add_argument("--overwrite", action="store_true", help="replace finished sources")
    command = commands.add_parser("verify", help="check checksums, and read every row with webdataset itself")
    command.add_argument("dir", help="a source, or a folder of sources")
    command = commands.add_parser("info", help="rows and tokens of each source")
    command.add_argument("dir", help="a source, or a folder of sources")
    command.add_argument("--rows", type=int, metavar="N", help="print the epochs of a run of steps * batch = N rows")
    command.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=W",
        type=_weight,
        help="with --rows: weight of a source (default: all by their rows)",
    )
    command.add_argument("--json", action="store_true")
    command = commands.add_parser("unigram", help="loss of a unigram model on the validation rows, nats per token")
    command.add_argument("sources", nargs="+", metavar="DIR=WEIGHT", type=_weight)
    command.add_argument("--rows", type=int, default=64, help="as evaluation.rows of the run (default: %(default)s)")
    return parser.parse_args(argv)


def gather(args: argparse.Namespace) -> int:
    """Collect the local corpus."""
    with tqdm(total=int(args.limit_mb * 1e6), unit="B", unit_scale=True, desc="gather") as bar:
        paths = gather_local_corpus(args.out, args.limit_mb, bar.update)
    for name, path in paths.items():
        print(f"{name}: {path}, {os.path.getsize(path) / 1e6:.1f} MB")
    return 0


def build(args: argparse.Namespace) -> int:
    """Tokenize and pack every source."""
    for name, pattern in args.source:
        with tqdm(unit=" docs", desc=name, delay=0.5) as bar:
            ids = 0

            def progress(documents: int, more_ids: int, bar: tqdm = bar) -> None:
                nonlocal ids
                ids += more_ids
                bar.set_postfix_str(f"{ids / max(1e-9, bar.format_dict['elapsed']):,.0f} tokens/s", refresh=False)
                bar.update(documents)

            manifest = build_source(
                name, pattern, args.tokenizer, args.out, args.seq_len,
                validation_fraction=args.validation_fraction, rows_per_shard=args.rows_per_shard, workers=args.workers,
                document_chars=args.document_chars, overwrite=args.overwrite, progress=progress,
            )  # fmt: skip
        print(_line(os.path.join(args.out, name), manifest))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Check every byte of the sources."""
    for folder in _source_folders(args.dir):
        with tqdm(unit=" rows", desc=folder, delay=0.5) as bar:
            verify_source(folder, bar.update)
        print(f"{folder}: sound")
    return 0


def info(args: argparse.Namespace) -> int:
    """Describe the sources."""
    manifests = {folder: read_manifest(folder) for folder in _source_folders(args.dir)}
    epochs = _epochs(manifests, args.rows, dict(args.weight)) if args.rows else {}
    if args.json:
        print(json.dumps([
            {"folder": folder, "source": m.source, "seq_len": m.seq_len, "vocab_size": m.vocab_size,
             "tokenizer_sha256": m.tokenizer_sha256, "epochs": epochs.get(m.source),
             **{name: {"rows": s.rows, "tokens": s.tokens, "documents": s.documents, "shards": len(s.shards)}
                for name, s in m.splits.items()}}
            for folder, m in manifests.items()
        ], indent=1))  # fmt: skip
        return 0
    for folder, manifest in manifests.items():
        made = f", {epochs[manifest.source]:.3f} epochs" if epochs else ""
        print(_line(folder, manifest) + made)
    return 0


def unigram(args: argparse.Namespace) -> int:
    """Print the loss of the unigram model of a mixture."""
    folders, weights = zip(*args.sources, strict=True)
    counts = mixture_counts([open_source(folder, "train") for folder in folders], weights)
    rows = validation_rows([open_source(folder, "validation") for folder in folders], weights, args.rows)
    print(f"{unigram_loss(counts, rows):.4f} nats per token on {args.rows} validation rows")
    return 0


def _source_folders(path: str) -> list[str]:
    if os.path.exists(os.path.join(path, MANIFEST)):
        return [path]
    found = sorted(str(file.parent) for file in Path(path).glob(f"*/{MANIFEST}"))
    if not found:
        raise UserError(f"{path}: no {MANIFEST} here or one folder below; build shards with tools/shards.py build")
    return found


def _epochs(manifests: dict[str, Manifest], rows: int, weights: dict[str, float]) -> dict[str, float]:
    size = {m.source: m.splits["train"].rows for m in manifests.values()}
    if weights and set(weights) != set(size):
        raise UserError(f"--weight names {', '.join(weights)}, the sources are {', '.join(size)}; give each a weight")
    weights = weights or {name: float(n) for name, n in size.items()}
    return {name: rows * weights[name] / sum(weights.values()) / n for name, n in size.items()}


def _line(folder: str, manifest: Manifest) -> str:
    parts = [f"{name} {s.rows} rows, {s.tokens} tokens, {s.documents} documents" for name, s in manifest.splits.items()]
    return f"{folder}: seq_len {manifest.seq_len}, vocab {manifest.vocab_size}; " + "; ".join(parts)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=PATTERN")
    return name, value


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        weight = float(value)
    except ValueError:
        weight = 0.0
    if not name or not weight > 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=WEIGHT with a weight above 0")
    return name, weight


if __name__ == "__main__":
    sys.exit(main())
