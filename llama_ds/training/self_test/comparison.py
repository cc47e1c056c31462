"""One trial of the self-test: the engine of a layout and plain torch take the same steps.

Compared are the initial weights (exactly), the loss and gradient norm of each step, and the change of the weights over
all steps, weight by weight: errors that keep the norm, such as those of a mask, show there. The optimizer's settings
(`small_run.py`) make the change nearly proportional to the gradients.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ds.checkpoint.weights import DTYPES
from llama_ds.data.filler import count_labels, mark_filler
from llama_ds.layout.optimizer_states import MASTER
from llama_ds.layout.weights import Key, key_of, weight_of
from llama_ds.parallel import world
from llama_ds.parallel.optimizer_state import fragments
from llama_ds.parallel.temporary import dismantle, engines_undone
from llama_ds.training.device_batches import MicroBatch
from llama_ds.training.engines.build import build_engine
from llama_ds.training.self_test.plain import PlainTraining
from llama_ds.training.self_test.small_run import BEGIN_ID, END_ID, STEPS, SmallRun


@dataclass(frozen=True)
class Differences:
    """Relative differences from plain torch, the largest of all ranks and steps; not a number counts as infinite."""

    initial: float  # initial weights
    loss: float
    norm: float
    change: float  # change of one kind of weight
    kind: str = ""  # name of the kind

    def beyond(self, bounds: Differences) -> list[str]:
        """Return what exceeds its bound, in words."""
        texts = {
            "initial": "the initial weights differ",
            "loss": "the loss differs",
            "norm": "the gradient norm differs",
            "change": f"the change of {self.kind} in {STEPS} steps differs",
        }
        found = {name: (getattr(self, name), getattr(bounds, name)) for name in texts}
        return [
            f"{texts[name]} by {value:.2g} (bound {bound:g})" for name, (value, bound) in found.items() if value > bound
        ]


# The bounds, by the coarsest numbers that a step passes through. Measured are the largest differences over the layouts
# of tests/parallel.
#   fp32: layouts differ in the order of sums. Measured 1e-7 (loss), 3e-7 (norm); the change of norm weights near 1 is
#       known to 2^-24, a few 1e-5 of itself.
#   bf16: its mantissa of 8 bits rounds by up to 2^-9 = 2e-3 an operation, which averages out in loss and norm. Measured
#       3e-4, 3e-3, and 2e-2 for the change, whose elements sum few roundings.
#   muon: orthogonalising multiplies small singular values by up to 3.4445^5 = 485, with their rounding. Measured are
#       changes of 5e-4 in fp32, 1e-1 in bf16, 2e-1 without momentum; another rank's part of a matrix makes it about 1.
#   lion: the sign of an element that is smaller than its rounding may differ. Measured are changes of 3e-5
#       in fp32, 2e-1 in bf16; with random signs it would be 1.4.
#   bf16 masters: a change in two steps is as large as the steps of bf16; measured up to 1.5, and 4e-4 and 3e-3 for
#       loss and norm.
#   quantized: ZeRO++ sends 8-bit weights or 4-bit gradients; or masters in bf16, which round each change. Not measured.
BOUNDS = {
    "fp32": Differences(0.0, 1e-5, 1e-5, 1e-3),
    "bf16": Differences(0.0, 3e-3, 2e-2, 1e-1),
    "fp32 muon": Differences(0.0, 1e-5, 1e-5, 1e-2),
    "bf16 muon": Differences(0.0, 3e-3, 2e-2, 5e-1),
    "fp32 lion": Differences(0.0, 1e-5, 1e-5, 3e-1),
    "bf16 lion": Differences(0.0, 3e-3, 2e-2, 7e-1),
    "quantized": Differences(1e-2, 3e-2, 2e-1, 5e-1),
    "quantized muon": Differences(1e-2, 3e-2, 2e-1, math.inf),
    "quantized lion": Differences(1e-2, 3e-2, 2e-1, math.inf),
    "bf16 masters": Differences(0.0, 3e-2, 2e-1, math.inf),
}
SMALLEST_SHARE = 0.03  # share of the whole change against which kinds that change less are judged


def bounds_of(small: SmallRun) -> Differences:
    """Return the largest differences that rounding explains under the run's dtypes."""
    settings = small.run.deepspeed
    zero, bf16 = settings.get("zero_optimization", {}), settings.get("bf16", {})
    optimizer = small.run.optimizer
    if optimizer.masters != "fp32":
        return BOUNDS["bf16 masters"]
    sums = settings.get("communication_data_type"), settings.get("data_types", {}).get("grad_accum_dtype")
    exact = small.dtype == "fp32" and all(dtype in (None, "fp32") for dtype in (*sums, optimizer.state_dtype))
    coarsest = "fp32" if exact else "bf16"
    if any(zero.get(key) for key in QUANTIZED) or bf16.get("bf16_master_weights_and_grads"):
        coarsest = "quantized"
    found = BOUNDS[coarsest + ("" if optimizer.name == "adamw" else f" {optimizer.name}")]
    # muP's factor of initial weights is rounded at another place: a step of fp32, which a few bf16 weights fall across.
    initial = (1e-6 if small.dtype == "fp32" else 1e-4) if small.run.model.mup else 0.0
    return replace(found, initial=max(found.initial, initial))


QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients")


def compare(small: SmallRun, rank_info: world.RankInfo, device: torch.device) -> Differences:
    """Train `small` on its layout and in plain torch. Collective; leaves nothing behind."""
    with engines_undone():
        return _compare(small, rank_info, device)


def _compare(small: SmallRun, rank_info: world.RankInfo, device: torch.device) -> Differences:
    engine = build_engine(small.run, small.layout, small.config, device, small.marks)
    try:
        plain = PlainTraining(small.run, small.marks, DTYPES[small.dtype])
        before, wanted_before = _masters(engine.deepspeed), _weights(plain)
        losses, norms, lr = [], [], small.run.optimizer.lr
        for step in range(STEPS):
            result = engine.train_step(step_batches(small, step, engine.dp_rank), lr)
            loss, norm = engine.read(result)
            wanted_loss, wanted_norm = plain.step(global_rows(small, step), lr)
            losses.append(_relative(abs(loss - wanted_loss), wanted_loss))
            norms.append(_relative(abs(norm - wanted_norm), wanted_norm))
        after, wanted_after = _masters(engine.deepspeed), _weights(plain)
    finally:
        dismantle(engine.deepspeed)
    tp_rank = small.layout.coords(rank_info.rank).tp
    changed = [(name, start, values - old) for (name, start, values), (*_, old) in zip(after, before, strict=True)]
    changes = {key: wanted_after[key] - old for key, old in wanted_before.items()}
    own = (
        max(losses),
        max(norms),
        _squares(before, wanted_before, small, tp_rank),
        _squares(changed, changes, small, tp_rank),
    )
    every = world.gather(own)
    initial, _ = _worst([squares for _, _, squares, _ in every])
    change, kind = _worst([squares for *_, squares in every])
    return Differences(initial, max(loss for loss, *_ in every), max(norm for _, norm, *_ in every), change, kind)


Held = list[tuple[Key, int, Tensor]]  # weight, first element of its shard, values in float64
Squares = dict[str, tuple[float, float]]  # by kind of weight: squared error, squared wanted values


def _masters(engine: Any) -> Held:
    """Return a copy of the masters that this rank holds."""
    return [
        (key_of(part.name), part.start, part.tensors[MASTER].detach().to("cpu", torch.float64, copy=True))
        for part in fragments(engine)
    ]


def _weights(plain: PlainTraining) -> dict[Key, Tensor]:
    return {key_of(name): weight.detach().clone() for name, weight in plain.model.named_parameters()}


def _squares(held: Held, wanted: Mapping[Key, Tensor], small: SmallRun, tp_rank: int) -> Squares:
    """Return the squared errors of a rank's elements, summed over the layers."""
    sums: dict[str, tuple[float, float]] = {}
    for key, start, values in held:
        whole, cut = wanted[key], weight_of(key[1]).cut
        shard = whole if cut is None else whole.chunk(small.layout.tp, cut)[tp_rank]
        right = F.pad(shard.flatten()[start:], (0, len(values)))[: len(values)]  # the vocabulary's padding stays zero
        error, square = sums.get(key[1], (0.0, 0.0))
        sums[key[1]] = error + float((values - right).square().sum()), square + float(right.square().sum())
    return sums


def _worst(every: Sequence[Squares]) -> tuple[float, str]:
    """Return the largest relative error of a kind of weights over all ranks, and the kind.

    Kinds that hardly change, as the biases of keys, are judged against a share of the change of all weights.
    """
    errors: Counter[str] = Counter()
    squares: Counter[str] = Counter()
    for sums in every:
        errors.update({kind: error for kind, (error, _) in sums.items()})
        squares.update({kind: square for kind, (_, square) in sums.items()})
    least = SMALLEST_SHARE**2 * sum(squares.values())
    return max((_relative(errors[kind] ** 0.5, max(squares[kind], least) ** 0.5), kind) for kind in squares)


def _relative(difference: float, wanted: float) -> float:
    if not math.isfinite(difference):
        return math.inf
    return difference / wanted if wanted else math.inf if difference else 0.0


def step_batches(small: SmallRun, step: int, dp_rank: int) -> Iterator[MicroBatch]:
    """Yield the micro-batches of one data-parallel rank in a step."""
    rows, size = global_rows(small, step), small.layout.micro_batch
    labels = count_labels(rows) / small.micro_batches
    first = dp_rank * small.layout.accumulation
    for i in range(first, first + small.layout.accumulation):
        yield MicroBatch(rows[i * size : (i + 1) * size], labels)


def global_rows(small: SmallRun, step: int) -> np.ndarray:
    """Return a step's rows (R, T + 1): random ids, one in ten marks a document; after the first step with filler."""
    run, marks = small.run, small.marks
    generator = np.random.default_rng([run.seed, step])
    shape = small.layout.global_batch, run.data.seq_len + 1
    rows = generator.integers(max(BEGIN_ID, END_ID) + 1, run.model.vocab_size, shape)
    rows[generator.random(shape) < 0.1] = marks.eos if marks.begin is None else marks.begin
    if step:
        labels = np.full(len(rows), run.data.seq_len)
        labels[0], labels[-1] = run.data.seq_len // 2, 1
        mark_filler(rows, labels)
    return rows
