#!/usr/bin/env python3
"""Measure training steps: ours against transformers, and against the matrix products that neither can do without."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from llama_ds.checkpoint.huggingface import hf_config
from llama_ds.checkpoint.names import hf_name
from llama_ds.checkpoint.weights import DTYPES
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.layout import Layout
from llama_ds.config.recompute import POLICIES
from llama_ds.config.run_file import load_run, resolved
from llama_ds.config.schema import ParallelConfig, RunConfig
from llama_ds.errors import UserError
from llama_ds.model.flops import flops_per_token, parameter_count
from llama_ds.model.llama import Llama, shared_parts
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.tensor_parallel import SingleRank
from llama_ds.perf.step_benchmark import Step, Timing, gemm_step, time_interleaved, training_step

with redirect_stdout(sys.stderr):  # DeepSpeed logs to the stdout that it finds when imported; ours is for results
    from llama_ds.parallel import world
    from llama_ds.training.engine import build_engine, build_optimizer

EXAMPLES = """examples:
  tools/throughput.py compare-hf
  tools/throughput.py compare-hf --batch 2 --seq-len 512 --threads 2 model.hidden_size=1024 \\
      model.intermediate_size=2752 model.num_hidden_layers=4 model.vocab_size=8192
"""
AGREEMENT = {"fp32": 1e-5, "bf16": 2e-2}  # of the losses on the initial weights
LEARNING_RATE = 1e-4


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    args = parse(argv)
    try:
        return {"compare-hf": compare_hf}[args.command](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "compare-hf",
        help="a whole training step of one process, ours and transformers' LlamaForCausalLM with torch's AdamW",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    command.add_argument("overrides", nargs="*", metavar="key=value", help="of the run file: another shape")
    command.add_argument("--run", default="ds_configs/quickstart.yaml", help="run file (default: %(default)s)")
    command.add_argument("--batch", type=int, help="rows per step (default: the run's parallel.micro_batch)")
    command.add_argument("--seq-len", type=int, help="tokens per row (default: the run's data.seq_len)")
    command.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    command.add_argument("--repeats", type=int, default=15, help="timed steps of each (default: %(default)s)")
    command.add_argument("--dtype", choices=DTYPES, default="fp32")
    command.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="of our engine (default: fp32 0, bf16 1)")
    command.add_argument("--policy", choices=POLICIES, default="selective", help="of our layers (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print the results as JSON")
    command.add_argument("--out", metavar="FILE", help="write the results as JSON to FILE too")
    return parser.parse_args(argv)


def compare_hf(args: argparse.Namespace) -> int:
    """Time whole training steps of one process against transformers."""
    run = _benchmark_run(args)
    torch.set_num_threads(args.threads)
    batch = np.random.default_rng(0).integers(0, run.model.vocab_size, (args.batch, args.seq_len + 1))
    steps = _contestants(run, batch, args.dtype)
    with tqdm(total=len(steps) * (args.repeats + 2), unit="step", disable=None) as bar:
        timings = time_interleaved(steps, args.repeats, tick=bar.update)
    _check_losses(timings, args.dtype)
    results = _results(run, args, timings)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1) if args.json else _table(results))
    return 0


def _benchmark_run(args: argparse.Namespace) -> RunConfig:
    """Return the run as one process takes it, without accumulation; fill what the command line leaves to it."""
    run = load_run(args.run, args.overrides)
    args.batch = run.parallel.micro_batch if args.batch is None else args.batch
    args.seq_len = run.data.seq_len if args.seq_len is None else args.seq_len
    args.zero = int(args.dtype == "bf16") if args.zero is None else args.zero
    for name in ("batch", "seq_len", "threads", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"command line: --{name.replace('_', '-')} {getattr(args, name)} is not positive")
    return replace(
        run,
        data=replace(run.data, seq_len=args.seq_len),
        training=replace(run.training, global_batch=args.batch),
        parallel=ParallelConfig(micro_batch=args.batch, recompute=args.policy),
        deepspeed={"zero_optimization": {"stage": args.zero}, "bf16": {"enabled": args.dtype == "bf16"}},
    )


def _contestants(run: RunConfig, batch: np.ndarray, dtype_name: str) -> dict[str, Step]:
    """Return the steps to time: the same weights, rows, optimizer settings and clipping for all."""
    dtype, settings = DTYPES[dtype_name], run.optimizer
    rows = torch.from_numpy(batch)
    ids, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    shared = shared_parts(run, SingleRank(), "cpu", dtype)
    policies = [run.parallel.recompute] * run.model.num_hidden_layers
    ours = Llama(shared, NextTokenLoss(shared.tp), policies).to(dtype)

    def theirs(fused: bool | None) -> Step:
        model = transformers_model(run, ours, dtype)
        optimizer = torch.optim.AdamW(
            model.parameters(), LEARNING_RATE, settings.betas, settings.eps, settings.weight_decay, fused=fused
        )

        def loss() -> Tensor:
            return model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss

        return training_step(model, optimizer, settings.clip, loss)

    own_optimizer = build_optimizer(ours, replace(settings, lr=LEARNING_RATE), run.deepspeed)
    return {
        "transformers": theirs(fused=None),
        "transformers_fused_adamw": theirs(fused=True),
        "llama_ds_model": training_step(ours, own_optimizer, settings.clip, lambda: ours(ids, labels)),
        "llama_ds_engine": _engine_step(run, batch),
        "gemms": gemm_step(run.model, ids.numel(), dtype),
    }


def transformers_model(run: RunConfig, source: Llama, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return transformers' model of the same shape with a copy of our weights."""
    model = LlamaForCausalLM(LlamaConfig(**hf_config(resolved(run), str(dtype).removeprefix("torch.")))).to(dtype)
    count = run.model.num_hidden_layers
    weights = {
        hf_name(i, name, count): w for i, layer in enumerate(source.layers) for name, w in layer.state_dict().items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"} or (missing and not run.model.tie_word_embeddings):
        raise AssertionError(f"transformers names its weights otherwise: {missing} missing, {unexpected} unexpected")
    model.tie_weights()
    return model.train()


def _engine_step(run: RunConfig, batch: np.ndarray) -> Step:
    """Return the step as training takes it: DeepSpeed's engine, from the same initial weights."""
    layout = Layout(1, 1, 1, 1, len(batch), 1, len(batch))
    config = deepspeed_config(run, layout, bf16_native=True)
    world.join(world.Place(0, 1, 0))
    engine = build_engine(run, layout, config, torch.device("cpu"))
    batches = itertools.repeat(batch)
    return lambda: engine.mean_loss(engine.train_step(batches, LEARNING_RATE))


def _check_losses(timings: dict[str, Timing], dtype: str) -> None:
    """Make sure that all contestants computed the same thing: their losses on the initial weights agree."""
    first = {name: timing.losses[0] for name, timing in timings.items() if name != "gemms"}
    if max(first.values()) - min(first.values()) > AGREEMENT[dtype]:
        raise AssertionError(f"losses on the same weights and rows differ by more than {AGREEMENT[dtype]}: {first}")


def _results(run: RunConfig, args: argparse.Namespace, timings: dict[str, Timing]) -> dict[str, Any]:
    tokens = args.batch * args.seq_len
    median = {name: timing.median_s for name, timing in timings.items()}
    steps = {
        name: {
            "median_s": median[name],
            "min_s": min(timing.seconds),
            "max_s": max(timing.seconds),
            "tokens_per_s": tokens / median[name],
            "first_loss": timing.losses[0],
            "last_loss": timing.losses[-1],
        }
        for name, timing in timings.items()
    }
    fastest = min(median["transformers"], median["transformers_fused_adamw"])
    ours = ("llama_ds_model", "llama_ds_engine")
    return {
        "shape": asdict(run.model),
        "parameters": parameter_count(run.model),
        "batch": args.batch,
        "seq_len": args.seq_len,
        "dtype": args.dtype,
        "zero": args.zero,
        "policy": args.policy,
        "threads": args.threads,
        "repeats": args.repeats,
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__},
        "model_gflops_per_step": flops_per_token(run.model, args.seq_len) * tokens / 1e9,
        "steps": steps,
        # Above 1: ours takes fewer seconds. The second is against the better of their two optimizers.
        "speed_over_transformers": {name: median["transformers"] / median[name] for name in ours},
        "speed_over_fastest_transformers": {name: fastest / median[name] for name in ours},
        # How many times the bare matrix products a step takes.
        "time_over_gemms": {name: median[name] / median["gemms"] for name in median if name != "gemms"},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _table(results: dict[str, Any]) -> str:
    shape = results["shape"]
    lines = [
        f"{results['parameters'] / 1e6:.1f} M parameters (hidden {shape['hidden_size']}, "
        f"{shape['num_hidden_layers']} layers), batch {results['batch']} x {results['seq_len']}, {results['dtype']}, "
        f"{results['threads']} threads, median of {results['repeats']}",
        f"{'':26} {'ms/step':>9} {'tokens/s':>9} {'x gemms':>8} {'x transformers':>15} {'x their fastest':>16}",
    ]
    for name, step in results["steps"].items():
        over = results["time_over_gemms"].get(name)
        plain, best = (results[f"speed_over_{kind}"].get(name) for kind in ("transformers", "fastest_transformers"))
        columns = (f"{over:8.2f}" if over else "", f"{plain:15.3f}" if plain else "", f"{best:16.3f}" if best else "")
        lines.append(f"{name:26} {step['median_s'] * 1e3:9.1f} {step['tokens_per_s']:9,.0f} " + " ".join(columns))
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
