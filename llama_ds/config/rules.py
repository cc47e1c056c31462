"""The rules a resolved run obeys: signs, enumerations, and the numbers that must divide one another."""

from __future__ import annotations

import math
import re
from functools import reduce
from typing import Any

from llama_ds.config.numbers import divisors
from llama_ds.config.recompute import AUTO, POLICIES, parse
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError, did_you_mean, listed
from llama_ds.schedules.schedule import NAMES as SCHEDULES

FLASH_HEAD_DIMS = range(8, 256 + 1, 8)
STOCK_ENGINE = "deepspeed"  # parallel.schedule: DeepSpeed's PipelineEngine as it is, to measure against
SMALLEST_WEIGHT = 1e-6  # of a source: the order holds a block of 1 / weight rows in memory
_POSITIVE = (
    "model.vocab_size",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.head_dim",
    "model.rms_norm_eps",
    "model.rope_theta",
    "model.initializer_range",
    "data.seq_len",
    "data.cache_gib",
    "data.deadline_s",
    "data.check_interval",
    "training.global_batch",
    "training.steps",
    "training.tokens",
    "optimizer.lr",
    "optimizer.eps",
    "optimizer.clip",
    "parallel.pp",
    "parallel.tp",
    "parallel.micro_batch",
    "parallel.virtual_stages",
    "logging.interval",
    "logging.trace_steps",
)
_NOT_NEGATIVE = (
    "seed",
    "data.max_bad_shards",
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "optimizer.min_lr_ratio",
    "optimizer.decay_steps",
    "optimizer.z_loss",
    "evaluation.interval",
    "evaluation.rows",
    "checkpoint.interval",
    "checkpoint.stop_at",
    "checkpoint.rewind_to",
    "checkpoint.rewind_id",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "checkpoint.wall_time_s",
    "checkpoint.wall_time_margin_s",
    "logging.straggler_interval",
    "logging.trace_step",
    "parallel.extra_warmup",
)
_CHOICES = {
    "model.attention_backend": ("auto", "flash_attn", "sdpa", "reference"),
    "optimizer.schedule": ("cosine", "wsd"),
    "parallel.decoder_layer": ("written_out", "autograd"),
    "parallel.schedule": (*SCHEDULES, STOCK_ENGINE),
    "checkpoint.resume": ("auto", "never", "must"),
}


def check(run: RunConfig) -> None:
    """Raise UserError for the first rule that `run` breaks, with the numbers and those that would do."""
    if not re.fullmatch(r"\w[\w.-]*", run.name, re.ASCII):
        raise _error(run, f"name = {run.name!r} names the run's folder: letters, digits, '_', '-' and '.' only")
    _check_values(run)
    _check_model(run)
    _check_data(run)
    _check_skips(run)
    _check_rewind(run)
    _check_optimizer(run)
    _check_tensor_parallel(run)
    _check_pipeline(run)
    _check_recompute(run)
    _check_profile(run)


def _check_values(run: RunConfig) -> None:
    for key in _POSITIVE:
        if not _value(run, key) > 0:
            raise _error(run, f"{key} = {_value(run, key)} is not positive")
    for key in _NOT_NEGATIVE:
        if _value(run, key) < 0:
            raise _error(run, f"{key} = {_value(run, key)} is negative")
    for key, choices in _CHOICES.items():
        value = _value(run, key)
        if value not in choices:
            raise _error(run, f"{key} = {value!r} is not {listed(choices)}{did_you_mean(value, choices)}")


def _check_model(run: RunConfig) -> None:
    model = run.model
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    if heads % groups:
        raise _error(
            run,
            f"model.num_key_value_heads = {groups} does not divide model.num_attention_heads = {heads}; "
            f"use {listed(divisors(heads))}",
        )
    if model.head_dim % 2:
        raise _error(run, f"model.head_dim = {model.head_dim} is odd; rotary embeddings turn pairs: use an even one")
    if model.attention_backend == "flash_attn":
        _check_flash_attention(run)
    scaling = model.rope_scaling
    if scaling and not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise _error(
            run,
            f"model.rope_scaling.low_freq_factor = {scaling.low_freq_factor} is not between 0 and "
            f"high_freq_factor = {scaling.high_freq_factor}; Llama 3.1 has 1 and 4",
        )
    if scaling and not (scaling.factor >= 1 and scaling.original_max_position_embeddings > 0):
        raise _error(run, "model.rope_scaling wants factor >= 1 and original_max_position_embeddings > 0")


def _check_flash_attention(run: RunConfig) -> None:
    """Refuse what flash_attn cannot compute, before any rank starts; whether it is installed each rank sees."""
    head_dim, step, largest = run.model.head_dim, FLASH_HEAD_DIMS.step, FLASH_HEAD_DIMS[-1]
    if head_dim not in FLASH_HEAD_DIMS:
        raise _error(
            run,
            f"model.head_dim = {head_dim}: flash_attn takes multiples of {step} up to {largest}; "
            "change it or use model.attention_backend = sdpa",
        )
    if run.deepspeed.get("bf16", {}).get("enabled") is False:
        raise _error(
            run,
            "model.attention_backend = flash_attn computes in bf16 and the DeepSpeed JSON has bf16.enabled = false; "
            "set deepspeed.bf16.enabled=true or use sdpa",
        )


def _check_data(run: RunConfig) -> None:
    sources = run.data.sources
    if not sources:
        raise _error(run, "data.sources is empty; name at least one source with name, path and weight")
    names = [source.name for source in sources]
    later = {name for stage in run.data.mixture for name in stage.weights}
    for i, source in enumerate(sources):
        if names.index(source.name) < i:
            raise _error(run, f"data.sources.{i}.name = {source.name!r} is also source {names.index(source.name)}'s")
        if source.weight or source.name not in later:  # weight 0: read from a later stage of the mixture on
            _check_weight(run, f"data.sources.{i}.weight", source.weight)
        if source.epochs is not None and not source.epochs > 0:
            raise _error(run, f"data.sources.{i}.epochs = {source.epochs} is not positive")
    _check_sum(run, "data.sources", [source.weight for source in sources])
    _check_mixture(run, names)


def _check_mixture(run: RunConfig, names: list[str]) -> None:
    before = 0
    for i, stage in enumerate(run.data.mixture):
        key = f"data.mixture.{i}"
        if stage.at_tokens <= before or stage.at_tokens >= run.training.tokens:
            raise _error(
                run,
                f"{key}.at_tokens = {stage.at_tokens} is not between {before}, where the stage before it begins, and "
                f"the run's {run.training.tokens} tokens",
            )
        step = run.training.global_batch * run.data.seq_len
        if -(-stage.at_tokens // step) == -(-before // step):
            raise _error(run, f"{key}.at_tokens = {stage.at_tokens} is in the same step of {step} tokens as {before}")
        for name, weight in stage.weights.items():
            if name not in names:
                raise _error(run, f"{key}.weights.{name} is not one of data.sources{did_you_mean(name, names)}")
            _check_weight(run, f"{key}.weights.{name}", weight)
        _check_sum(run, f"{key}.weights", list(stage.weights.values()))
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
    if to and run.checkpoint.resume == "never":
        raise _error(
            run,
            f"checkpoint.rewind_to = {to} goes on from a checkpoint, which checkpoint.resume = never forbids; use auto",
        )


def _check_weight(run: RunConfig, key: str, weight: float) -> None:
    if not weight >= SMALLEST_WEIGHT:
        raise _error(run, f"{key} = {weight} is below {SMALLEST_WEIGHT:g}; leave the source out")


def _check_sum(run: RunConfig, key: str, weights: list[float]) -> None:
    total = math.fsum(weights)
    if abs(total - 1) > 1e-6:
        shown = " + ".join(f"{weight:g}" for weight in weights)
        raise _error(run, f"{key}: the weights {shown} sum to {total:.6g}, not 1; divide each by {total:.6g}")


def _check_optimizer(run: RunConfig) -> None:
    opt, steps = run.optimizer, run.training.steps
    for i, beta in enumerate(opt.betas):
        if not 0 <= beta < 1:
            raise _error(run, f"optimizer.betas.{i} = {beta} is not in [0, 1)")
    if opt.min_lr_ratio > 1:
        raise _error(run, f"optimizer.min_lr_ratio = {opt.min_lr_ratio} is above 1; it is final / peak learning rate")
    if opt.warmup_steps >= steps:
        raise _error(run, f"optimizer.warmup_steps = {opt.warmup_steps} is not below training.steps = {steps}")
    if opt.schedule == "cosine" and opt.decay_steps:
        raise _error(run, f"optimizer.decay_steps = {opt.decay_steps} is for schedule wsd; leave it out with cosine")
    room = steps - opt.warmup_steps
    if opt.schedule == "wsd" and not 0 < opt.decay_steps <= room:
        raise _error(
            run,
            f"optimizer.decay_steps = {opt.decay_steps} is not in 1..{room} = "
            f"training.steps {steps} - warmup_steps {opt.warmup_steps}, as schedule wsd needs",
        )


def _check_tensor_parallel(run: RunConfig) -> None:
    tp, seq_len = run.parallel.tp, run.data.seq_len
    keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    sizes = {key: _value(run, f"model.{key}") for key in keys}
    for key, size in sizes.items():
        if size % tp:
            fits = listed(divisors(reduce(math.gcd, sizes.values())))
            raise _error(run, f"parallel.tp = {tp} does not divide model.{key} = {size}; use {fits}")
    if run.parallel.sequence_parallel and tp == 1:
        raise _error(run, "parallel.sequence_parallel = true shares rows over tp ranks and tp is 1; set it to false")
    if run.parallel.sequence_parallel and seq_len % tp:
        raise _error(
            run, f"data.seq_len = {seq_len} is not a multiple of parallel.tp = {tp}, as sequence_parallel needs"
        )


def _check_pipeline(run: RunConfig) -> None:
    pp, layers, partition = run.parallel.pp, run.model.num_hidden_layers, run.parallel.partition
    if pp > layers:
        raise _error(run, f"parallel.pp = {pp} is more than model.num_hidden_layers = {layers}; use {layers} or fewer")
    _check_schedule(run)
    if partition is None:
        return
    stages = pp * run.parallel.virtual_stages
    if len(partition) != stages:
        virtual = f" * virtual_stages = {stages}" if stages > pp else f" = {pp}"
        raise _error(run, f"parallel.partition = {list(partition)} has {len(partition)} entries, not pp{virtual}")
    if min(partition) < 1:
        raise _error(run, f"parallel.partition = {list(partition)}: every stage needs a decoder layer or more")
    if sum(partition) != layers:
        raise _error(
            run,
            f"parallel.partition = {list(partition)} sums to {sum(partition)}, "
            f"not model.num_hidden_layers = {layers}; leave it out to balance by cost",
        )


def _check_schedule(run: RunConfig) -> None:
    parallel, layers = run.parallel, run.model.num_hidden_layers
    pp, virtual = parallel.pp, parallel.virtual_stages
    if virtual > 1 and pp == 1:
        raise _error(run, f"parallel.virtual_stages = {virtual} cuts what pipeline ranks hold and pp is 1; use 1")
    if virtual > 1 and parallel.schedule == STOCK_ENGINE:
        raise _error(run, f"parallel.virtual_stages = {virtual}: DeepSpeed's own engine has one stage on a rank; use 1")
    if virtual > 1 and parallel.partition is None and layers % (pp * virtual):
        fits = [v for v in range(1, layers // pp + 1) if layers % (pp * v) == 0]
        advice = f"use virtual_stages {listed(fits)}, or" if fits else "use"
        raise _error(
            run,
            f"parallel.virtual_stages = {virtual} * pp {pp} = {pp * virtual} stages do not divide "
            f"model.num_hidden_layers = {layers}; {advice} parallel.partition with {pp * virtual} entries",
        )
    if pp > 1 and parallel.schedule == "zb_h1" and parallel.decoder_layer == "autograd":
        raise _error(
            run,
            "parallel.schedule = zb_h1 puts weight gradients off, which parallel.decoder_layer = autograd cannot; "
            "use written_out, or schedule 1f1b",
        )


def _check_recompute(run: RunConfig) -> None:
    text, stages = run.parallel.recompute, run.parallel.pp * run.parallel.virtual_stages
    found = parse(text)
    if found is None:
        raise _error(
            run,
            f"parallel.recompute = {text!r} is not {listed(POLICIES)}, a list of these for each stage, or "
            f"{{budget: 20 GiB}}, auto or {{auto: 80 GiB}}{did_you_mean(text, (*POLICIES, AUTO))}",
        )
    if len(found.policies) not in (0, 1, stages):
        raise _error(
            run, f"parallel.recompute = {text} names {len(found.policies)} stages of {stages}; name one or {stages}"
        )
    if run.parallel.decoder_layer == "autograd" and text not in ("none", "full"):
        raise _error(
            run,
            f"parallel.recompute = {text} wants parallel.decoder_layer = written_out; autograd knows none or full",
        )


def _check_profile(run: RunConfig) -> None:
    if run.logging.profile_ranks and not run.logging.trace_step:
        raise _error(
            run,
            f"logging.profile_ranks = {list(run.logging.profile_ranks)} wants logging.trace_step, the first step to "
            "record; set it, or leave out profile_ranks",
        )


def _value(run: RunConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), run)


def _error(run: RunConfig, rule: str) -> UserError:
    return UserError(f"{run.path}: {rule}")
