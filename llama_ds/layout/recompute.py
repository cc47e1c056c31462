"""Save policy of each decoder layer: set by the run file, or the one with least recompute within a memory budget.

The schedule determines how many micro-batches' activations a stage holds at a time. In 1F1B, stage s of p holds
min(p - s, micro-batches) (Narayanan et al., arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llama_ds.config.recompute import AUTO, GIB, POLICIES, Recompute, parse
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.activation_memory import LayerWork
from llama_ds.layout.flops import layer_forward_flops
from llama_ds.layout.layout import Layout
from llama_ds.layout.partition import decoder_layers, stage_boundaries
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.layout.rank_memory import layer_work, rank_memory
from llama_ds.schedules.schedule import DEFERRING, Held
from llama_ds.schedules.zero_bubble_v import V_SCHEDULES

USABLE = 0.92  # usable share of device memory; the driver, NCCL and fragmentation take the rest
ELEMENT_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class StagePolicies:
    """Save policies of one stage's decoder layers, and the bytes they save for all micro-batches in flight."""

    policies: tuple[str, ...]
    in_flight: int
    saved_bytes: int


def stage_policies(run: RunConfig, layout: Layout, element_bytes: int) -> list[StagePolicies]:
    """Return each stage's policies, in the model's order; `element_bytes` is 2 in bf16, 4 in fp32.

    The stages of a rank share its budget in proportion to the activations that they hold.

    Raises:
        UserError: Even full recompute exceeds the budget.
    """
    wanted = parse(run.parallel.recompute) or Recompute(("none",))
    if run.parallel.recompute == AUTO:
        raise ValueError("recompute: auto needs the device's memory; call with_device_memory() first")
    work, graphed = layer_work(run, layout, element_bytes), _graphed_backwards(run)
    schedule = schedule_of(run, layout)
    counts, placement = decoder_layers(stage_boundaries(run)), schedule.placement
    fixed = [] if wanted.device_bytes is None else [r.fixed for r in rank_memory(run, layout, element_bytes)]
    stages = []
    for stage, layers in enumerate(counts):
        rank, chunk = placement.home(stage)
        held = schedule.held[rank][chunk]
        if wanted.policies:
            policies = (wanted.policies[stage if len(wanted.policies) > 1 else 0],) * layers
        else:
            room = wanted.budget_bytes
            if room is None:
                assert wanted.device_bytes is not None
                room = int(wanted.device_bytes * USABLE) - fixed[rank]
            own = [(schedule.held[rank][c], counts[placement.stage(rank, c)]) for c in range(placement.chunks)]
            least = [kept_bytes(work, {"full": n}, at, graphed) for at, n in own]
            if sum(least) > room:
                raise _too_little(run, rank, sum(least), room)
            shares = [_in_flight(at) * n for at, n in own]
            budget = least[chunk] + (room - sum(least)) * shares[chunk] // sum(shares)
            policies = _fit(work, layers, held, budget, graphed)
        kept = kept_bytes(work, Counter(policies), held, graphed)
        stages.append(StagePolicies(policies, _in_flight(held), kept))
    return stages


def kept_bytes(work: LayerWork, policies: Mapping[str, int], held: Sequence[Held], graphed: int = 0) -> int:
    """Return the peak bytes that a stage saves, given its number of layers by policy and its micro-batches held.

    With CUDA graphs, of `graphed` kinds of backwards, it keeps as much for each of the most micro-batches in flight.
    """
    one = _Sizes.of(work, held, graphed)
    saved = sum(one.saved[policy] * count for policy, count in policies.items())
    deferred = one.deferred * sum(policies.values())
    return one.ends + max(at.to_backward * saved + at.to_weights * deferred for at in one.held)


def _graphed_backwards(run: RunConfig) -> int:
    """Return how many kinds of backwards have CUDA graphs: whole ones, split ones, or both; 0 without graphs."""
    parallel = run.parallel
    mixed = parallel.pp > 1 and parallel.schedule in DEFERRING and parallel.schedule not in V_SCHEDULES
    return parallel.cuda_graphs * (2 if mixed and parallel.joint_weight_gradients == 1 else 1)


@dataclass(frozen=True)
class _Sizes:
    """Bytes that the layers of a stage keep for a micro-batch."""

    saved: dict[str, int]  # a layer's between its forward and backward, by policy
    deferred: int  # a layer's between input and weight backward
    held: Sequence[Held]  # micro-batches
    ends: int = 0  # the sum for all layers

    @classmethod
    def of(cls, work: LayerWork, held: Sequence[Held], graphed: int) -> _Sizes:
        if not graphed:
            return cls({policy: work.saved_bytes(policy) for policy in POLICIES}, work.deferred_wgrad_bytes(), held)
        slots, deferred = _in_flight(held), any(at.to_weights for at in held)
        saved = {policy: work.slot_bytes(policy, deferred, graphed) for policy in POLICIES}
        return cls(saved, 0, [Held(slots, 0)], (1 + graphed) * slots * work.saved_bytes("full"))


def _in_flight(held: Sequence[Held]) -> int:
    return max(map(sum, held))


def recomputed_flops_per_token(run: RunConfig, layout: Layout, element_bytes: int) -> float:
    """Return the FLOPs per token that the backward of the model recomputes."""
    if run.compute.decoder_layer == "autograd":
        forward = layer_forward_flops(run.model, run.data.seq_len)
        return run.model.num_hidden_layers * forward if run.parallel.recompute == "full" else 0.0
    work = layer_work(run, layout, element_bytes)
    return sum(
        work.recomputed_flops(policy)
        for stage in stage_policies(run, layout, element_bytes)
        for policy in stage.policies
    )


def with_device_memory(run: RunConfig, device_bytes: int) -> RunConfig:
    """Return `run` with the device's memory filled into `recompute: auto`."""
    if run.parallel.recompute != AUTO:
        return run
    return replace(run, parallel=replace(run.parallel, recompute=f"auto: {device_bytes / GIB:.2f} GiB"))


def _too_little(run: RunConfig, rank: int, least: int, room: int) -> UserError:
    return UserError(
        f"{run.path}: pipeline rank {rank} keeps {least / GIB:.3g} GiB under full recompute, above the "
        f"{max(room, 0) / GIB:.3g} GiB that parallel.recompute = {run.parallel.recompute} leaves it; raise it, use "
        "more stages or tp, or lower parallel.micro_batch or data.seq_len"
    )


def _fit(work: LayerWork, layers: int, held: Sequence[Held], budget: int, graphed: int) -> tuple[str, ...]:
    """Return the policies of a stage's equal layers with the least recompute within `budget` bytes, by full search."""
    one = _Sizes.of(work, held, graphed)
    repeated = {policy: work.recomputed_flops(policy) for policy in POLICIES}
    deferred, room = layers * one.deferred, budget - one.ends

    def fits(counts: Mapping[str, int]) -> bool:
        kept = sum(one.saved[policy] * count for policy, count in counts.items())
        return all(at.to_backward * kept + at.to_weights * deferred <= room for at in one.held)

    if fits({"none": layers}):
        return ("none",) * layers
    best: tuple[float, tuple[str, ...]] | None = None
    for full in range(layers + 1):
        for selective in range(layers + 1 - full):
            counts = {"none": layers - full - selective, "selective": selective, "full": full}
            cost = sum(repeated[policy] * count for policy, count in counts.items())
            if (best is not None and cost >= best[0]) or not fits(counts):
                continue
            # The backward reaches the last layers of a stage first, so they release their activations soonest.
            best = cost, tuple(policy for policy in ("full", "selective", "none") for _ in range(counts[policy]))
    assert best is not None
    return best[1]
