"""One rank of a pipeline: takes a step whose gradients are not finite, and a step after it.

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
from llama_ds.training.engines.build import build_engine
from tests.parallel.layout_cases import Case, micro_batches


class HostReads(TorchDispatchMode):
    """Counts conversions of tensors to Python numbers: on CUDA each waits for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


CASE = Case(2, 1, 2, schedule="zb_h1")


def main() -> None:
    rank_info = world.find_rank_info()
    log.setup(quiet=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with world.failing_together():
        world.join(rank_info)
        run = CASE.run
        config = deepspeed_config(run, CASE.layout, bf16_native=True)
        engine = build_engine(run, CASE.layout, config, torch.device("cpu"))
        batches = micro_batches(CASE, engine.dp_rank)
        optimizer, reads = engine.deepspeed.optimizer, HostReads()
        step, reduce_rest = optimizer.step, optimizer.reduce_rest

        def counted(end: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                with reads:
                    return end(*args)

            return run

        optimizer.step, optimizer.reduce_rest = counted(step), counted(reduce_rest)
        with reads:
            float(torch.ones(()))
        assert reads.count == 1, "the counter counts"
        engine.read(engine.train_step(batches, 1e-3))
        assert reads.count == 1
        engine.deepspeed.optimizer.finish()  # otherwise an all-gather in flight would overwrite the weights set below
        module = engine.deepspeed.module
        norms = [layer.norm.weight for _, layer in module.numbered_layers() if isinstance(layer, FinalNorm)]
        healthy = [weight.detach().clone() for weight in norms]
        for weight in norms:
            weight.data.fill_(math.nan)
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        moments = [state["exp_avg"].clone() for state in engine.deepspeed.optimizer.state.values()]
        _, norm = engine.read(engine.train_step(batches, 1e-3))
        engine.deepspeed.optimizer.finish()
        assert not math.isfinite(norm)
        now = [state["exp_avg"] for state in engine.deepspeed.optimizer.state.values()]
        assert moments and all(map(torch.equal, moments, now))
        for name, p in module.named_parameters():
            assert torch.equal(p, before[name]) or p.isnan().all(), name
        for weight, value in zip(norms, healthy, strict=True):
            weight.data.copy_(value)
        loss, norm = engine.read(engine.train_step(batches, 1e-3))
        assert math.isfinite(loss) and math.isfinite(norm)
        assert any(not torch.equal(p, before[name]) for name, p in module.named_parameters())
        print(f"rank {rank_info.rank} fine", flush=True)
        engine.deepspeed.destroy()


if __name__ == "__main__":
    main()
