"""Runs the checkpoint benchmark: starts the ranks, times a conversion and tabulates medians."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_ds.benchmarks.checkpoint.worker import CheckpointBenchSettings, drop_page_cache, peak_memory
from llama_ds.checkpoint.conversion.convert import Options, convert, plan_of
from llama_ds.checkpoint.formats.plan import Target
from llama_ds.checkpoint.load_model import open_model
from llama_ds.checkpoint.manifest import sync
from llama_ds.child_processes import run_child
from llama_ds.config.run_file import find_run_file
from llama_ds.machine import machine

GB = 1e9
ROOT = Path(__file__).resolve().parents[3]
RUN_FILE = find_run_file("quickstart")
# The quickstart's model, scaled up to 188 million parameters so that a save takes seconds.
SHAPE = (
    *("model.hidden_size=1024", "model.intermediate_size=2816", "model.num_hidden_layers=12"),
    *("model.num_attention_heads=16", "model.num_key_value_heads=16", "model.vocab_size=16384"),
    *("data.seq_len=64", "training.global_batch=2", "parallel.micro_batch=1", "deepspeed.bf16.enabled=false"),
)
SAVED = ("parallel.pp=2", "parallel.tp=1", "parallel.sequence_parallel=false")  # layout of the save
RESHARDED = ("parallel.pp=1", "parallel.tp=2")  # layout of the resharding load
RANKS = 2


def measure(overrides: list[str], folder: str, repeats: int) -> dict[str, Any]:
    """Return all times, and their medians as rates. Files written in `folder` remain there.

    Raises:
        subprocess.CalledProcessError: a rank failed; its message is on stderr.
    """
    settings = CheckpointBenchSettings(RUN_FILE, [*SHAPE, *SAVED, *overrides], list(RESHARDED), folder, repeats)
    request, out = os.path.join(folder, "settings.json"), os.path.join(folder, "results.json")
    Path(request).write_text(json.dumps(asdict(settings)))
    worker = str(Path(__file__).with_name("worker.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", worker]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    run_child([*command, request, out], grace_s=0, env=environment, stdout=sys.stderr).check_returncode()
    results = json.loads(Path(out).read_text())
    results["convert"] = _conversion(results.pop("checkpoint"), folder, repeats)
    inputs = {"overrides": settings.overrides, "reshard": settings.reshard}
    return {"machine": machine(), **inputs, **results, "summary": summary(results)}


def _conversion(checkpoint: str, folder: str, repeats: int) -> dict[str, Any]:
    """Time the conversion to Hugging Face's format, without verification, alternating with a copy of its output."""
    target, copied, growth = os.path.join(folder, "hf"), os.path.join(folder, "copied"), 0
    files = open_model(checkpoint)
    plan = plan_of(files, "hf", Target(files.dtype))
    paths = [os.path.join(checkpoint, name) for name in os.listdir(checkpoint) if name.endswith(".pt")]

    def ours() -> None:
        convert(files, plan, target, Options(), lambda _: None)

    def copy() -> None:
        os.makedirs(copied)
        for name in os.listdir(target + ".source"):
            shutil.copyfile(os.path.join(target + ".source", name), os.path.join(copied, name))
            sync(os.path.join(copied, name))

    ours()
    os.rename(target, target + ".source")
    methods: dict[str, tuple[Callable[[], None], list[str]]] = {
        "ours": (ours, paths),
        "copy": (copy, [os.path.join(target + ".source", name) for name in os.listdir(target + ".source")]),
    }
    found: dict[str, Any] = {"bytes": plan.nbytes, "ours": [], "copy": []}
    for turn in range(repeats):
        for name in ("ours", "copy") if turn % 2 else ("copy", "ours"):
            for output in (target, copied):
                shutil.rmtree(output, ignore_errors=True)
            os.sync()
            call, sources = methods[name]
            drop_page_cache(sources)
            before, begin = peak_memory(reset=True), time.perf_counter()
            call()
            found[name].append(time.perf_counter() - begin)
            growth = max(growth, peak_memory() - before) if name == "ours" else growth
    return {**found, "memory_bytes": growth}


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Return medians as seconds, rates and ratios."""
    median = {
        kind: {name: statistics.median(values) for name, values in results[kind].items() if isinstance(values, list)}
        for kind in ("save", "load", "step_s", "convert")
    }
    size = results["bytes"] / GB
    save, load, change = median["save"], median["load"], median["convert"]
    return {
        "save_gb_per_s": {name: size / s for name, s in save.items() if name != "ours_stall"},
        "load_gb_per_s": {name: size / s for name, s in load.items()},
        "convert_gb_per_s": {name: results["convert"]["bytes"] / GB / s for name, s in change.items()},
        "save_of_disk": save["raw"] / save["ours"],
        "load_of_disk": load["raw"] / load["load"],
        "reshard_of_disk": load["raw"] / load["reshard"],
        "convert_of_copy": change["copy"] / change["ours"],
        "stall_s": save["ours_stall"],
        "stall_of_save": save["ours_stall"] / save["ours"],
        "step_s": median["step_s"],
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as readable text."""
    found = results["summary"]

    def rates(kind: str, names: dict[str, str]) -> str:
        return ", ".join(f"{label} {found[kind][name]:.2f}" for name, label in names.items())

    plain = {"torch.save": "torch.save", "torch.load": "torch.load", "safetensors": "safetensors"}
    lines = [
        f"{results['parameters'] / 1e6:.0f} million parameters, {results['bytes'] / GB:.2f} GB, {RANKS} ranks, "
        f"medians of {len(results['save']['ours'])} turns, GB/s with sync, cold page cache",
        "save     " + rates("save_gb_per_s", {"raw": "disk", "ours": "ours", **_of(plain, found, "save_gb_per_s")}),
        "load     " + rates("load_gb_per_s", {"raw": "disk", "load": "ours, verified", "reshard": "resharded"})
        + ", " + rates("load_gb_per_s", _of(plain, found, "load_gb_per_s")),
        "convert  " + rates("convert_gb_per_s", {"copy": "file copy", "ours": "to Hugging Face"}),
        f"ours as a fraction of the disk: save {found['save_of_disk']:.2f}, load {found['load_of_disk']:.2f}, reshard "
        f"{found['reshard_of_disk']:.2f}; convert as a fraction of a copy {found['convert_of_copy']:.2f}",
        f"training waits {found['stall_s']:.2f} s, {found['stall_of_save']:.1%} of the save; a step takes "
        f"{found['step_s']['alone']:.2f} s, during a save {found['step_s']['beside a save']:.2f} s",
        f"additional memory: load {results['load']['load_memory_bytes'] / 2**20:.0f} MiB, reshard "
        f"{results['load']['reshard_memory_bytes'] / 2**20:.0f} MiB, convert "
        f"{results['convert']['memory_bytes'] / 2**20:.0f} MiB",
    ]  # fmt: skip
    return "\n".join(lines)


def _of(names: dict[str, str], found: dict[str, Any], kind: str) -> dict[str, str]:
    return {name: label for name, label in names.items() if name in found[kind]}
