"""Records the instructions of DeepSpeed's own PipelineEngine under the event names of `llama_ds.parallel.trace`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.pipe import schedule

from llama_ds.parallel.trace import Trace

# Event name of an instruction, and the offset of a message's receiving stage from this stage.
_NAMES: dict[type, tuple[str, int]] = {
    schedule.LoadMicroBatch: ("wait data", 0),
    schedule.ForwardPass: ("F", 0),
    schedule.BackwardPass: ("BW", 0),
    schedule.RecvActivation: ("wait activation", 0),
    schedule.RecvGrad: ("wait grad", 0),
    schedule.SendActivation: ("send activation", 1),
    schedule.SendGrad: ("send grad", -1),
    schedule.ReduceTiedGrads: ("wait tied", 0),
    schedule.ReduceGrads: ("wait reduction", 0),
    schedule.OptimizerStep: ("optimizer", 0),
}


def trace_instructions(engine: Any, trace: Trace) -> None:
    """Record every instruction of one engine; its behaviour stays the same."""
    counts: Counter[str] = Counter()

    def recorded(run: Callable[..., None], what: str, stage: int) -> Callable[..., None]:
        def wrapped(own: Any, **kwargs: Any) -> None:
            begin = trace.now()
            run(own, **kwargs)
            trace.add(what, begin, stage, counts[what] % own.micro_batches)
            counts[what] += 1

        return wrapped

    engine._INSTRUCTION_MAP = {
        kind: recorded(run, _NAMES[kind][0], engine.stage_id + _NAMES[kind][1]) if kind in _NAMES else run
        for kind, run in engine._INSTRUCTION_MAP.items()
    }
