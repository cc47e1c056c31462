"""Partition of the layers over pipeline stages: balanced by cost, or explicit in the run file.

The layer list is [embedding, decoder layer x L, final norm, head]. There is one boundary more than there are stages:
stage s holds layers b[s] to b[s + 1] - 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise

from llama_ds.config.schema import ModelConfig, RunConfig
from llama_ds.layout.flops import layer_costs
from llama_ds.layout.vocab_parts import part_rows
from llama_ds.layout.weights import FINAL_NORM, GATE, Role, decoder_layer, held_elements

_BEFORE, _AFTER = 1, 2  # layers around the decoder: the embedding; the final norm and the head


def stage_boundaries(run: RunConfig) -> list[int]:
    """Return the boundaries of the run's pp * virtual_stages stages."""
    stages = run.parallel.pp * run.parallel.virtual_stages
    return boundaries(run.model, run.data.seq_len, stages, run.parallel.partition)


def boundaries(model: ModelConfig, seq_len: int, stages: int, partition: Sequence[int] | None) -> list[int]:
    """Return the stage boundaries for explicit decoder layers per stage (`partition`), or balanced by forward FLOPs."""
    if partition is None:
        return balance(layer_costs(model, seq_len), stages)
    cuts = list(accumulate(partition, initial=_BEFORE))
    return [0, *cuts[1:-1], cuts[-1] + _AFTER]


def decoder_layers(bounds: Sequence[int]) -> list[int]:
    """Return the number of decoder layers on each stage."""
    cuts = [_BEFORE, *bounds[1:-1], bounds[-1] - _AFTER]
    return [end - start for start, end in pairwise(cuts)]


def stage_parameters(model: ModelConfig, bounds: Sequence[int], tp: int) -> list[int]:
    """Return the parameters that a rank of each stage holds: matrices sharded over `tp` ranks, norms replicated."""
    return [held.total() for held in stage_roles(model, bounds, tp)]


def stage_roles(model: ModelConfig, bounds: Sequence[int], tp: int) -> list[Counter[Role]]:
    """Return the parameters that a rank of each stage holds by role.

    A tied embedding counts on both the first and the last stage if they differ, because each keeps a copy.
    """
    return held_parameters(model, decoder_layers(bounds), tp, part_rows(model.vocab_size, tp))


def held_parameters(
    model: ModelConfig, layers: Sequence[int], tp: int, local_vocab: int | None, gated: bool = True
) -> list[Counter[Role]]:
    """Return the parameters that a rank of each stage holds by role, also for published training programs.

    Args:
        layers: decoder layers of each stage.
        local_vocab: rows of the embedding and of the head on a rank, with padding; None for decoder layers only.
        gated: whether the feed-forward network is SwiGLU with three matrices; otherwise it has two.
    """
    layer = _decoder_layer(model, tp, gated)
    held = [Counter({role: layers_here * count for role, count in layer.items()}) for layers_here in layers]
    if local_vocab is not None:
        table = local_vocab * model.hidden_size
        held[0][Role.EMBEDDING] += table
        held[-1] += held_elements([FINAL_NORM], model, tp)
        if not model.tie_word_embeddings:
            held[-1][Role.HEAD] += table
        elif len(held) > 1:
            held[-1][Role.EMBEDDING] += table
    return held


@lru_cache(maxsize=1000)  # the planner calls this for every layout
def _decoder_layer(model: ModelConfig, tp: int, gated: bool) -> Mapping[Role, int]:
    return held_elements((weight for weight in decoder_layer(model) if gated or weight is not GATE), model, tp)


def balance(costs: Sequence[float], stages: int) -> list[int]:
    """Return the boundaries that minimize the cost of the most expensive stage; every stage has a decoder layer.

    Ties are broken by the smallest sum of squared costs, then by fewer layers on earlier stages, because these hold
    the activations of more micro-batches in 1F1B. The result is exact: O(stages * layers^2) on integers.

    Raises:
        ValueError: There are fewer decoder layers than stages.
    """
    if len(costs) - _BEFORE - _AFTER < stages:
        raise ValueError(f"{len(costs) - _BEFORE - _AFTER} decoder layers cannot fill {stages} stages")
    prefix = list(accumulate(_integers(costs), initial=0))
    limit = _table(prefix, stages, max)[stages][0]

    def evenness(cost: float, rest: float) -> float:
        return cost * cost + rest if cost <= limit else math.inf

    table = _table(prefix, stages, evenness)
    bounds = [0]
    for left in range(stages, 1, -1):
        start = bounds[-1]
        scores = {
            end: evenness(prefix[end] - prefix[start], table[left - 1][end]) for end in _ends(prefix, start, left)
        }
        bounds.append(min(scores, key=lambda end: (scores[end], end)))
    return [*bounds, len(costs)]


def _table(prefix: Sequence[int], stages: int, score: Callable[[float, float], float]) -> list[dict[int, float]]:
    """Return table[s][i], the minimum score of layers i.. in s stages; `score` combines a stage's cost and the rest."""
    last = len(prefix) - 1
    table: list[dict[int, float]] = [{}, {i: score(prefix[last] - prefix[i], 0) for i in range(last)}]
    for left in range(2, stages + 1):
        table.append(
            {
                start: min(score(prefix[end] - prefix[start], table[left - 1][end]) for end in ends)
                for start in range(last)
                if (ends := _ends(prefix, start, left))
            }
        )
    return table


def _ends(prefix: Sequence[int], start: int, left: int) -> range:
    """Return the possible ends of a stage that begins at layer `start` and is the first of the last `left` stages."""
    decoders_end = len(prefix) - 1 - _AFTER
    return range(max(start, _BEFORE) + 1, decoders_end - (left - 1) + 1)


def _integers(costs: Sequence[float]) -> list[int]:
    """Scale `costs` exactly to integers, so that equal stages compare equal."""
    exact = [Fraction(cost) for cost in costs]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    return [int(fraction * scale) for fraction in exact]
