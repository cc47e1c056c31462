"""The run of the self-test: the structure of the user's run at the smallest sizes that its layout can cut.

Kept are the axes and their ranks, the schedule, stages and chunks, save policies, ZeRO and dtypes, the ratio of query
to key-value heads, the size of a head (kernels depend on it), biases, norms of heads, rotary scaling, tied embeddings,
masks, the optimizer's kind, muP and z-loss. Only numbers shrink: layers of a stage, heads, widths, vocabulary, tokens,
rows and micro-batches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from llama_ds.config.context_parallel import HIERARCHICAL, cp_sizes
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.document_marks import DocumentMarks
from llama_ds.config.recompute import POLICIES
from llama_ds.config.schema import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from llama_ds.layout.layout import Layout
from llama_ds.layout.partition import decoder_layers, stage_boundaries
from llama_ds.layout.recompute import ELEMENT_BYTES, stage_policies

STEPS = 2
HIDDEN_SIZE = 64
FEATURES = 32  # feed-forward features on a rank
MIN_VOCABULARY, MIN_TOKENS = 128, 32
MANY_STAGES = 4  # a stage has two decoder layers, and one if there are more stages than this
PERSISTENT = 1000  # elements that ZeRO-3 holds on every rank: norms and biases, as in a large model, but no matrix
Z_LOSS = 1e-2
# With this eps, AdamW's update is nearly proportional to the gradient, so that the change of the weights compares
# gradients weight by weight. Clipping takes effect, so a wrong norm changes the weights too.
LEARNING_RATE, EPS, CLIP, WEIGHT_DECAY, INITIALIZER_RANGE = 1.0, 1.0, 0.5, 3e-3, 0.1
# Muon's update of a matrix has a norm of its own: with this rate its changes are about as large as AdamW's.
MUON_LR = 1e-2
LION_LR = 1e-3  # change of each element in a step
# Other ids than those of LLaMA's tokenizer, so that code which assumes these is noticed.
BEGIN_ID, END_ID = 5, 3


@dataclass(frozen=True)
class SmallRun:
    """A run with all that an engine needs besides data."""

    run: RunConfig
    layout: Layout
    dtype: str  # bf16 or fp32
    marks: DocumentMarks

    @property
    def config(self) -> dict[str, Any]:
        """The merged DeepSpeed configuration."""
        return deepspeed_config(self.run, self.layout, bf16_native=True)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of all data-parallel ranks in a step."""
        return self.layout.dp * self.layout.accumulation


def small_run(run: RunConfig, layout: Layout, dtype: str, marks: DocumentMarks) -> SmallRun:
    """Return the self-test's version of `run`, which `layout` and `dtype` ("bf16" or "fp32") complete.

    `marks` are those of the tokenizer. `recompute: auto` must be resolved.
    """
    layers = _layers_of_stages(run)
    multiple = layout.cp * math.lcm(layout.tp, 2) if layout.cp > 1 else layout.tp
    multiple *= run.parallel.tp_chunks
    seq_len = multiple * -(-MIN_TOKENS // multiple)
    model = _small_model(run, layout.tp, sum(layers), seq_len)
    small_layout = replace(layout, micro_batch=min(layout.micro_batch, 2), accumulation=_accumulation(layout))
    batch = small_layout.global_batch
    parallel = replace(
        run.parallel,
        micro_batch=small_layout.micro_batch,
        partition=tuple(layers) if len(layers) > 1 else None,
        recompute=_policies(run, layout, dtype),
        **_cp_method(run, layout),
    )
    small = replace(
        run,
        model=model,
        data=replace(run.data, seq_len=seq_len, stages=(), mixture=(), skip=()),
        training=TrainingConfig(batch, STEPS, STEPS * batch * seq_len, INITIALIZER_RANGE),
        optimizer=_optimizer(run.optimizer),
        parallel=parallel,
        # The rounding of fp8 would hide faults from a comparison with plain torch.
        compute=replace(run.compute, fp8="off", fp8_weight_gradients=False),
        evaluation=EvaluationConfig(rows=0),
        checkpoint=CheckpointConfig(save=False),
        logging=LoggingConfig(straggler_interval=0),
        deepspeed=_deepspeed(run, model, layout.tp, dtype),
    )
    small_marks = DocumentMarks(None, END_ID) if marks.begin is None else DocumentMarks(BEGIN_ID, END_ID)
    return SmallRun(small, small_layout, dtype, small_marks)


def _optimizer(settings: OptimizerConfig) -> OptimizerConfig:
    muon, lion = settings.name == "muon", settings.name == "lion"
    return OptimizerConfig(
        lr=LION_LR if lion else LEARNING_RATE,
        betas=settings.betas,
        eps=OptimizerConfig.eps if lion else EPS,
        weight_decay=WEIGHT_DECAY if settings.weight_decay else 0.0,
        clip=CLIP,
        warmup_steps=0,
        name=settings.name,
        state_dtype=settings.state_dtype,
        masters=settings.masters,
        muon_lr=MUON_LR if muon else None,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        muon_scale=settings.muon_scale,
        z_loss=Z_LOSS if settings.z_loss else 0.0,
    )


def with_axes(small: SmallRun, axes: Iterable[str]) -> SmallRun:
    """Return the same run with only these axes; the others have size 1, and options that need them are off."""
    kept = set(axes)
    layout = replace(
        small.layout, **{axis: 1 for axis in small.layout.sizes._asdict() if axis not in kept}
    )  # accumulation and rows of a micro-batch stay
    parallel, settings = small.run.parallel, copy.deepcopy(small.run.deepspeed)
    parallel = replace(
        parallel, pp=layout.pp, tp=layout.tp, sequence_parallel=parallel.sequence_parallel and layout.tp > 1,
        tp_chunks=parallel.tp_chunks if layout.tp > 1 else 1,
        cp=layout.cp, cp_method=parallel.cp_method if layout.cp > 1 else "auto",
        cp_all_to_all=parallel.cp_all_to_all if layout.cp > 1 else 0,
        gradient_neighbours=math.gcd(parallel.gradient_neighbours, layout.data_axis) if layout.pp > 1 else 1,
        **({} if "pp" in kept else _one_stage(parallel.recompute)),
    )  # fmt: skip
    if "dp" not in kept:
        settings.get("zero_optimization", {}).pop("zero_hpz_partition_size", None)
    training = replace(
        small.run.training,
        global_batch=layout.global_batch,
        tokens=STEPS * layout.global_batch * small.run.data.seq_len,
    )
    run = replace(small.run, parallel=parallel, training=training, deepspeed=settings)
    return replace(small, run=run, layout=layout)


def without_schedule(small: SmallRun) -> SmallRun:
    """Return the same run under schedule 1f1b, with a stage on each pipeline rank."""
    parallel = small.run.parallel
    parallel = replace(parallel, **_one_stage(parallel.recompute))
    return replace(small, run=replace(small.run, parallel=parallel))


def _one_stage(recompute: str) -> dict[str, Any]:
    """Return the settings of `parallel` for one stage on a rank."""
    return {
        "schedule": "1f1b",
        "virtual_stages": 1,
        "extra_warmup": 0,
        "pass_times": None,
        "post_validation": False,
        "joint_weight_gradients": 1,
        "partition": None,
        "recompute": max(recompute.split(","), key=POLICIES.index),
    }


def _layers_of_stages(run: RunConfig) -> list[int]:
    counts = decoder_layers(stage_boundaries(run))
    return [min(count, 2 if len(counts) <= MANY_STAGES else 1) for count in counts]


def _accumulation(layout: Layout) -> int:
    """Return enough micro-batches for every phase of a schedule; every schedule takes 2 pp of them."""
    return min(layout.accumulation, 2 * layout.pp)


def _policies(run: RunConfig, layout: Layout, dtype: str) -> str:
    """Return the save policy of each stage: the one of the stage's first layer, which recomputes most."""
    if run.compute.decoder_layer == "autograd":
        return run.parallel.recompute
    found = [stage.policies[0] for stage in stage_policies(run, layout, ELEMENT_BYTES[dtype])]
    return found[0] if len(set(found)) == 1 else ",".join(found)


def _small_model(run: RunConfig, tp: int, layers: int, seq_len: int) -> ModelConfig:
    model = run.model
    groups = tp * _key_value_heads(run, tp)
    scaling = model.rope_scaling
    if scaling and scaling.original_max_position_embeddings:
        original = scaling.original_max_position_embeddings * seq_len // run.data.seq_len
        scaling = replace(scaling, original_max_position_embeddings=max(1, original))
    return replace(
        model,
        vocab_size=tp * -(-MIN_VOCABULARY // tp) + model.vocab_size % tp,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=tp * FEATURES,
        num_hidden_layers=layers,
        num_attention_heads=groups * (model.num_attention_heads // model.num_key_value_heads),
        num_key_value_heads=groups,
        rope_scaling=scaling,
        mup=model.mup
        and replace(model.mup, base_width=max(1, HIDDEN_SIZE * model.mup.base_width // model.hidden_size)),
    )


def _key_value_heads(run: RunConfig, tp: int) -> int:
    """Return a number of key-value heads on a rank whose query heads context-parallel ranks can exchange."""
    model, ranks = run.model, cp_sizes(run)[0].all_to_all
    repeats, found = model.num_attention_heads // model.num_key_value_heads, min(2, model.num_key_value_heads // tp)
    if run.parallel.cp > 1:
        found += next(more for more in range(ranks) if (found + more) * repeats % ranks == 0)
    return found


def _cp_method(run: RunConfig, layout: Layout) -> dict[str, Any]:
    """Return the settings of `parallel` for the method of context parallelism, without `auto`."""
    if layout.cp == 1:
        return {}
    sizes = cp_sizes(run)[0]
    return {"cp_method": sizes.method, "cp_all_to_all": sizes.all_to_all if sizes.method == HIERARCHICAL else 0}


def _deepspeed(run: RunConfig, model: ModelConfig, tp: int, dtype: str) -> dict[str, Any]:
    """Return the user's DeepSpeed settings with thresholds and buckets in proportion to the small model.

    With those of a large model, ZeRO-3 would partition nothing, and one bucket would hold everything.
    """
    settings = copy.deepcopy(run.deepspeed)
    settings["bf16"] = {**settings.get("bf16", {}), "enabled": dtype == "bf16"}
    zero = settings.get("zero_optimization", {})
    if zero.get("stage", 0) == 3:
        given = zero.pop("param_persistence_threshold", None)
        key = "stage3_param_persistence_threshold"
        zero[key] = min(zero.get(key, PERSISTENT) if given is None else given, PERSISTENT)
    if zero.get("stage", 0) > 1 or "reduce_bucket_size" in zero:  # other engines have no such buckets
        widest = max(model.num_attention_heads * model.head_dim, model.intermediate_size, model.vocab_size)
        largest = -(-widest // tp) * HIDDEN_SIZE  # elements of the largest weight on a rank
        zero["reduce_bucket_size"] = min(zero.get("reduce_bucket_size", largest), largest)
    return settings
