"""Derivation of each number of an estimate: its formula, inputs and sources."""

from __future__ import annotations

from collections import Counter

from llama_ds.layout.flops import flops_per_token, parameter_count
from llama_ds.layout.optimizer_states import states_of
from llama_ds.layout.rank_memory import keeps_fp8_weights
from llama_ds.layout.recompute import GIB, USABLE
from llama_ds.layout.weights import Role
from llama_ds.perf.plan.communication import bus_bandwidth, nodes
from llama_ds.perf.plan.curves import Curves
from llama_ds.perf.plan.estimate import Estimate
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import StepJob
from llama_ds.perf.plan.layer import Parts, embedding_time, head_time, layer_time
from llama_ds.perf.plan.memory import Memory
from llama_ds.perf.plan.rank_spread import slowdown
from llama_ds.perf.plan.step import rank_parameters, rank_roles
from llama_ds.perf.plan.update import update_time

_WIDTH = 24


def explain(found: Estimate) -> str:
    """Return the derivation, from the machine to the run."""
    sections = (
        ("machine", _machine(found)),
        ("one decoder layer, one micro-batch, on one rank (ms)", _layers(found)),
        ("stages, one micro-batch (ms)", _stages(found)),
        ("communication", _communication(found)),
        ("step", _step(found)),
        ("memory of the fullest rank (GiB)", _memory(found)),
    )
    lines = []
    for title, rows in sections:
        lines += ["", title, *(f"  {name:{_WIDTH}} {text}" for name, text in rows)]
    return "\n".join(lines[1:])


def _machine(found: Estimate) -> list[tuple[str, str]]:
    gpu, fit, links = found.gpu, found.gpu.calibration, found.gpu.links
    between = "not known"
    if links.network_gb_s is not None:
        between = f"{links.network_gb_s:.0f} GB/s per node, of which collectives reach {fit.network:.0%}"
    return [
        ("peak", f"{gpu.peak / 1e12:.4g} TFLOP/s {gpu.dtype} dense ({_peak_source(gpu)})"),
        *_computing(gpu),
        *_float8(found),
        ("host", f"{fit.launch_us:.1f} us per kernel, {fit.step_ms:.1f} ms per step"),
        ("within a node", f"{links.nvlink_gb_s:.0f} GB/s of a ring's bus bandwidth among {links.gpus_per_node} GPUs"),
        ("between nodes", between),
        ("ranks", f"step times with a relative standard deviation of {gpu.rank_spread:.1%}; all wait for the slowest"),
        ("calibration", fit.sources or "not stated"),
    ]


def _float8(found: Estimate) -> list[tuple[str, str]]:
    speedup = found.gpu.fp8_speedup
    if found.run.compute.fp8 == "off" or speedup is None:
        return []
    words = f"products {speedup:.2f} times as fast as in {found.gpu.dtype}, as the data sheet's peaks say; not measured"
    return [("float8", words)]


def _peak_source(gpu: Hardware) -> str:
    return "its description" if gpu.peak_tflops else "data sheet, layout/flops.py"


def _computing(gpu: Hardware) -> list[tuple[str, str]]:
    """Return the sources of compute times: measured rates, or shares of the data sheet's peaks."""
    fit, curves = gpu.calibration, gpu.curves or Curves()
    rows = [
        ("matrix products", f"reach {fit.gemm_ceiling:.0%} of it in large tiles; {gpu.processors} multiprocessors"),
        ("memory", f"{gpu.bandwidth_gb_s:,.0f} GB/s (data sheet), pointwise kernels reach {fit.memory:.0%}"),
        ("fused attention", f"forward {fit.flash_forward:.0%}, backward {fit.flash_backward:.0%} of the peak"),
    ]
    if curves.products:
        sizes = curves.products.sizes
        rows[0] = rows[0][0], f"measured, {len(sizes) ** 3} sizes from {sizes[0]} to {sizes[-1]} of M, N and K"
    if curves.kernels:
        each = ", ".join(f"{name} {max(rate.gb_s):.3g}" for name, rate in vars(curves.kernels).items())
        rows[1] = rows[1][0], f"measured, maximum GB/s: {each}"
    if curves.attention:
        rows[2] = rows[2][0], f"measured, rows of {curves.attention.seq_len[0]} to {curves.attention.seq_len[-1]}"
    if curves.collectives:
        groups = len({(c.ranks, c.nodes) for c in curves.collectives})
        rows.append(("collectives", f"measured, {len(curves.collectives)} curves among {groups} kinds of groups"))
    return rows


def _layers(found: Estimate) -> list[tuple[str, str]]:
    job = found.step.job
    rows = []
    for policy in dict.fromkeys(policy for stage in job.stages for policy, _ in stage):
        time = layer_time(found.gpu, job, policy)
        rows += [
            (f"{policy}: forward", _parts(time.forward)),
            (f"{policy}: recompute", _parts(time.recompute)),
            (f"{policy}: input gradients", _parts(time.input_backward)),
            (f"{policy}: weight gradients", _parts(time.weight_backward)),
        ]
    for name, time in (("embedding", embedding_time(found.gpu, job)), ("head and loss", head_time(found.gpu, job))):
        rows.append((name, _parts(time.forward + time.input_backward + time.weight_backward)))
    return rows


def _parts(parts: Parts) -> str:
    return (
        f"{parts.device * 1e3:8.3f} = matrices {parts.matrices * 1e3:.3f} + attention {parts.attention * 1e3:.3f} + "
        f"pointwise {parts.pointwise * 1e3:.3f} + exposed tensor-parallel {parts.tensor * 1e3:.3f}"
        + (f" + exposed context-parallel {parts.context * 1e3:.3f}" if parts.context else "")
        + f" (host {parts.host * 1e3:.3f} in parallel)"
    )


def _stages(found: Estimate) -> list[tuple[str, str]]:
    rows = []
    together = "device and host" if found.gpu.host_computes else "GPU or host, whichever takes longer"
    for number, stage in enumerate(found.step.stages):
        cost = stage.cost(found.gpu.host_computes)
        rows.append(
            (
                f"stage {number}",
                f"forward {cost.forward * 1e3:.2f}, input gradients and recompute {cost.input_backward * 1e3:.2f}, "
                f"weight gradients {cost.weight_backward * 1e3:.2f}; {together}",
            )
        )
    return rows


def _communication(found: Estimate) -> list[tuple[str, str]]:
    job, gpu = found.step.job, found.gpu
    rows = []
    groups = {"tensor parallel": job.group("tp"), "context parallel": job.group("cp"), "data parallel": job.group("dp")}
    for name, group in groups.items():
        if group.size > 1:
            where = f"on {nodes(gpu, group)} nodes" if nodes(gpu, group) > 1 else "within a node"
            rows.append(
                (
                    name,
                    f"groups of {group.size} {where}: {bus_bandwidth(gpu, group) / 1e9:.1f} GB/s of bus bandwidth each",
                )
            )
    if job.pp > 1:
        size = 2 * job.tokens * job.model.hidden_size / (job.tp if job.sequence_parallel else 1)
        rows.append(
            ("between stages", f"{size / 2**20:.1f} MiB a message, {found.step.transfer * 1e3:.3f} ms on its link")
        )
    return rows


def _step(found: Estimate) -> list[tuple[str, str]]:
    step, job = found.step, found.step.job
    flops = flops_per_token(job.model, job.seq_len, job.documents.keys)
    largest = max(rank_parameters(job))
    return [
        (
            "pipeline",
            f"{step.pipeline:.4f} s: event simulation of {job.schedule} with {job.pp} ranks of {job.chunks} stages, "
            f"{job.micro_batches} micro-batches (schedules/simulate.py); ranks wait {step.bubble:.1%}",
        ),
        (
            "stragglers",
            f"{step.stragglers:.4f} s of it: the slowest of {job.ranks:,} ranks is expected to take "
            f"{slowdown(found.gpu, job.ranks) - 1:.1%} longer than the machine's description says",
        ),
        (
            "reduction",
            f"{step.reduction:.4f} s exposed: gradients of {largest:,} parameters x {job.program.reduced_bytes} "
            f"bytes {_sums(job)}and weights x {job.program.element_bytes}, (dp - 1) / dp of them over the ring, "
            "overlapping the last backward and the next forward",
        ),
        (
            "optimizer",
            f"{step.optimizer:.4f} s: {_update(found)}",
        ),
        ("host", f"{step.host:.4f} s at the end of a step"),
        ("sum", f"{step.seconds:.4f} s for {job.rows:,} rows of {job.seq_len:,} tokens on {job.ranks:,} GPUs"),
        ("model FLOPs per token", f"{flops:.4g} for {parameter_count(job.model):,} parameters (layout/flops.py)"),
        (
            "MFU",
            f"{step.mfu(found.gpu):.2%} = {step.tokens_per_second:.1f} tokens/s/GPU x {flops:.4g} / "
            f"{found.gpu.peak:.4g}; attention counted causally; {_full_attention_mfu(found):.1%} with the full square",
        ),
    ]


def _full_attention_mfu(found: Estimate) -> float:
    """Return the MFU with 12 L D T attention FLOPs per token, as in many papers (PaLM, appendix B)."""
    job = found.step.job
    model = job.model
    whole = flops_per_token(model, job.seq_len, float(job.seq_len))
    return found.step.tokens_per_second * whole / found.gpu.peak


def _sums(job: StepJob) -> str:
    """Say how bf16 gradients travel."""
    if not job.exchanged:
        return ""
    near = f"after sums over {job.exchanged} neighbours " if job.exchanged > 1 else ""
    return f"sent to their owners {near}"


def _update(found: Estimate) -> str:
    job = found.step.job
    rank, by_role = max(enumerate(rank_roles(job)), key=lambda item: item[1].total())
    update = update_time(found.gpu, job, rank, by_role)
    text = f"memory traffic of the {by_role.total():,} / dp parameters of a rank {update.traffic:.4f} s"
    if job.optimizer != "muon":
        return text
    ranks = job.axes.data_axis * job.tp
    return (
        f"{text}; matrices exchanged {update.exchange:.4f} s, {update.sent / 2**20:.1f} MiB sent by each of the "
        f"{ranks} ranks of a stage; Newton-Schulz {update.products:.4f} s, {update.flops:.4g} FLOPs of a stage"
    )


def _states(found: Estimate) -> str:
    states = states_of(found.run.optimizer)
    each = states.nbytes(Counter({Role.EMBEDDING: 1}), found.gpu.element_bytes)
    hidden = states.nbytes(Counter({Role.HIDDEN_MATRIX: 1}), found.gpu.element_bytes)
    own = f", {hidden} of hidden matrices" if hidden != each else ""
    twice = ", and copies of them (parallel.post_validation)" if found.run.parallel.post_validation else ""
    return f"{each} bytes each{own}: masters and moments of {found.run.optimizer.name}{twice}"


def _matrices(found: Estimate, held: Memory) -> list[tuple[str, str]]:
    if found.run.optimizer.name != "muon":
        return []
    words = "whole matrices in Muon's step, when activations and working memory are gone: the larger of both counts"
    return [("matrices", f"{held.matrices / GIB:8.2f}: {words}")]


def _memory(found: Estimate) -> list[tuple[str, str]]:
    rank = max(range(len(found.memory)), key=lambda r: found.memory[r].total)
    held = found.memory[rank]
    parameters = rank_parameters(found.step.job)[rank]
    return [
        ("rank", f"{rank} of {len(found.memory)} in the pipeline, {parameters:,} parameters"),
        (
            "weights",
            f"{held.weights / GIB:8.2f}: {found.gpu.element_bytes} bytes each"
            f"{', over dp under ZeRO-3' if found.run.zero_stage == 3 else ''}",
        ),
        (
            "gradients",
            f"{held.gradients / GIB:8.2f}: 4 bytes each, fp32{', over dp' if found.run.zero_stage > 1 else ''}",
        ),
        ("optimizer", f"{held.optimizer / GIB:8.2f}: {_states(found)}, over dp"),
        (
            "activations",
            f"{held.activations / GIB:8.2f}: saved by layers (layout/activation_memory.py), all micro-batches",
        ),
        (
            "working",
            f"{held.working / GIB:8.2f}: within a layer or the head's chunk of logits, and messages"
            f"{', and matrices in float8' if keeps_fp8_weights(found.run, found.layout) else ''}",
        ),
        ("margin", f"{held.margin / GIB:8.2f}: {1 - USABLE:.0%} of the device for driver, libraries, fragmentation"),
        *_matrices(found, held),
        ("sum", f"{held.total / GIB:8.2f} of {found.gpu.memory_gib:.0f}"),
    ]
