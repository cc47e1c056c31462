"""Rules between the sections of a resolved run: requirements of a value in one section on another section.

Rules within a section are checked by the section itself (`config/declare.py`).
"""

from __future__ import annotations

import math
from dataclasses import fields
from functools import reduce

from llama_ds.config.batch_stages import batches_of
from llama_ds.config.context_parallel import check_context_parallel
from llama_ds.config.numbers import near_divisors
from llama_ds.config.row_stages import check_stages, stage_runs
from llama_ds.config.schema import ModelConfig, RunConfig
from llama_ds.config.section_rules import STOCK_ENGINE
from llama_ds.errors import UserError, did_you_mean, listed
from llama_ds.schedules.schedule import DEFERRING

NONFINITE = "nonfinite"  # entry of checkpoint.start_from_changes that allows NaN and infinite weights
FLASH_HEAD_DIMS = range(8, 256 + 1, 8)
FP8_MULTIPLE = 16  # elements: rows of both factors of a float8 product are multiples of 16 bytes


def check(run: RunConfig) -> None:
    """Raise UserError for the first rule between sections that `run` breaks, naming values that satisfy it."""
    check_stages(run)
    for stage in stage_runs(run):
        _check_stage(stage)


def _check_stage(run: RunConfig) -> None:
    if run.compute.attention_backend == "flash_attn":
        _check_flash_attention(run)
    _check_mixture(run)
    _check_skips(run)
    _check_rewind(run)
    _check_start_from_changes(run)
    _check_schedule_of_learning_rate(run)
    _check_tensor_parallel(run)
    check_context_parallel(run)
    _check_pipeline(run)
    _check_post_validation(run)
    _check_gradient_neighbours(run)
    _check_autograd_layer(run)
    _check_cuda_graphs(run)
    check_fp8(run)


def _check_flash_attention(run: RunConfig) -> None:
    """Refuse what flash_attn cannot compute before any rank starts; each rank checks that it is installed."""
    head_dim, step, largest = run.model.head_dim, FLASH_HEAD_DIMS.step, FLASH_HEAD_DIMS[-1]
    if head_dim not in FLASH_HEAD_DIMS:
        raise _error(
            run,
            f"model.head_dim = {head_dim}: flash_attn takes multiples of {step} up to {largest}; "
            "change it or use compute.attention_backend = sdpa",
        )
    if run.deepspeed.get("bf16", {}).get("enabled") is False:
        raise _error(
            run,
            "compute.attention_backend = flash_attn computes in bf16 and the DeepSpeed JSON has bf16.enabled = false; "
            "set deepspeed.bf16.enabled=true or use sdpa",
        )


def _check_mixture(run: RunConfig) -> None:
    before = 0
    for i, stage in enumerate(run.data.mixture):
        key = f"data.mixture.{i}"
        if stage.at_tokens <= before or stage.at_tokens >= run.training.tokens:
            raise _error(
                run,
                f"{key}.at_tokens = {stage.at_tokens} is not between {before}, where the stage before it begins, and "
                f"the run's {run.training.tokens} tokens",
            )
        first, second = (
            batches_of(run.training).steps_for(-(-n // run.data.seq_len)) for n in (before, stage.at_tokens)
        )
        if first == second:
            step = batches_of(run.training).of(first) * run.data.seq_len
            raise _error(run, f"{key}.at_tokens = {stage.at_tokens} is in the same step of {step} tokens as {before}")
        before = stage.at_tokens


def _check_skips(run: RunConfig) -> None:
    before, last = -1, run.training.steps - 1
    for i, skip in enumerate(run.data.skip):
        key = f"data.skip.{i}"
        if not before < skip.at_step <= last:
            raise _error(
                run,
                f"{key}.at_step = {skip.at_step} is not in {before + 1}..{last}: entries stand in the order of their "
                "steps, one for each, within the run",
            )
        if skip.steps <= 0:
            raise _error(run, f"{key}.steps = {skip.steps} is not positive; leave the entry out")
        before = skip.at_step


def _check_rewind(run: RunConfig) -> None:
    to, steps = run.checkpoint.rewind_to, run.training.steps
    if to >= steps:
        raise _error(run, f"checkpoint.rewind_to = {to} is not below training.steps = {steps}; name an earlier step")


def _check_start_from_changes(run: RunConfig) -> None:
    known = [*(f"model.{key.name}" for key in fields(ModelConfig)), "data.tokenizer", NONFINITE]
    for key in run.checkpoint.start_from_changes:
        if key not in known:
            raise _error(
                run,
                f"checkpoint.start_from_changes lists {key}{did_you_mean(key, known)}; list keys of model, as in "
                f"model.rope_theta, data.tokenizer, or {NONFINITE}",
            )


def _check_schedule_of_learning_rate(run: RunConfig) -> None:
    opt, steps = run.optimizer, run.training.steps
    if opt.warmup_steps >= steps:
        raise _error(run, f"optimizer.warmup_steps = {opt.warmup_steps} is not below training.steps = {steps}")
    longest = steps - opt.warmup_steps
    if opt.schedule == "wsd" and not 0 < opt.decay_steps <= longest:
        raise _error(
            run,
            f"optimizer.decay_steps = {opt.decay_steps} is not in 1..{longest} = "
            f"training.steps {steps} - warmup_steps {opt.warmup_steps}, as schedule wsd needs",
        )


def _check_tensor_parallel(run: RunConfig) -> None:
    tp, seq_len = run.parallel.tp, run.data.seq_len
    keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes: dict[str, int] = {key: getattr(run.model, key) for key in keys}
    for key, size in sizes.items():
        if size % tp:
            fits = listed(near_divisors(reduce(math.gcd, sizes.values()), tp))
            raise _error(run, f"parallel.tp = {tp} does not divide model.{key} = {size}; use {fits}")
    if run.parallel.sequence_parallel and seq_len % tp:
        raise _error(
            run, f"data.seq_len = {seq_len} is not a multiple of parallel.tp = {tp}, as sequence_parallel needs"
        )
    chunks = run.parallel.tp_chunks
    if chunks == 1:
        return
    if run.compute.decoder_layer == "autograd":
        raise _error(
            run,
            f"parallel.tp_chunks = {chunks} needs compute.decoder_layer = manual_backward; set it to 1 with "
            "autograd, which waits for each collective at once",
        )
    tokens = seq_len // run.parallel.cp // (tp if run.parallel.sequence_parallel else 1)
    if tokens % chunks:
        raise _error(
            run,
            f"parallel.tp_chunks = {chunks} does not divide the {tokens} tokens of a row that a rank has; use "
            f"{listed(near_divisors(tokens, chunks))}",
        )


def _check_pipeline(run: RunConfig) -> None:
    pp, layers, partition = run.parallel.pp, run.model.num_hidden_layers, run.parallel.partition
    if pp > layers:
        raise _error(run, f"parallel.pp = {pp} is more than model.num_hidden_layers = {layers}; use {layers} or fewer")
    if partition is None:
        _check_even_stages(run)
    elif sum(partition) != layers:
        raise _error(
            run,
            f"parallel.partition = {list(partition)} sums to {sum(partition)}, "
            f"not model.num_hidden_layers = {layers}; leave it out to balance by cost",
        )


def _check_even_stages(run: RunConfig) -> None:
    pp, virtual, layers = run.parallel.pp, run.parallel.virtual_stages, run.model.num_hidden_layers
    if virtual > 1 and layers % (pp * virtual):
        fits = [v for v in range(1, layers // pp + 1) if layers % (pp * v) == 0]
        advice = f"use virtual_stages {listed(fits)}, or" if fits else "use"
        other = f"parallel.partition with {pp * virtual} entries" if pp * virtual <= layers else "a smaller pp"
        raise _error(
            run,
            f"parallel.virtual_stages = {virtual} * pp {pp} = {pp * virtual} stages do not divide "
            f"model.num_hidden_layers = {layers}; {advice} {other}",
        )


def _check_autograd_layer(run: RunConfig) -> None:
    """Refuse what the reference layer does not implement: deferred gradients, and policies other than none and full."""
    parallel = run.parallel
    if run.compute.decoder_layer != "autograd":
        return
    if parallel.joint_weight_gradients > 1:
        raise _error(
            run,
            f"parallel.joint_weight_gradients = {parallel.joint_weight_gradients} defers weight gradients, which "
            "compute.decoder_layer = autograd cannot; use manual_backward, or 1",
        )
    if parallel.pp > 1 and parallel.schedule in DEFERRING:
        raise _error(
            run,
            f"parallel.schedule = {parallel.schedule} defers weight gradients, which compute.decoder_layer = autograd "
            "cannot; use manual_backward, or schedule 1f1b or interleaved",
        )
    if parallel.recompute not in ("none", "full"):
        raise _error(
            run,
            f"parallel.recompute = {parallel.recompute} requires compute.decoder_layer = manual_backward; "
            "autograd supports none or full",
        )


def _check_gradient_neighbours(run: RunConfig) -> None:
    neighbours = run.parallel.gradient_neighbours
    if neighbours == 1 or run.adds_bf16_in_fp32:
        return
    if not run.sums_in_fp32:
        raise _error(
            run,
            f"parallel.gradient_neighbours = {neighbours} add gradients in fp32, and data_types.grad_accum_dtype sums "
            "them in bf16 first; take that out of the DeepSpeed JSON, or use 1",
        )
    raise _error(
        run,
        f"parallel.gradient_neighbours = {neighbours} add gradients that travel in bf16, and the DeepSpeed JSON "
        "has no communication_data_type = bf16; set deepspeed.communication_data_type=bf16, or use 1",
    )


def _check_post_validation(run: RunConfig) -> None:
    """Refuse what cannot be undone: an update that precedes its norm restores masters and moments in fp32 only.

    Checks that look at forwards would see those that are discarded.
    """
    if not run.parallel.post_validation:
        return
    needed = {
        "optimizer.name": (run.optimizer.name, "adamw"),
        "optimizer.state_dtype": (run.optimizer.state_dtype, "fp32"),
        "optimizer.masters": (run.optimizer.masters, "fp32"),
        "compute.fp8": (run.compute.fp8, "off"),
        "checkpoint.compare_states": (run.checkpoint.compare_states, False),
        "checkpoint.compare_repeats": (run.checkpoint.compare_repeats, 0),
        "logging.check_finite": (run.logging.check_finite, False),
    }
    for key, (value, only) in needed.items():
        if value != only:
            raise _error(
                run,
                f"parallel.post_validation = true needs {key} = {str(only).lower()}, not {str(value).lower()}; change "
                "one of them",
            )


def _check_cuda_graphs(run: RunConfig) -> None:
    """Refuse what would change under a graph: it repeats the same kernels on the same memory, and no collectives."""
    parallel = run.parallel
    if not parallel.cuda_graphs:
        return
    needed: list[tuple[str, object, object, str]] = [
        ("parallel.tp", parallel.tp, 1, "collectives of the layers are not captured"),
        ("parallel.cp", parallel.cp, 1, "messages of the layers are not captured"),
        ("data.document_mask", run.data.document_mask, False, "documents have other lengths in each micro-batch"),
        ("compute.fp8", run.compute.fp8, "off", "weights in float8 and their scales change with the step"),
        ("compute.decoder_layer", run.compute.decoder_layer, "manual_backward", "autograd saves to new memory"),
    ]
    for key, value, only, why in needed:
        if value != only:
            words = [str(x).lower() for x in (only, value)]
            raise _error(
                run,
                f"parallel.cuda_graphs = true needs {key} = {words[0]}, not {words[1]}: {why}; set "
                "parallel.cuda_graphs to false",
            )
    if parallel.pp > 1 and parallel.schedule == STOCK_ENGINE:
        raise _error(
            run,
            "parallel.cuda_graphs = true is not for parallel.schedule = deepspeed, whose engine does not keep micro-"
            "batches apart as ours; use another schedule, or set parallel.cuda_graphs to false",
        )
    if run.zero_stage == 3:
        raise _error(
            run,
            "parallel.cuda_graphs = true needs weights that stay in place, and ZeRO-3 gathers them for each pass; use "
            "zero_optimization.stage 1, or set parallel.cuda_graphs to false",
        )


def check_fp8(run: RunConfig) -> None:
    """Refuse layers and sizes for which there are no products in float8 before any rank starts."""
    model, tp = run.model, run.parallel.tp
    if run.compute.fp8_weight_gradients and run.compute.fp8 != "delayed":
        raise _error(
            run,
            f"compute.fp8_weight_gradients needs compute.fp8 = delayed, not {run.compute.fp8}: a current scale of "
            "weight gradients would depend on which tokens share a micro-batch",
        )
    if run.compute.fp8 == "off":
        return
    if run.compute.decoder_layer == "autograd":
        raise _error(
            run,
            f"compute.fp8 = {run.compute.fp8} requires compute.decoder_layer = manual_backward; the reference with "
            "plain autograd has no products in float8",
        )
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.num_attention_heads * head_dim / tp": queries // tp,
        "the rows of q, k and v on a rank, (num_attention_heads + 2 num_key_value_heads) * head_dim / tp,": (
            (queries + 2 * keys) // tp
        ),
        "model.intermediate_size / tp": model.intermediate_size // tp,
    }
    if run.compute.fp8_weight_gradients:
        tokens = run.parallel.micro_batch * run.data.seq_len // run.parallel.cp
        sizes["parallel.micro_batch * data.seq_len / cp"] = tokens
    for words, size in sizes.items():
        if size % FP8_MULTIPLE:
            raise _error(
                run,
                f"compute.fp8 = {run.compute.fp8}: {words} = {size} is not a multiple of {FP8_MULTIPLE}, as the float8 "
                "kernels need; change it, use another parallel.tp, or set compute.fp8=off",
            )


def _error(run: RunConfig, rule: str) -> UserError:
    return UserError(f"{run.path}: {rule}")
