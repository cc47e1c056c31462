"""How a rank leaves an attempt that another rank has broken, so that its process can take part in the next one.

The main thread comes out of the step by the error that a broken connection raises (`job/departure.py`), closes what the
step uses, destroys engine and process groups, and checks that nothing of them is left. A rank that fails by itself
never leaves: its process ends.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from deepspeed.comm import comm

from llama_ds.errors import Corruption
from llama_ds.job.departure import Departure
from llama_ds.log import logger
from llama_ds.parallel.pipeline_optimizer import PipelineOptimizer
from llama_ds.parallel.temporary import dismantle, process_state
from llama_ds.parallel.world import report_failure

_OF_GLOO = re.compile(r"gloo/transport|Connection (closed|reset) by peer")


class Left(BaseException):
    """This rank has come out of its step. No Exception, so that nobody takes it for a failure on its way."""

    def __init__(self, dropped: Sequence[weakref.ref[Any]]) -> None:
        """`dropped` must not exist any more once this has been handled."""
        super().__init__()
        self.dropped = dropped


def state_of_process() -> Callable[[], None]:
    """Return a function that undoes what an attempt changes in this process. Call it before the attempt."""
    return process_state((comm,))


def is_consequence(error: Exception, rank: int) -> bool:
    """Return whether an error of this rank says that another one has failed."""
    if isinstance(error, Corruption):
        return bool(error.ranks) and rank not in error.ranks
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_OF_GLOO.search(str(error))))


@contextmanager
def leaving(departure: Departure | None, engine: Any, close: Callable[[], None]) -> Iterator[None]:
    """Leave the attempt by `Left` if another rank has broken it inside and the supervisor asks for it.

    `engine` is one of `training/engines`; `close` ends threads and closes files, without waiting for other ranks.
    """
    try:
        yield
    except Exception as error:
        if not departure or not departure.possible or not is_consequence(error, dist.get_rank()):
            raise
        _report(error, departure)
        if not departure.wait_until_asked():
            raise
        try:
            dropped = _drop(engine, close)
        except Exception:
            logger.exception("this rank cannot leave its attempt")
            raise
        raise Left(dropped) from None


def _drop(engine: Any, close: Callable[[], None]) -> list[weakref.ref[Any]]:
    """Take the attempt apart; return what must not exist any more once nobody refers to it."""
    close()
    deepspeed, module = engine.deepspeed, engine.deepspeed.module
    if isinstance(deepspeed.optimizer, PipelineOptimizer):
        deepspeed.optimizer.abandon()
    dropped = [weakref.ref(one) for one in (deepspeed, module, deepspeed.optimizer, *module.parameters())]
    dismantle(deepspeed)
    for owner in (deepspeed, engine.context.weight_gradients, engine):  # what observes gradients refers to them
        vars(owner).clear()
    dist.destroy_process_group()
    return dropped


def leave(departure: Departure, left: Sequence[weakref.ref[Any]], undo: Callable[[], None]) -> bool:
    """Undo the attempt and say so to the supervisor; return False if something of it is left in this process.

    A collection of all garbage writes to pages that are shared with the warm process, so there is one only if needed.
    """
    undo()
    if _count(left) or departure.remains():  # cycles, as of ZeRO-3's hooks
        gc.collect()
    problem = departure.remains() or (f"{_count(left)} objects of the engine" if _count(left) else "")
    if problem:
        departure.tell(what="stays", text=f"of the attempt there are still {problem}")
        return False
    departure.end()
    return True


def _report(error: Exception, departure: Departure) -> None:
    if departure.asked:  # the supervisor knows the cause
        return

    def tell(**values: Any) -> None:
        departure.tell(**values, waits=True)

    if isinstance(error, Corruption):
        tell(what="failure", kind=error.kind, text=f"error: {error}", ranks=list(error.ranks))
    else:
        report_failure(error, tell)


def _count(dropped: Sequence[weakref.ref[Any]]) -> int:
    return sum(one() is not None for one in dropped)
