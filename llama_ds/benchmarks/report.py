"""Formats benchmark results as plain data for scripts and as a table."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch

from llama_ds.benchmarks.step import Timing
from llama_ds.config.schema import ModelConfig
from llama_ds.layout.flops import device_peak, flops_per_token, layer_forward_flops, parameter_count
from llama_ds.machine import cpu_name

_THEIRS = ("transformers", "transformers_fused_adamw", "transformers_compiled")


def step_results(model: ModelConfig, settings: dict[str, Any], timings: dict[str, Timing]) -> dict[str, Any]:
    """Return the results of timed training steps as plain data, with the benchmark's `settings`."""
    tokens = settings["batch"] * settings["seq_len"]
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
    fastest = min(s for name, s in median.items() if name in _THEIRS)
    ours = ("llama_ds_model", "llama_ds_engine")
    return {
        "shape": asdict(model),
        "parameters": parameter_count(model),
        **settings,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__},
        "model_gflops_per_step": flops_per_token(model, settings["seq_len"]) * tokens / 1e9,
        "steps": steps,
        # Above 1: ours is faster. The second ratio is against the fastest of theirs, with torch's default products.
        "speed_over_transformers": {name: median["transformers"] / median[name] for name in ours},
        "speed_over_fastest_transformers": {name: fastest / median[name] for name in ours},
        # Step time over that of its bare matrix products, in torch's default and in our matmul precision.
        "time_over_gemms": _over(median, "gemms"),
        "time_over_gemms_our_products": _over(median, "gemms_our_products"),
    }


def _over(median: dict[str, float], floor: str) -> dict[str, float]:
    return {name: seconds / median[floor] for name, seconds in median.items() if not name.startswith("gemms")}


def step_table(results: dict[str, Any]) -> str:
    """Return `step_results` as readable text."""
    shape = results["shape"]
    lines = [
        f"{results['parameters'] / 1e6:.1f} M parameters (hidden {shape['hidden_size']}, "
        f"{shape['num_hidden_layers']} layers), batch {results['batch']} x {results['seq_len']}, {results['dtype']}, "
        f"{results['threads']} threads, median of {results['repeats']}",
        f"{'':26} {'ms/step':>9} {'tokens/s':>9} {'x gemms':>8} {'x ours':>7} {'x transformers':>15} "
        f"{'x their fastest':>16}",
    ]
    for name, step in results["steps"].items():
        over, over_ours = (results[f"time_over_gemms{kind}"].get(name) for kind in ("", "_our_products"))
        plain, best = (results[f"speed_over_{kind}"].get(name) for kind in ("transformers", "fastest_transformers"))
        floors = f"{over:8.2f} {over_ours:7.2f}" if over else ""
        columns = (floors, f"{plain:15.3f}" if plain else "", f"{best:16.3f}" if best else "")
        lines.append(f"{name:26} {step['median_s'] * 1e3:9.1f} {step['tokens_per_s']:9,.0f} " + " ".join(columns))
    return "\n".join(line.rstrip() for line in lines)


def layer_results(
    model: ModelConfig, settings: dict[str, Any], timings: dict[str, Timing], measured: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    """Return the results of timed layers as plain data; `measured` has each layer's (saved, peak) bytes."""
    tokens = settings["batch"] * settings["seq_len"]
    flops = 3 * layer_forward_flops(model, settings["seq_len"]) * tokens
    on_cuda = settings["device"] == "cuda"
    name = torch.cuda.get_device_name() if on_cuda else cpu_name()
    peak = device_peak(name, settings["dtype"]) if on_cuda else None
    return {
        "model": asdict(model),
        **settings,
        "device": name,
        "torch": torch.__version__,
        "model_gflops": flops / 1e9,
        "layers": {
            contestant: {
                "median_s": timing.median_s,
                "min_s": min(timing.seconds),
                "max_s": max(timing.seconds),
                "tokens_per_s": tokens / timing.median_s,
                "tflops": flops / timing.median_s / 1e12,
                "mfu": flops / timing.median_s / peak if peak else None,
                "saved_bytes": measured[contestant][0],
                "peak_bytes": measured[contestant][1],
            }
            for contestant, timing in timings.items()
        },
    }


def layer_table(results: dict[str, Any]) -> str:
    """Return `layer_results` as readable text."""
    lines = [
        f"{results['shape']} layer, one of {results['tp']} tensor-parallel ranks, {results['batch']} x "
        f"{results['seq_len']} tokens, {results['dtype']}, {results['attention']}, "
        f"{results['device']}, median of {results['repeats']}",
        f"{'':26} {'ms':>9} {'tokens/s':>10} {'TFLOP/s':>8} {'MFU':>6} {'saved MiB':>10} {'peak MiB':>9}",
    ]
    for name, row in results["layers"].items():
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"{name:26} {row['median_s'] * 1e3:9.2f} {row['tokens_per_s']:10,.0f} {row['tflops']:8.3f} {mfu:>6} "
            f"{row['saved_bytes'] / 2**20:10.2f} {row['peak_bytes'] / 2**20:9.2f}"
        )
    return "\n".join(lines)
