"""Makes ranks flip a bit on request. Python imports it at its start in every process that has its folder on PYTHONPATH.

A request is a file flip_RANK.json beside this one: {"site", "layer", "element", "bit"} as in
`llama_ds/benchmarks/flips/request.py`. The rank deletes it and flips the bit in its next step.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

REQUESTS = Path(__file__).resolve().parent
PATCHED = "llama_ds.training.step_checks"
SENT = "state on its way to another host"


class Finder:
    """Patches a module when it is imported."""

    def find_spec(self, name: str, *_: Any) -> Any:
        if name != PATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_patch(module: Any) -> None:
            execute(module)
            patch(module.StepChecks)

        spec.loader.exec_module = execute_and_patch
        return spec


def patch(checks: Any) -> None:
    """Let the checks of a step begin with the flip that is asked for."""
    make, prepare, flips = checks.__init__, checks.before_step, ExitStack()
    until = 0  # the step before which the flips end

    def make_and_keep(self: Any, run: Any, layout: Any, engine: Any, *rest: Any) -> None:
        make(self, run, layout, engine, *rest)
        self.flipped_engine = engine

    def prepare_and_flip(self: Any, step: int) -> None:
        nonlocal until
        if step >= until:
            flips.close()
        prepare(self, step)
        request = REQUESTS / f"flip_{os.environ['RANK']}.json"
        if request.exists():
            wanted = json.loads(request.read_text())
            request.unlink()
            flip(self, wanted, flips)
            until = step + (2 if wanted["site"] == SENT else 1)  # a state is sent while the next step runs

    checks.__init__, checks.before_step = make_and_keep, prepare_and_flip


def flip(checks: Any, wanted: dict[str, Any], flips: ExitStack) -> None:
    """Flip a bit until `flips` are closed."""
    from llama_ds.benchmarks.flips.request import Flip
    from llama_ds.benchmarks.flips.sites import flipped

    one = Flip(rank=int(os.environ["RANK"]), **wanted)
    if one.site == SENT:
        from llama_ds.benchmarks.flips.stored import damaged_transfer

        flips.enter_context(damaged_transfer(one))
        return
    layers = checks.layer_check._layers
    flips.enter_context(flipped(checks.flipped_engine, one, checks.layer_check._number % len(layers), len(layers)))


sys.meta_path.insert(0, Finder())
