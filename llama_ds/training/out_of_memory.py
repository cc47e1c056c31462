"""What a rank says that has run out of memory: what it holds beside what was planned, and the setting that helps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llama_ds.config.recompute import GIB
from llama_ds.config.schema import RunConfig
from llama_ds.errors import OutOfMemory, is_out_of_memory
from llama_ds.layout.layout import Layout
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.layout.recompute import ELEMENT_BYTES
from llama_ds.parallel import world
from llama_ds.parallel.held_memory import held_bytes
from llama_ds.perf.plan.relief import planned_memory, relief
from llama_ds.training.meter import peak_memory

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
_AMOUNT = r"(\d+(?:\.\d+)?) (bytes|[KMGTP]iB)"
_WANTED = re.compile(rf"allocate {_AMOUNT}")  # torch's allocators and numpy
_FRAGMENTED = re.compile(rf"{_AMOUNT} is reserved by PyTorch but unallocated")


class MemoryExplainer:
    """Turns the lack of memory of this rank, at its start or in a step, into one line of error."""

    def __init__(self, run: RunConfig, layout: Layout, dtype: str, rank: int, device: torch.device) -> None:
        self._run, self._layout, self._dtype, self._rank, self._device = run, layout, dtype, rank, device
        self._engine: Any = None
        self._step, self._first = 0, True

    def built(self, engine: Any) -> None:
        """Take the DeepSpeed engine, whose memory is measured from now on."""
        self._engine = engine

    def before_step(self, step: int, first: bool) -> None:
        """Say that the `step`-th step begins, the `first` one since this start."""
        self._step, self._first = step, first

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise `OutOfMemory` for a failed allocation within this context."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one of the latter
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(self.message(str(error)), self._first) from error

    def message(self, text: str) -> str:
        """Return the line for an allocation that failed with `text`."""
        missing = _bytes(_WANTED.search(text))
        asked = f"could not allocate {_size(missing)} more" if missing else "could not allocate more"
        coords = self._layout.coords(self._rank)
        placement = schedule_of(self._run, self._layout).placement
        stages = ", ".join(str(placement.stage(coords.pp, chunk)) for chunk in range(placement.chunks))
        moment = f"in step {self._step}" if self._step else "before the first step"
        return (
            f"{self._run.path}: rank {self._rank} ({coords.words()}, stage {stages}) ran out of memory {moment}: it "
            f"{asked} {self._held(coords.pp)}; {self._fix(text, missing)}"
        )

    def _held(self, pp_rank: int) -> str:
        """Return what this rank held at its peak, by category beside the plan."""
        peak = int(peak_memory(self._device))
        planned = planned_memory(self._run, self._layout, ELEMENT_BYTES[self._dtype])[pp_rank]
        of = f" of the device's {_size(world.device_memory(self._device))}" if self._device.type == "cuda" else ""
        text = f"after {_size(peak)}{of}"
        if self._engine is None:
            return f"{text} (planned for a step: {_size(int(planned.total))})"
        held = held_bytes(self._engine)
        parts = [f"{name} {_size(size)} (planned {_size(getattr(planned, name))})" for name, size in held.items()]
        rest = planned.total - planned.kept
        # On a CPU the peak is that of the process.
        others = "temporaries" if self._device.type == "cuda" else "temporaries, with the program itself"
        parts.append(f"activations and {others} {_size(peak - sum(held.values()))} (planned {_size(rest)})")
        return f"{text}: {', '.join(parts)}"

    def _fix(self, text: str, missing: int) -> str:
        fragmented = _bytes(_FRAGMENTED.search(text))
        settings = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
        if missing and fragmented >= missing and "expandable_segments" not in settings:
            return (
                f"set the variable PYTORCH_ALLOC_CONF=expandable_segments:True, because the allocator has "
                f"{_size(fragmented)} in pieces that are too small"
            )
        found = relief(self._run, self._layout, ELEMENT_BYTES[self._dtype], missing)
        if found is None:
            return "use more ranks or devices with more memory: no setting of this run is planned to need less"
        enough = "" if found.saves >= missing else ", which alone may not be enough"
        return f"use {found.setting}, planned to need {_size(int(found.saves))} less{enough}"


def _bytes(match: re.Match[str] | None) -> int:
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"
