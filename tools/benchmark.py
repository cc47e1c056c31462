#!/usr/bin/env python3
"""Benchmark against other libraries: steps, layers, data, checkpoints, evaluation; communication; bit flips."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds.checkpoint.choices import DTYPE_NAMES
from llama_ds.checkpoint.model_shape import read_models
from llama_ds.command_line import (
    Answer,
    add_results,
    delay,
    from_options,
    new_parser,
    processes,
    run,
    size,
    subcommands,
    whole,
)
from llama_ds.config.recompute import POLICIES
from llama_ds.config.run_file import find_run_file, load_run
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError

# Commands import heavy modules themselves, so that --help is fast.
if TYPE_CHECKING:
    from llama_ds.benchmarks.compare import Settings
    from llama_ds.data.text.tokenizer import Tokenizer

EXAMPLES = """examples:
  tools/benchmark.py step
  tools/benchmark.py step --batch 2 --seq-len 512 model.hidden_size=1024 model.intermediate_size=2752
  tools/benchmark.py layer --shape 65b --tp 8 --seq-len 4096 --device cuda --out measured.json
  tools/benchmark.py data --streaming-python /tmp/rivals/bin/python --out measured.json
  tools/benchmark.py checkpoint --folder /mnt/scratch --out measured.json
  tools/benchmark.py evaluation runs/quickstart/hf --out measured.json
  tools/benchmark.py context --ranks 2 --rate-mbit 200 --delay-ms 0.5
  tools/benchmark.py tensor --rate-mbit 500 --chunks 1 4
  tools/benchmark.py flips --flips 84 --clean 10000 --out found.json
"""
DATA = """Build, read, open and resume data on this machine, with a fresh process for every measurement.

mosaicml-streaming and datasets require other package versions, so they need an environment of their own (a CUDA torch):
  python3 -m venv /tmp/rivals
  /tmp/rivals/bin/pip install mosaicml-streaming==0.13.0 datasets
Without --streaming-python both are omitted. TMPDIR needs about 1 GB. 100,000 shards take them 12 GB of memory.
"""
PARTS = ("build", "read", "open", "resume")  # parts of the data benchmark
EVALUATION = ("choices", "separate", "generation")  # parts of the benchmark of evaluation
SHAPES = {"quickstart": "quickstart", "7b": "llama_7b", "13b": "llama_13b", "33b": "llama_33b", "65b": "llama_65b"}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    read_models()
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(None, __doc__, EXAMPLES)
    add = subcommands(parser)
    words = "a full training step of one process, ours and transformers' LlamaForCausalLM with torch's AdamW"
    command = add("step", step, words)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="run file overrides, for another shape")
    command.add_argument("--run", default="ds_configs/quickstart.yaml", help="run file (default: %(default)s)")
    command.add_argument("--dtype", choices=DTYPE_NAMES, default="fp32")
    command.add_argument(
        "--zero", type=int, choices=(0, 1, 2, 3), help="our ZeRO stage (default: 0 in fp32, 1 in bf16)"
    )
    _add_sizes(command, policy="none")  # as in transformers and the default of run files
    words = "forward and backward of a decoder layer: manual, autograd, and transformers' LlamaDecoderLayer"
    command = add("layer", layer, words)
    command.add_argument("--shape", choices=SHAPES, default="quickstart", help="(default: %(default)s)")
    command.add_argument("--tp", type=whole(), default=1, help="time one rank's shard, without communication")
    command.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if available)")
    command.add_argument("--dtype", choices=DTYPE_NAMES, help="(default: bf16 on cuda, fp32 on cpu)")
    command.add_argument("--fp8", action="store_true", help="also time our layer with products in float8")
    _add_sizes(command, policy="selective")
    words = "building, reading, opening and resuming: ours, sentencepiece, Hugging Face, webdataset, streaming"
    _add_data_options(add("data", data, words, DATA))
    words = "saving, loading, resharding and converting: ours, the disk, torch.save, safetensors"
    command = add("checkpoint", checkpoints, words)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of ds_configs/quickstart.yaml")
    words = "folder on the disk to measure (default: %(default)s)"
    command.add_argument("--folder", default=tempfile.gettempdir(), help=words)
    command.add_argument("--repeats", type=whole(), default=5, help="number of turns (default: %(default)s)")
    add_results(command)
    _add_evaluation_options(add("evaluation", evaluation, "scores and texts: ours, lm-eval, transformers, in fp32"))
    _add_context_options(add("context", context, "attention over rows that ranks share, by each method"))
    _add_tensor_options(add("tensor", tensor, "waits of decoder layers for tensor-parallel collectives, by chunks"))
    command = add("flips", flips, "random bit flips in a small run, and which of them its checks find")
    command.add_argument("--ranks", type=whole(2), default=3, help="replicas (default: %(default)s)")
    command.add_argument("--flips", type=whole(0), default=84, help="flips at each of 13 sites (default: %(default)s)")
    command.add_argument("--clean", type=whole(), default=1000, help="steps without flips (default: %(default)s)")
    command.add_argument("--seed", type=whole(0), default=0, help="(default: %(default)s)")
    words = "time for them, after which there are fewer; 0: no limit (default: %(default)s)"
    command.add_argument("--seconds", type=delay, default=0.0, help=words)
    command.add_argument("--add", metavar="FILE", help="earlier results, to which these are added; needs another seed")
    add_results(command)
    return parser


def _add_evaluation_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", help="export with its tokenizer; lm-eval is measured where it is installed")
    command.add_argument("--requests", type=whole(), default=1000, help="(default: %(default)s)")
    command.add_argument("--rows", type=whole(), default=8, help="rows of a forward pass (default: %(default)s)")
    command.add_argument("--prompt-words", type=whole(2), default=120, help="(default: %(default)s)")
    command.add_argument("--new-tokens", type=whole(), default=64, help="(default: %(default)s)")
    words = f"any of {', '.join(EVALUATION)} (default: all)"
    command.add_argument("--only", nargs="+", choices=EVALUATION, default=EVALUATION, metavar="PART", help=words)
    command.add_argument(
        "--batches", type=whole(), nargs="+", default=[1, 16], help="prompts at a time (default: 1 16)"
    )
    command.add_argument("--threads", type=processes, default=os.cpu_count(), help="torch threads (default: all cores)")
    command.add_argument("--repeats", type=whole(), default=5, help="number of turns (default: %(default)s)")
    add_results(command)


def _add_context_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--ranks", type=whole(), default=2, help="(default: %(default)s)")
    command.add_argument("--seq-lens", type=whole(), nargs="+", default=[512, 4096], metavar="TOKENS")
    command.add_argument("--heads", type=whole(), default=4, help="query heads (default: %(default)s)")
    command.add_argument("--kv-heads", type=whole(), default=4, help="key-value heads (default: %(default)s)")
    command.add_argument("--head-dim", type=whole(), default=64, help="(default: %(default)s)")
    _add_links(command)
    words = "neighbouring ranks with unlimited links to each other, as the GPUs of a node (default: %(default)s)"
    command.add_argument("--node-ranks", type=whole(), default=1, help=words)


def _add_tensor_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--ranks", type=whole(), default=2, help="(default: %(default)s)")
    command.add_argument("--layers", type=whole(), default=3, help="(default: %(default)s)")
    command.add_argument("--hidden", type=whole(), default=1536, help="hidden size (default: %(default)s)")
    command.add_argument("--rows", type=whole(), default=1, help="(default: %(default)s)")
    command.add_argument("--seq-len", type=whole(), default=512, metavar="TOKENS", help="(default: %(default)s)")
    words = "values of parallel.tp_chunks, compared with the first (default: 1 4)"
    command.add_argument("--chunks", type=whole(), nargs="+", default=[1, 4], help=words)
    words = "let products sleep for the time of this rate instead of multiplying, on a busy machine"
    command.add_argument("--paced-gflops", type=size, metavar="GFLOPS", help=words)
    command.add_argument("--deferred", action="store_true", help="a backward that defers weight gradients")
    _add_links(command)


def _add_links(command: argparse.ArgumentParser) -> None:
    words = "bandwidth of a link in each direction; every rank is a simulated host (needs root)"
    command.add_argument("--rate-mbit", type=size, help=words)
    command.add_argument("--delay-ms", type=delay, default=0.0, help="latency of a link in each direction")
    command.add_argument("--repeats", type=whole(), default=5, help="number of turns (default: %(default)s)")
    add_results(command)


def _add_sizes(command: argparse.ArgumentParser, policy: str) -> None:
    command.add_argument("--batch", type=whole(), help="rows per step (default: the run's parallel.micro_batch)")
    command.add_argument("--seq-len", type=whole(), help="tokens per row (default: the run's data.seq_len)")
    command.add_argument("--policy", choices=POLICIES, default=policy, help="our save policy (default: %(default)s)")
    command.add_argument("--threads", type=processes, default=os.cpu_count(), help="torch threads (default: all cores)")
    command.add_argument(
        "--repeats", type=whole(), default=15, help="timed steps of each contestant (default: %(default)s)"
    )
    command.add_argument("--compiled", action="store_true", help="also time transformers under torch.compile")
    add_results(command)


def _add_data_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--corpus", nargs="+", default=[], metavar="PATTERN", help="(default: texts on this machine)")
    command.add_argument(
        "--corpus-mb", type=whole(1, 10**9), help="text to build from (default: 30); more is better for workers"
    )
    command.add_argument("--tokenizer", metavar="MODEL", help="(default: train one with 4096 ids)")
    command.add_argument("--streaming-python", metavar="PYTHON", help="interpreter with these packages")
    command.add_argument("--run", default=find_run_file("65b"), help="run file to resume")
    command.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"any of {', '.join(PARTS)}")
    command.add_argument("--quick", action="store_true", help="small sizes, for a smoke test only")
    command.add_argument("--repeats", type=whole(), default=5, help="processes per contestant (default: %(default)s)")
    add_results(command)


def step(args: argparse.Namespace) -> Answer:
    """Time full training steps of one process against transformers."""
    wanted = load_run(args.run, args.overrides)
    from llama_ds.benchmarks.compare import measure_steps
    from llama_ds.benchmarks.report import step_table

    zero = int(args.dtype == "bf16") if args.zero is None else args.zero
    results = measure_steps(wanted, _settings(args, wanted, args.dtype), zero)
    return Answer(results, step_table(results))


def layer(args: argparse.Namespace) -> Answer:
    """Time one decoder layer."""
    wanted = load_run(find_run_file(SHAPES[args.shape]))
    import torch

    from llama_ds.benchmarks.compare import measure_layer
    from llama_ds.benchmarks.report import layer_table

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("command line: --device cuda: torch finds no CUDA device; use --device cpu")
    dtype = args.dtype or ("bf16" if device == "cuda" else "fp32")
    results = measure_layer(wanted, args.shape, _settings(args, wanted, dtype), args.tp, device, args.fp8)
    return Answer(results, layer_table(results))


def _settings(args: argparse.Namespace, wanted: RunConfig, dtype: str) -> Settings:
    from llama_ds.benchmarks.compare import Settings

    batch = wanted.parallel.micro_batch if args.batch is None else args.batch
    seq_len = wanted.data.seq_len if args.seq_len is None else args.seq_len
    if args.compiled and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("command line: --compiled needs a C++ compiler; install g++, or set CXX to another")
    return Settings(batch, seq_len, dtype, args.policy, args.threads, args.repeats, args.compiled)


def data(args: argparse.Namespace) -> Answer:
    """Measure the data path."""
    from tqdm import tqdm

    from llama_ds.benchmarks.data.bench import QUICK, DataBenchSizes
    from llama_ds.benchmarks.data.report import table
    from llama_ds.benchmarks.data.run import measure, set_up
    from llama_ds.checkpoint.formats.hf_tokenizer import tokenizer_json
    from llama_ds.data.text.sentencepiece_model import SentencepieceModel

    run_file, parts = find_run_file(args.run), args.only or PARTS
    if "resume" in parts:
        load_run(run_file)  # before the measurements of the other parts
    sizes = QUICK if args.quick else DataBenchSizes()
    if args.corpus_mb is not None:
        sizes = replace(sizes, corpus_mb=args.corpus_mb)

    def hf_json(tokenizer: Tokenizer) -> dict[str, Any]:
        if not isinstance(tokenizer.vocabulary, SentencepieceModel):
            raise UserError(f"{tokenizer.path}: not a sentencepiece model, which this benchmark measures; train one")
        return tokenizer_json(tokenizer.vocabulary.pieces(), tokenizer.vocabulary.prefixed)

    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as folder, tqdm(unit="run", disable=None) as bar:

        def tick(name: str) -> None:
            bar.set_description(name)
            bar.update()

        bench = set_up(folder, args.corpus, args.tokenizer, hf_json, sizes, args.repeats, args.streaming_python, tick)
        results = measure(bench, parts, run_file)
    return Answer(results, table(results))


def checkpoints(args: argparse.Namespace) -> Answer:
    """Measure checkpoints."""
    from llama_ds.benchmarks.checkpoint.run import measure, table

    with tempfile.TemporaryDirectory(prefix="benchmark-checkpoint-", dir=args.folder) as folder:
        results = measure(args.overrides, folder, args.repeats)
    return Answer(results, table(results))


def evaluation(args: argparse.Namespace) -> Answer:
    """Measure the evaluation of an exported model."""
    from llama_ds.benchmarks.evaluation_speed import SpeedSettings, measure, table

    settings = from_options(SpeedSettings, args)
    results = measure(args.folder, settings)
    return Answer(results, table(results))


def context(args: argparse.Namespace) -> Answer:
    """Measure attention over shared rows."""
    from llama_ds.benchmarks.context.request import ContextRequest
    from llama_ds.benchmarks.context.run import measure, table

    request = from_options(ContextRequest, args)
    request.check()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(request, Path(folder))
    return Answer(results, table(results))


def tensor(args: argparse.Namespace) -> Answer:
    """Measure exposed tensor-parallel communication."""
    from llama_ds.benchmarks.tensor.run import TensorRequest, measure, table

    request = from_options(TensorRequest, args)
    request.check()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(request, Path(folder))
    return Answer(results, table(results))


def flips(args: argparse.Namespace) -> Answer:
    """Flip bits of a small run."""
    from llama_ds.benchmarks.flips.request import FlipRequest
    from llama_ds.benchmarks.flips.run import measure, read, table, together

    request = from_options(FlipRequest, args)
    earlier = read(args.add, request) if args.add else None
    with tempfile.TemporaryDirectory() as folder:
        results = measure(request, Path(folder))
    if earlier:
        results = together(earlier, results)
    return Answer(results, table(results))


if __name__ == "__main__":
    sys.exit(main())
