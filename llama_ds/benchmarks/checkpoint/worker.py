"""Benchmarks save, load and reshard on every rank, against the raw disk and other libraries.

`tools/benchmark.py checkpoint` starts it as `worker.py SETTINGS OUT`; SETTINGS is `CheckpointBenchSettings` as JSON.

All contestants write and read the same bytes, each rank its own, with a cold page cache. Times are measured between two
barriers.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llama_ds import log
from llama_ds.checkpoint import store
from llama_ds.checkpoint.manifest import sync
from llama_ds.checkpoint.model_shape import read_models
from llama_ds.checkpoint.snapshot import tensors_in
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.parallel import world
from llama_ds.training.checkpoints import Checkpoints
from llama_ds.training.engines.build import build_engine
from llama_ds.training.engines.interface import Engine

READ_BYTES = 8 << 20
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class CheckpointBenchSettings:
    """Settings of the benchmark."""

    run_file: str
    overrides: list[str]
    reshard: list[str]  # additional overrides for the layout of the resharding load
    folder: str  # folder on the disk to measure; only the last checkpoint remains in it
    repeats: int


def main() -> None:
    """Run the benchmark; the first rank writes the results."""
    with open(sys.argv[1]) as file:
        settings = CheckpointBenchSettings(**json.load(file))
    rank_info = world.find_rank_info()
    read_models()
    log.silence_libraries()
    log.setup(quiet=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with world.failing_together():
        world.join(rank_info)
        results = CheckpointBench(settings, rank_info).measure()
        if rank_info.rank == 0:
            Path(sys.argv[2]).write_text(json.dumps(results))


class CheckpointBench:
    """One rank of the measurement."""

    def __init__(self, settings: CheckpointBenchSettings, rank_info: world.RankInfo) -> None:
        self.settings, self.rank_info = settings, rank_info
        self.scratch = os.path.join(settings.folder, f"rank{rank_info.rank}")
        self.step = 0  # step number of the newest checkpoint

    def measure(self) -> dict[str, Any]:
        """Return all results. Collective."""
        run, layout, engine = self._engine(self.settings.overrides)
        _train(engine, run, layout)
        checkpoints = Checkpoints(
            run, layout, "fp32" if not run.deepspeed["bf16"]["enabled"] else "bf16", self.rank_info
        )
        checkpoints.begin()
        self._save(checkpoints, engine)  # warm-up: the first save allocates its buffers
        checkpoints.settle()
        saving, steps = self._saving(checkpoints, engine, run, layout)
        loading = self._loading("load", checkpoints, engine, rivals=True)
        engine.deepspeed.destroy()
        del engine, checkpoints
        run, layout, engine = self._engine([*self.settings.overrides, *self.settings.reshard])
        checkpoints = Checkpoints(run, layout, "unused", self.rank_info)
        _train(engine, run, layout)
        loading |= self._loading("reshard", checkpoints, engine, rivals=False)
        sizes = world.gather_numbers([_bytes_of(self._own_files(checkpoints))], torch.device("cpu"))
        return {
            "parameters": sum(world.gather(sum(p.numel() for p in engine.deepspeed.param_names))),
            "bytes": int(sizes.sum()),
            "save": saving,
            "load": loading,
            "step_s": steps,
            "checkpoint": os.path.join(checkpoints.folder, store.tag_of(self.step)),
        }

    def _engine(self, overrides: list[str]) -> tuple[RunConfig, Layout, Engine]:
        run = load_run(self.settings.run_file, overrides)
        none = Path(self.settings.folder, "none.model")  # the run file's tokenizer need not be on this machine
        none.write_text("stands for a tokenizer\n")
        run = replace(run, output_dir=self.settings.folder, data=replace(run.data, tokenizer=str(none)))
        layout = resolve_layout(run, self.rank_info.world)
        return run, layout, build_engine(run, layout, deepspeed_config(run, layout, False), world.device())

    def _saving(
        self, checkpoints: Checkpoints, engine: Engine, run: RunConfig, layout: Layout
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Return the times of every save method, and of training steps during a save and without one."""
        trees = checkpoints.snapshot(engine.deepspeed, self.step).files
        tensors = {
            f"{name}/{i}": t for name, tree in trees.items() for i, t in enumerate(tensors_in(tree)) if t.numel()
        }
        found: dict[str, list[float]] = {}
        steps: dict[str, list[float]] = {"alone": [], "beside a save": []}

        def asynchronous() -> None:
            begin = time.perf_counter()
            self._save(checkpoints, engine)
            found.setdefault("ours_stall", []).append(time.perf_counter() - begin)
            checkpoints.settle()

        methods: dict[str, Callable[[], None]] = {
            "raw": lambda: self._write_raw(tensors),
            "torch.save": lambda: self._write_torch(trees),
            "safetensors": lambda: self._write_safetensors(tensors),
            "ours": asynchronous,
        }
        for turn in range(self.settings.repeats):
            for name in _rotated(list(methods), turn):
                self._make_room(checkpoints)
                found.setdefault(name, []).append(self._seconds(methods[name]))
        for _ in range(self.settings.repeats):
            steps["alone"].append(self._seconds(lambda: _train(engine, run, layout)))
            self._make_room(checkpoints)
            self._save(checkpoints, engine)
            steps["beside a save"].append(self._seconds(lambda: _train(engine, run, layout)))
            checkpoints.settle()
        self._write_torch(trees)
        self._write_safetensors(tensors)
        return found, steps

    def _save(self, checkpoints: Checkpoints, engine: Engine) -> None:
        self.step += 1
        checkpoints.save(engine.deepspeed, self.step, {})

    def _make_room(self, checkpoints: Checkpoints) -> None:
        """Remove earlier files and wait for the disk, so that no measurement pays for them."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        os.makedirs(self.scratch)
        if self.rank_info.rank == 0:
            for tag in store.tags(checkpoints.folder):
                shutil.rmtree(os.path.join(checkpoints.folder, tag))
        os.sync()

    def _loading(self, name: str, checkpoints: Checkpoints, engine: Engine, rivals: bool) -> dict[str, Any]:
        own, growth = self._own_files(checkpoints), 0

        def ours() -> None:
            nonlocal growth
            begin = peak_memory(reset=True)
            chosen = checkpoints.choose()
            assert chosen
            checkpoints.load(engine.deepspeed, *chosen)
            growth = max(growth, peak_memory() - begin)

        scratch = [os.path.join(self.scratch, name) for name in sorted(os.listdir(self.scratch))]
        torch_files = [path for path in scratch if path.endswith(".pt")]
        methods: dict[str, tuple[Callable[[], Any], list[str]]] = {name: (ours, own)}
        if rivals:
            methods["raw"] = (lambda: _read_raw(own), own)
            methods["torch.load"] = (
                lambda: [torch.load(path, weights_only=False) for path in torch_files],
                torch_files,
            )
            safe = [path for path in scratch if path.endswith(".safetensors")]
            methods["safetensors"] = (lambda: [load_file(path) for path in safe], safe)
        found: dict[str, Any] = {}
        for turn in range(self.settings.repeats):
            for method in _rotated(list(methods), turn):
                call, files = methods[method]
                drop_page_cache(files)
                found.setdefault(method, []).append(self._seconds(call))
        found[f"{name}_memory_bytes"] = int(world.gather_numbers([growth], torch.device("cpu")).max())
        return found

    def _own_files(self, checkpoints: Checkpoints) -> list[str]:
        """Return the checkpoint files that this rank verifies and therefore reads from the disk."""
        folder = os.path.join(checkpoints.folder, store.tag_of(self.step))
        names = sorted(name for name in os.listdir(folder) if name.endswith(".pt"))
        return [os.path.join(folder, name) for name in names[self.rank_info.rank :: self.rank_info.world]]

    def _seconds(self, call: Callable[[], Any]) -> float:
        world.barrier()
        begin = time.perf_counter()
        call()
        world.barrier()
        return time.perf_counter() - begin

    def _write_raw(self, tensors: dict[str, torch.Tensor]) -> None:
        with open(os.path.join(self.scratch, "raw"), "wb", buffering=0) as file:
            for tensor in tensors.values():
                left = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
                while left:
                    left = left[file.write(left[:READ_BYTES]) :]
            os.fsync(file.fileno())

    def _write_torch(self, trees: dict[str, Any]) -> None:
        for name, tree in trees.items():
            path = os.path.join(self.scratch, name)
            torch.save(tree, path)
            sync(path)

    def _write_safetensors(self, tensors: dict[str, torch.Tensor]) -> None:
        path = os.path.join(self.scratch, "all.safetensors")
        save_file(tensors, path)
        sync(path)


def _train(engine: Engine, run: RunConfig, layout: Layout) -> None:
    """Take a step on random tokens."""
    shape = (layout.micro_batch, run.data.seq_len + 1)
    rows = np.random.default_rng(0).integers(3, run.model.vocab_size, shape)
    engine.read(engine.train_step(iter([rows] * layout.accumulation), LEARNING_RATE))


def _rotated(names: list[str], turn: int) -> list[str]:
    turn %= len(names)
    return names[turn:] + names[:turn]


def _read_raw(paths: list[str]) -> None:
    buffer = memoryview(bytearray(READ_BYTES))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_page_cache(paths: list[str]) -> None:
    """Drop the files from the page cache, on all ranks together."""
    world.barrier()
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_of(paths: list[str]) -> int:
    return sum(os.path.getsize(path) for path in paths)


def peak_memory(reset: bool = False) -> int:
    """Return the peak resident memory of this process in bytes since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
