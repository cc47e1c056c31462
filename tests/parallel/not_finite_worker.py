"""One rank: takes a step whose gradients are not finite, and a step after it.

It also counts the host's reads of device values at the end of a step, and compares steps that begin before the norm of
the step before with steps that wait for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_ds import log
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.model.embedding import FinalNorm
from llama_ds.parallel import world
from llama_ds.parallel.optimizer_state import adam_steps
from llama_ds.parallel.temporary import dismantle
from llama_ds.training.engines.build import build_engine
from tests.parallel.engine_series import engines_in_turn
from tests.parallel.layout_cases import Case, micro_batches


class HostReads(TorchDispatchMode):
    """Counts conversions of tensors to Python numbers: on CUDA each waits for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


PIPELINE, PLAIN = Case(2, 1, 2, schedule="zb_h1"), Case(1, 1, 2, zero=0)
WAITING = Case(2, 1, 2, schedule="zb_v", virtual_stages=2, clip=100.0)  # never clipped


def main() -> None:
    rank_info = world.find_rank_info()
    case = PIPELINE if rank_info.world == PIPELINE.world else PLAIN
    log.setup(quiet=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with world.failing_together():
        world.join(rank_info)
        with engines_in_turn() as series:
            with series.engine():
                engine = built(case)
                check(engine, case)
                dismantle(engine.deepspeed)
            if case is PIPELINE:
                histories = []
                for other in (WAITING, replace(WAITING, post_validation=True)):
                    with series.engine():
                        histories.append(history_with_one_nan(other))
                check_equal(*histories)
        print(f"rank {rank_info.rank} fine", flush=True)


def built(case: Case) -> Any:
    config = deepspeed_config(case.run, case.layout, bf16_native=True)
    return build_engine(case.run, case.layout, config, torch.device("cpu"))


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


def history_with_one_nan(case: Case) -> list[tuple[float, float]]:
    """Take six steps, of which the third has a NaN in the gradient of the final norm alone; return losses and norms.

    With `post_validation` every step that follows one with a finite norm updates before its own norm is known. The host
    reads no result before the last step.
    """
    engine, armed = built(case), False

    def poisoned(grad: Tensor) -> Tensor:
        return grad * math.nan if armed else grad

    for part in engine.deepspeed.module.modules():
        if isinstance(part, FinalNorm):
            part.norm.weight.register_hook(poisoned)
    batches, results, unsettled = micro_batches(case, engine.dp_rank), [], []
    for step in range(6):
        armed = step == 2
        results.append(engine.train_step(batches, 1e-3))
        unsettled.append(engine.deepspeed.optimizer.unsettled)
    assert unsettled == [case.post_validation and step not in (0, 3) for step in range(6)]
    history = [engine.read(result) for result in reversed(results)][::-1]
    assert adam_steps(engine.deepspeed) == 5
    dismantle(engine.deepspeed)
    return history


def check_equal(waiting: list[tuple[float, float]], before_norm: list[tuple[float, float]]) -> None:
    """Check that the steps are the same to the bit, and that the NaN is in the third alone."""
    assert [math.isfinite(norm) for _, norm in waiting] == [step != 2 for step in range(6)]
    assert repr(before_norm) == repr(waiting)


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
