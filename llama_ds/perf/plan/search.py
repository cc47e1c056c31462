"""Search over all layouts of a model on a number of GPUs: ranks the legal ones by simulated time, counts the others.

The trainer's own rules (`config`) decide which layouts are legal, its own memory model (`layout`) which ones fit. The
lower bound of a layout is the busiest rank's work with its pipeline fill and drain; layouts with a bound above the best
result are not simulated. Of what does not change a layout's ranks, the search chooses the chunks of tensor-parallel
collectives, single or joint weight gradients where they are deferred, the zero-bubble V (`v_search.py`), and CUDA
graphs for layers of launch-bound stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from llama_ds.config.context_parallel import ALL_TO_ALL, HIERARCHICAL, RING, group_ranks
from llama_ds.config.numbers import divisors
from llama_ds.config.schema import ParallelConfig, RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.recompute import GIB
from llama_ds.perf.plan.bound import lower_bound
from llama_ds.perf.plan.candidate import Candidate, Rejected, candidate, reject
from llama_ds.perf.plan.estimate import Estimate, check_peak
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.step import StageTime, stage_times
from llama_ds.perf.plan.v_search import PAIR, Ordering, VSize, v_sizes
from llama_ds.schedules.schedule import DEFERRING
from llama_ds.schedules.zero_bubble_v import V_SCHEDULES

MAX_MICRO_BATCH = 16
MIN_SHARED_TOKENS = 2048  # minimum share of a row on a context-parallel rank; smaller ones cost more messages
_VIRTUAL = (2, 3, 4, 5, 6, 8, 10)
_SCHEDULES = (
    *((("1f1b", 1, 0), ("zb_h1", 1, 0), ("zb_h1", 1, 1), ("dualpipe_v", 2, 0), ("zb_v", 2, 0))),
    *(("interleaved", chunks, 0) for chunks in _VIRTUAL),
)


# Well-known kinds of layouts, for comparison with the best.
KINDS: dict[str, Callable[[ParallelConfig, Hardware], bool]] = {
    "1F1B with tp over a whole node, as in 2021-23": lambda parallel, gpu: (
        parallel.schedule == "1f1b" and parallel.pp > 1 and parallel.tp == gpu.links.gpus_per_node
    ),
    "any pipeline": lambda parallel, gpu: parallel.pp > 1,
    "no pipeline, ZeRO over all ranks": lambda parallel, gpu: parallel.pp == 1,
    "no context parallelism": lambda parallel, gpu: parallel.cp == 1,
    "context parallelism by a ring": lambda parallel, gpu: parallel.cp > 1 and parallel.cp_method == RING,
    "context parallelism by all-to-alls": lambda parallel, gpu: parallel.cp > 1 and parallel.cp_method == ALL_TO_ALL,
    "context parallelism by both": lambda parallel, gpu: parallel.cp > 1 and parallel.cp_method == HIERARCHICAL,
}


@dataclass
class SearchResult:
    """Result of a search."""

    best: list[Estimate]
    of_kind: dict[str, Estimate] = field(default_factory=dict)  # the fastest layout of each of KINDS
    legal: int = 0
    simulated: int = 0
    rejected: dict[str, Rejected] = field(default_factory=dict)
    ordering: Ordering = field(default_factory=Ordering)  # work on zero-bubble Vs
    points: list[tuple[str, int, float, float]] = field(default_factory=list)  # schedule, pp, GiB, tokens/s/GPU


def search(base: RunConfig, world: int, gpu: Hardware, top: int = 10) -> SearchResult:
    """Return the `top` fastest layouts of the run `base`, ignoring its own layout.

    Args:
        world: number of GPUs.
        gpu: the kind of machine, such as `hardware.load("a100-80gb")`.

    Raises:
        UserError: No layout is possible; the message names the nearest possible number of GPUs.
    """
    if world < 1:
        raise UserError(f"{world} GPUs: the number of GPUs is not positive; give 1 or more")
    check_peak(base, gpu)
    found = SearchResult([])
    candidates: list[_Bounded | VSize] = []
    for run in layouts(base, world, gpu, found.rejected):
        if run.parallel.schedule in V_SCHEDULES:
            candidates += v_sizes(run, world, gpu, found.rejected)
        elif bounded := _bounded(run, world, gpu, found.rejected):
            candidates.append(bounded)
    found.legal = len(candidates)
    candidates.sort(key=lambda c: (c.late, c.bound))
    simulated: set[int] = set()
    worst = float("inf")
    for number, one in enumerate(candidates):
        if one.bound >= worst:
            continue
        simulated.add(number)
        result = _simulate(one, gpu, found, worst)
        if result is None:
            continue
        found.best = sorted([*found.best, result], key=lambda e: e.step.seconds)[:top]
        if len(found.best) == top:
            worst = found.best[-1].step.seconds
    if not found.best:
        raise no_layout(base, world, gpu, found.rejected)
    for kind, belongs in KINDS.items():  # fastest layout of each kind that is not simulated yet
        for number, one in enumerate(candidates):
            known = found.of_kind.get(kind)
            if known and one.bound >= known.step.seconds:
                continue
            if number not in simulated and belongs(one.run.parallel, gpu):
                simulated.add(number)
                _simulate(one, gpu, found, known.step.seconds if known else float("inf"))
    return found


def layouts(
    base: RunConfig, world: int, gpu: Hardware, rejected: dict[str, Rejected] | None = None
) -> Iterator[RunConfig]:
    """Yield `base` with every layout: tp within a node, pp, cp by each method, micro-batch, schedule, ZeRO stage."""
    rejected = {} if rejected is None else rejected
    model, base = base.model, replace(base, deepspeed={"bf16": {"enabled": gpu.dtype == "bf16"}})
    for tp in divisors(world):
        if tp > gpu.links.gpus_per_node:
            reject(rejected, "tensor parallelism across nodes", f"tp {tp} on nodes of {gpu.links.gpus_per_node}")
            continue
        for pp in divisors(world // tp):
            if pp > model.num_hidden_layers:
                reject(rejected, "more stages than layers", f"pp {pp}, {model.num_hidden_layers} layers")
                continue
            for sizes in _sharings(base, tp, world // tp // pp, gpu.links.gpus_per_node, rejected):
                yield from _of_data_axis(base, replace(sizes, pp=pp), world // tp // pp, rejected)


def _sharings(
    base: RunConfig, tp: int, ranks: int, node_ranks: int, rejected: dict[str, Rejected]
) -> Iterator[ParallelConfig]:
    """Yield the sizes and methods of context parallelism for a data axis of `ranks`.

    In a ring of groups, the groups are as large as heads and nodes allow: larger ones pass on fewer keys and values
    between nodes, and blocks that hide their messages better.
    """
    seq_len, heads = base.data.seq_len, base.model.num_attention_heads // tp
    for cp in divisors(ranks):
        sizes = ParallelConfig(tp=tp, cp=cp, sequence_parallel=tp > 1)
        if cp == 1:
            yield sizes
            continue
        if seq_len // cp < MIN_SHARED_TOKENS:
            return
        shared = f"tp {tp} cp {cp}"
        parts = cp * tp * (1 if base.data.document_mask else 2)
        if seq_len % parts:
            reject(rejected, "rows that a ring cannot divide", f"{shared}: {seq_len} tokens by {parts}")
        else:
            yield replace(sizes, cp_method=RING)
        if heads % cp or seq_len % (cp * tp):
            reject(rejected, "heads or rows that all-to-alls cannot divide", f"{shared}: {heads} heads of a rank")
        else:
            yield replace(sizes, cp_method=ALL_TO_ALL)
        group = group_ranks(replace(base, parallel=sizes), node_ranks)
        if group:
            yield replace(sizes, cp_method=HIERARCHICAL, cp_all_to_all=group)
        elif cp > 2:
            why = f"{shared}: {heads} heads of a rank, {node_ranks} ranks of a node"
            reject(rejected, "no groups within nodes that heads and rows allow, for a ring of groups", why)


def _of_data_axis(
    base: RunConfig, sizes: ParallelConfig, ranks: int, rejected: dict[str, Rejected]
) -> Iterator[RunConfig]:
    tp, pp, cp = sizes.tp, sizes.pp, sizes.cp
    dp, rows = ranks // cp, base.training.global_batch
    if rows % dp == 0:
        yield from _of_sizes(base, sizes, dp)
        return
    if cp > 1 and sizes.cp_method != RING:  # counted once for all methods
        return
    near = [n for n in divisors(ranks * pp) if rows % (ranks * pp // n) == 0]
    reject(
        rejected,
        "dp does not divide the global batch",
        f"tp {tp} pp {pp}{f' cp {cp}' if cp > 1 else ''}: dp {dp} does not divide {rows} rows"
        + (f"; at tp {tp} pp {near[0]} it would" if near else ""),
    )


def _of_sizes(base: RunConfig, sizes: ParallelConfig, dp: int) -> Iterator[RunConfig]:
    """Yield the layouts with these sizes of the axes.

    A micro-batch with a factor in common with cp is left out: dividing both by it, with a larger dp, leaves every rank
    the same tokens, micro-batches and memory, and fewer messages.
    """
    for micro in divisors(base.training.global_batch // dp):
        if micro > MAX_MICRO_BATCH:
            break
        if math.gcd(micro, sizes.cp) > 1:
            continue
        if sizes.pp == 1:
            for zero, policies in (
                (1, ("auto",)),
                (2, ("none", "selective", "full")),
                (3, ("none", "selective", "full")),
            ):
                for recompute in policies:
                    yield _run(base, sizes, micro, "1f1b", 1, 0, zero, recompute)
            continue
        for schedule, chunks, warmup in _SCHEDULES:
            if sizes.pp * chunks <= base.model.num_hidden_layers:
                yield _run(base, sizes, micro, schedule, chunks, warmup, 1, "auto")


def _run(
    base: RunConfig,
    sizes: ParallelConfig,
    micro: int,
    schedule: str,
    chunks: int,
    warmup: int,
    zero: int,
    recompute: str,
) -> RunConfig:
    parallel = replace(
        sizes,
        micro_batch=micro,
        recompute=recompute,
        schedule=schedule,
        virtual_stages=chunks,
        extra_warmup=warmup,
    )
    block: dict[str, object] = {"stage": zero}
    if zero >= 2:
        block["overlap_comm"] = True
    return replace(base, parallel=parallel, deepspeed={"zero_optimization": block} | base.deepspeed)


@dataclass(frozen=True)
class _Bounded:
    """A layout that fits, with a lower bound of its time."""

    fitting: Candidate
    bound: float
    late = 0

    @property
    def run(self) -> RunConfig:
        return self.fitting.run


def _bounded(run: RunConfig, world: int, gpu: Hardware, rejected: dict[str, Rejected]) -> _Bounded | None:
    """Return a layout with its bound; None if it is rejected."""
    fitting = candidate(run, world, gpu, rejected)
    if fitting is None:
        return None
    bound = lower_bound(gpu, fitting.job)
    if _tries_pairs(fitting):
        bound = min(bound, lower_bound(gpu, replace(fitting.job, joint=PAIR)))
    if _launch_bound(gpu, stage_times(gpu, fitting.job)):
        bound = min(bound, lower_bound(gpu, replace(fitting.job, cuda_graphs=True)))
    return _Bounded(fitting, bound)


def _launch_bound(gpu: Hardware, stages: Iterable[StageTime]) -> bool:
    return not gpu.host_computes and any(stage.launch_bound for stage in stages)


def _with_graphs(gpu: Hardware, found: Estimate) -> Estimate:
    """Return the layout with CUDA graphs if it is launch-bound, they are possible, fit, and pay; else as it is."""
    if not _launch_bound(gpu, found.step.stages):
        return found
    run = replace(found.run, parallel=replace(found.run.parallel, cuda_graphs=True))
    graphed = candidate(run, found.layout.world, gpu, {})
    if graphed is None:
        return found
    return min(found, graphed.estimate(gpu), key=lambda each: each.step.seconds)


def _tries_pairs(fitting: Candidate) -> bool:
    job = fitting.job
    return job.pp > 1 and job.schedule in DEFERRING and job.joint == 1


def _simulate(one: _Bounded | VSize, gpu: Hardware, found: SearchResult, worst: float) -> Estimate | None:
    """Return the estimate of a layout, or of the best V of a size if it may beat `worst`; record it in `found`.

    Pairs of weight gradients are used where faster.
    """
    if isinstance(one, VSize):
        result = one.fastest(gpu, worst, found.ordering, found.rejected)
        if result is None:
            return None
    else:
        tried = [one.fitting]
        if _tries_pairs(one.fitting):
            run = replace(one.run, parallel=replace(one.run.parallel, joint_weight_gradients=PAIR))
            pairs = candidate(run, one.fitting.layout.world, gpu, {})
            tried += [pairs] if pairs else []
        result = min((each.estimate(gpu) for each in tried), key=lambda each: each.step.seconds)
    result = _with_graphs(gpu, result)
    found.simulated += 1
    schedule = result.run.parallel.schedule if result.layout.pp > 1 else "no pipeline"
    found.points.append((schedule, result.layout.pp, result.peak_bytes / GIB, result.step.tokens_per_second))
    for kind, belongs in KINDS.items():
        known = found.of_kind.get(kind)
        if belongs(result.run.parallel, gpu) and (known is None or result.step.seconds < known.step.seconds):
            found.of_kind[kind] = result
    return result


def no_layout(base: RunConfig, world: int, gpu: Hardware, rejected: dict[str, Rejected]) -> UserError:
    """Return the error for a search without results: the most frequent reasons and the nearest possible GPU count."""
    reasons = sorted(rejected.items(), key=lambda item: -item[1].count)
    why = "; ".join(f"{name} ({item.count} layouts, as {item.example})" for name, item in reasons[:3])
    return UserError(
        f"{base.name} on {world:,} x {gpu.name}: no layout is possible: {why}. {nearest(base, world, gpu)}"
    )


def nearest(base: RunConfig, world: int, gpu: Hardware) -> str:
    """Return advice that names the nearest possible number of GPUs, in multiples or fractions of a node."""
    per_node = gpu.links.gpus_per_node
    node = max(per_node, round(world / per_node) * per_node)
    near = [n for n in (node, node - per_node, node + per_node) if n > 0]
    near += [1 << k for k in range(0, 13) if 1 << k >= world / 4]
    for count in sorted(dict.fromkeys(near), key=lambda n: (abs(n - world), n)):
        if count == world:
            continue
        if _possible(base, count, gpu):
            return f"On {count:,} GPUs there is one: use that, or a smaller model, sequence length or batch"
    return "Use GPUs with more memory, a smaller model or a shorter sequence length"


def _possible(base: RunConfig, world: int, gpu: Hardware) -> bool:
    """Return whether any layout fits. Zero-bubble Vs come last: each has to be ordered, and few fit alone."""
    runs = list(layouts(base, world, gpu))
    if any(run.parallel.schedule not in V_SCHEDULES and candidate(run, world, gpu, {}) for run in runs):
        return True
    sizes = (size for run in runs if run.parallel.schedule in V_SCHEDULES for size in v_sizes(run, world, gpu, {}))
    ordering = Ordering()
    return any(size.fastest(gpu, math.inf, ordering, {}) for size in sizes)
