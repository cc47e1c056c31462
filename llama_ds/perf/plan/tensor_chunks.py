"""Time of a layer's tensor-parallel collectives that products of other chunks do not hide, and the best chunks.

The orders are those of `llama_ds/model/chunked_products.py`. A link carries one collective at a time, as issued.
"""

from __future__ import annotations

from dataclasses import replace

from llama_ds.config.rules import check
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import StepJob, layers_by_policy
from llama_ds.perf.plan.layer import layer_time

CHUNKS = (2, 4, 8)


def best_chunks(gpu: Hardware, job: StepJob) -> int:
    """Return the number of chunks with which the layers of a micro-batch take the least time; 1 where none pays.

    Under ZeRO-3 the weights of products with one input are not adjacent, and would be copied for each chunk.
    """
    tokens = job.seq_len // job.axes.cp // (job.tp if job.sequence_parallel else 1)
    if job.tp == 1 or job.zero_stage == 3:
        return 1

    def seconds(chunks: int) -> float:
        tried, total = replace(job, tp_chunks=chunks), 0.0
        for policy, layers in layers_by_policy(job.stages).items():
            time = layer_time(gpu, tried, policy)
            backward = time.recompute + time.input_backward + time.weight_backward
            total += layers * sum(max(part.device, part.host) for part in (time.forward, backward))
        return total

    return min([1, *(n for n in CHUNKS if tokens % n == 0)], key=seconds)


def with_chunks(gpu: Hardware, run: RunConfig, job: StepJob) -> tuple[RunConfig, StepJob]:
    """Return run and job with the best chunks that the trainer's rules allow them."""
    chunks = best_chunks(gpu, job)
    cut = replace(run, parallel=replace(run.parallel, tp_chunks=chunks))
    try:
        check(cut)
    except UserError:  # layers by autograd, or a later stage's rows, which the chunks do not divide
        return run, job
    return cut, replace(job, tp_chunks=chunks)
