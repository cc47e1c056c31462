#!/usr/bin/env python3
"""Convert a model between this project's checkpoints and other formats, or to GGUF, and verify it.

SRC is a run folder or its checkpoints folder (newest checkpoint), one checkpoint, or a folder of another format.
DST is a new folder. It is written as DST.partial, which makes the conversion resumable, and renamed once it is complete
and verified. With --to deepspeed it is one checkpoint, from which checkpoint.start_from can start a run; with --to gguf
DST is one file for llama.cpp.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from tqdm import tqdm

from llama_ds.checkpoint.choices import (
    DTYPE_NAMES,
    KINDS,
    QKV_ORDERS,
    READ_AS,
    SHARDED,
    STAGED,
    TARGET_DTYPES,
    TARGETS,
    TRANSFORMER_IMPLS,
)
from llama_ds.command_line import new_parser, processes, real, run, whole
from llama_ds.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llama_ds.checkpoint.conversion.proof import Proof
    from llama_ds.checkpoint.formats.meta_params import Unsaid
    from llama_ds.checkpoint.formats.plan import Plan
    from llama_ds.checkpoint.weights import ModelFiles

EXAMPLES = """examples:
  tools/convert.py runs/quickstart runs/quickstart/hf --to hf
  tools/convert.py models/Llama-2-7b-hf runs/start --from hf --to deepspeed --tp 2
  tools/convert.py runs/quickstart/checkpoints/step_00000100 exported --to meta --tp 2 --dtype bf16
  tools/convert.py runs/quickstart quickstart.gguf --to gguf --dtype q8_0
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(convert_model, __doc__, EXAMPLES)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("destination", metavar="DST")
    parser.add_argument("--from", dest="kind", choices=KINDS, help="format of SRC (default: detected from its files)")
    parser.add_argument("--to", choices=TARGETS, required=True, help="format of DST")
    parser.add_argument("--tp", type=whole(), default=1, help=f"number of tensor-parallel shards, for {SHARDED}")
    parser.add_argument(
        "--pp",
        type=whole(0),
        default=1,
        help=f"pipeline stages, for {STAGED}; 0 for neox and megatron_deepspeed: files of a model without a pipeline",
    )
    parser.add_argument(
        "--transformer-impl",
        choices=TRANSFORMER_IMPLS,
        default=TRANSFORMER_IMPLS[0],
        help="Megatron-LM's flag of that name: names of the norms in a result for it (default: %(default)s)",
    )
    parser.add_argument(
        "--to-qkv-order",
        choices=QKV_ORDERS,
        help="order of the rows of query, key and value in a result for megatron_deepspeed: that of its code since "
        "2024-12-04 (blocks) or before (default: blocks without grouped heads, heads with)",
    )
    parser.add_argument(
        "--dtype", choices=TARGET_DTYPES, help="dtype of the weights (default: the source's); q8_0 for gguf"
    )
    parser.add_argument("--vocab-size", type=whole(), metavar="N", help="pad or cut the embedding and head to N rows")
    unsaid = parser.add_argument_group("of a folder of another format, what it does not say")
    unsaid.add_argument(
        "--rope-factor", type=real(1), metavar="X", help="of Llama 3.1 and 3.3 it is 8, of 3.2 it is 32"
    )
    unsaid.add_argument(
        "--seq-len", type=whole(), metavar="N", help="longest sequence that it was trained for, in tokens"
    )
    unsaid.add_argument(
        "--rope-theta",
        type=real(1),
        metavar="X",
        help="rotary base of a checkpoint of Megatron-LM before Megatron core, which ignored the one in its args",
    )
    unsaid.add_argument(
        "--qkv-order",
        choices=QKV_ORDERS,
        help="order of the rows of query, key and value of GPT-NeoX and Megatron-DeepSpeed, which changed late in 2024",
    )
    unsaid.add_argument("--bos-id", type=whole(0), metavar="N", help="default: the tokenizer's")
    unsaid.add_argument("--eos-id", type=whole(0), metavar="N", nargs="+", default=[], help="default: the tokenizer's")
    parser.add_argument(
        "--embedding",
        choices=("rows", "columns"),
        help="how Meta's code for the model shards the embedding: rows for Llama 3, columns for LLaMA 1, 2 and Code "
        "Llama (default: as its tokenizer.model tells)",
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="convert a model with NaN or infinite weights as it is"
    )
    parser.add_argument("--workers", type=processes, help="threads (default: 2 to 4, depending on the cores)")
    parser.add_argument("--no-logits", action="store_true", help="verify without running the model, if it is too large")
    parser.add_argument("--card", action="store_true", help="add a model card of what the run says (hf only)")
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="FILE", help="results_*.json of lm-eval, for the model card"
    )
    parser.add_argument("--energy-kwh", type=real(0), metavar="X", help="energy of the training, for the model card")
    parser.add_argument("--overwrite", action="store_true", help="replace DST and an unfinished DST.partial")
    return parser


def convert_model(args: argparse.Namespace) -> None:
    """Convert, verify and print a report."""
    from llama_ds.checkpoint.conversion.convert import plan_of
    from llama_ds.checkpoint.conversion.report import report
    from llama_ds.checkpoint.formats.folded import folded
    from llama_ds.checkpoint.formats.huggingface import needs_tokenizer
    from llama_ds.checkpoint.formats.plan import Target
    from llama_ds.checkpoint.load_model import open_model

    if args.card and args.to != "hf":
        raise UserError(f"command line: --card applies only to hf, not to {args.to}; leave it out")
    if args.to != "gguf" and args.dtype not in (None, *DTYPE_NAMES):
        raise UserError(f"command line: --dtype {args.dtype} applies only to gguf; use {', '.join(DTYPE_NAMES)}")
    if not args.card and (args.results or args.energy_kwh is not None):
        raise UserError("command line: --results and --energy-kwh apply only to a model card; add --card")
    files, original = open_source(args), None
    if args.to != "deepspeed":
        files, original = folded(files), files
    if args.to == "gguf":
        return convert_to_gguf(args, files)
    if args.to_qkv_order and args.to != "megatron_deepspeed":
        raise UserError(f"command line: --to-qkv-order applies only to megatron_deepspeed, not to {args.to}; omit it")
    dtype, impl = args.dtype or files.dtype, args.transformer_impl
    target = Target(dtype, args.tp, args.pp, args.embedding, impl, args.to_qkv_order)
    tokenizer = None
    if args.to == "hf" and needs_tokenizer(files):
        from llama_ds.benchmarks.exported_tokenizer import hf_tokenizer

        tokenizer, warning = hf_tokenizer(files)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
    plan = plan_of(files, args.to, target, tokenizer)
    if args.card:
        from llama_ds.benchmarks.model_card import Stated, card_files

        name, stated = Path(args.destination).resolve().name, Stated(args.energy_kwh, tuple(args.results))
        plan = replace(plan, small={**plan.small, **card_files(files, name, target.dtype, stated)})
    reference = transformers_logits if args.to == "hf" else None
    kind = READ_AS.get(args.to, args.to)
    proof = converted(args, files, plan, lambda folder: open_model(folder, kind), original, logits_of_result=reference)
    print("\n".join([*report(files, plan, args.destination, target.dtype), *proof.lines()]))


def open_source(args: argparse.Namespace) -> ModelFiles:
    """Return the model to convert, with the weights from which a result of the wanted dtype is made."""
    from llama_ds.benchmarks.token_ids import with_missing_rows_noted, with_token_ids
    from llama_ds.checkpoint.load_model import open_model
    from llama_ds.checkpoint.weights import for_dtype

    files = open_model(args.source, args.kind, args.vocab_size, unsaid_by(args))
    files = with_missing_rows_noted(with_token_ids(files, args.bos_id, args.eos_id))
    return for_dtype(files, args.dtype or files.dtype)


def unsaid_by(args: argparse.Namespace) -> Unsaid:
    """Return what the user says of the source."""
    from llama_ds.checkpoint.formats.meta_params import Unsaid

    return Unsaid(args.rope_factor, args.seq_len, args.qkv_order, args.rope_theta)


def convert_to_gguf(args: argparse.Namespace, files: ModelFiles) -> None:
    """Convert to a GGUF file, verify it and print a report."""
    from llama_ds.checkpoint.conversion.report import report
    from llama_ds.checkpoint.formats.plan import Target

    try:
        from llama_ds.benchmarks.gguf_tokenizer import model_vocabulary
        from llama_ds.checkpoint.formats.gguf_model import plan_gguf, read_back_gguf, rounded_as, unquantized
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise UserError("command line: --to gguf needs the package gguf; pip install 'llama_ds[gguf]'") from None
    if not args.destination.endswith(".gguf"):
        raise UserError(f"{args.destination}: a GGUF model is one file; give a name that ends in .gguf")
    vocabulary, differences = model_vocabulary(files)
    for difference in differences:
        print(f"note: {difference}", file=sys.stderr)
    target = Target(args.dtype or files.dtype, args.tp, args.pp)
    plan = plan_gguf(files, target, Path(args.destination).name, vocabulary)
    proof = converted(
        args, files, plan, lambda folder: read_back_gguf(files, plan, folder, target.dtype), rounded=rounded_as
    )
    lines = report(files, plan, args.destination, target.dtype)
    if target.dtype == "q8_0" and (matrices := unquantized(files)):
        lines.append(
            f"{len(matrices)} matrices ({matrices[0]}, ...) are fp16: their rows are no multiple of q8_0's 32 elements"
        )
    print("\n".join([*lines, *proof.lines()]))


def converted(
    args: argparse.Namespace,
    files: ModelFiles,
    plan: Plan,
    read_back: Callable[[str], ModelFiles],
    original: ModelFiles | None = None,
    **comparison: Any,
) -> Proof:
    """Write the files of a plan and verify what `read_back` finds in them; other arguments go to `prove`."""
    from llama_ds.checkpoint.conversion.convert import Options, convert
    from llama_ds.checkpoint.conversion.proof import prove

    options = Options(args.overwrite, args.allow_nonfinite, args.workers or Options.workers)
    with closing(ProgressBars()) as bars:

        def proof_of(folder: str) -> Proof:
            result = read_back(folder)
            return prove(files, result, options, bars.show, not args.no_logits, original, **comparison)

        return convert(files, plan, args.destination, options, proof_of, bars.show)


class ProgressBars:
    """Shows a progress bar over bytes for each task in turn."""

    def __init__(self) -> None:
        self._what, self._bar = "", tqdm(disable=True)

    def show(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of the task `what` are done."""
        if what != self._what:
            self.close()
            self._what, self._bar = what, tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Close the present bar."""
        self._bar.close()


def transformers_logits(folder: str, ids: Tensor) -> Tensor:
    """Return the logits (1, T, V) that transformers computes; the import is lazy because it is slow."""
    from llama_ds.benchmarks.generation import fp32_logits

    return fp32_logits(folder, ids)


if __name__ == "__main__":
    sys.exit(main())
