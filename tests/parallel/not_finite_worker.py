"""One rank: takes a step whose gradients are not finite, and a step after it.

It also counts the host's reads of device values at the end of a step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama_ds import log
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.model.embedding import FinalNorm
from llama_ds.parallel import world
from llama_ds.parallel.optimizer_state import adam_steps
from llama_ds.training.engines.build import build_engine
from tests.parallel.layout_cases import Case, micro_batches


class HostReads(TorchDispatchMode):
    """Counts conversions of tensors to Python numbers: on CUDA each waits for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


PIPELINE, PLAIN = Case(2, 1, 2, schedule="zb_h1"), Case(1, 1, 2, zero=0)


def main() -> None:
    rank_info = world.find_rank_info()
    case = PIPELINE if rank_info.world == PIPELINE.world else PLAIN
    log.setup(quiet=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with world.failing_together():
        world.join(rank_info)
        run = case.run
        config = deepspeed_config(run, case.layout, bf16_native=True)
        engine = build_engine(run, case.layout, config, torch.device("cpu"))
        check(engine, case)
        print(f"rank {rank_info.rank} fine", flush=True)
        engine.deepspeed.destroy()


def check(engine: Any, case: Case) -> None:
    """Take a step, one with weights of norms that are NaN, and one after it."""
    batches = micro_batches(case, engine.dp_rank)
    reads = count_reads(engine.deepspeed.optimizer)
    engine.read(engine.train_step(batches, 1e-3))
    assert reads.count == 1
    finish = getattr(engine.deepspeed.optimizer, "finish", lambda: None)
    finish()  # otherwise an all-gather in flight would overwrite the weights set below
    module = engine.deepspeed.module
    norms = [part.norm.weight for part in module.modules() if isinstance(part, FinalNorm)]
    healthy = [weight.detach().clone() for weight in norms]
    for weight in norms:
        weight.data.fill_(math.nan)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    moments = [state["exp_avg"].clone() for state in states(engine)]
    steps = adam_steps(engine.deepspeed)
    _, norm = engine.read(engine.train_step(batches, 1e-3))
    finish()
    assert not math.isfinite(norm)
    assert adam_steps(engine.deepspeed) == steps == 1
    now = [state["exp_avg"] for state in states(engine)]
    assert moments and all(map(torch.equal, moments, now))
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]) or p.isnan().all(), name
    for weight, value in zip(norms, healthy, strict=True):
        weight.data.copy_(value)
    loss, norm = engine.read(engine.train_step(batches, 1e-3))
    assert math.isfinite(loss) and math.isfinite(norm)
    assert any(not torch.equal(p, before[name]) for name, p in module.named_parameters())


def states(engine: Any) -> list[dict[str, Any]]:
    return list(engine.deepspeed.optimizer.state.values())


def count_reads(optimizer: Any) -> HostReads:
    """Count the host's reads in the methods that end a step."""
    reads = HostReads()

    def counted(end: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with reads:
                return end(*args)

        return run

    for name in ("step", "reduce_rest"):
        if hasattr(optimizer, name):
            setattr(optimizer, name, counted(getattr(optimizer, name)))
    with reads:
        float(torch.ones(()))
    assert reads.count == 1, "the counter counts"
    return reads


if __name__ == "__main__":
    main()
