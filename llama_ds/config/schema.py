"""The run file's sections as frozen dataclasses: type, default, meaning and rule of every key.

Names follow Hugging Face's LlamaConfig if it has the key. `config/run_file.py` reads YAML into these classes, and
`config/reference.py` generates docs/run_file.md from them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from llama_ds.config.declare import (
    MOST_INT64,
    MOST_TOKENS,
    NOT_NEGATIVE,
    POSITIVE,
    Key,
    Section,
)
from llama_ds.config.schema_data import BatchStage, DataConfig, MixtureStage, SkipConfig, SourceConfig
from llama_ds.config.schema_mup import MupConfig
from llama_ds.config.schema_operation import CheckpointConfig, EvaluationConfig, LoggingConfig
from llama_ds.config.schema_parallel import ParallelConfig
from llama_ds.config.schema_rope import RopeScaling
from llama_ds.config.section_rules import (
    check_model,
    check_optimizer,
)
from llama_ds.errors import shortened

__all__ = [
    "BatchStage", "CheckpointConfig", "ComputeConfig", "DataConfig", "EvaluationConfig", "LoggingConfig",
    "MixtureStage", "ModelConfig", "MupConfig", "OptimizerConfig", "ParallelConfig", "RopeScaling",
    "RunConfig", "SkipConfig", "SourceConfig", "TrainingConfig",
]  # fmt: skip

FP32 = ("fp32", "float32", "torch.float32", "float")  # DeepSpeed's names of it
MOST_NAME = 128  # characters: file systems take names of 255 bytes


@dataclass(frozen=True)
class ModelConfig(Section):
    """Shape of a LLaMA model (arXiv 2302.13971, table 2; grouped-query attention from 2307.09288)."""

    SECTION: ClassVar[str] = "model"

    vocab_size: Annotated[int, Key("Rows of the embedding table and of the head.", "tokens", POSITIVE, most=1e8)]
    hidden_size: Annotated[int, Key("Width of the residual stream.", sign=POSITIVE, most=1e6)]
    intermediate_size: Annotated[
        int, Key("Width of the SwiGLU feed-forward layer.", sign=POSITIVE, rule="Divisible by `parallel.tp`.", most=1e7)
    ]
    num_hidden_layers: Annotated[
        int, Key("Number of decoder layers.", "layers", POSITIVE, rule="At least `parallel.pp`.", most=1e4)
    ]
    num_attention_heads: Annotated[
        int, Key("Number of query heads.", "heads", POSITIVE, rule="Divisible by `parallel.tp`.", most=1e5)
    ]
    num_key_value_heads: Annotated[
        int,
        Key(
            "Number of key-value heads; fewer than query heads is grouped-query attention.",
            "heads",
            POSITIVE,
            rule="Divides `num_attention_heads`; divisible by `parallel.tp`.",
            default="`num_attention_heads`",
            most=1e5,
        ),
    ]
    head_dim: Annotated[
        int,
        Key("Width of a head.", sign=POSITIVE, rule="Even.", default="`hidden_size / num_attention_heads`", most=1e5),
    ]
    rms_norm_eps: Annotated[float, Key("Added to the mean square in each RMS norm.", sign=POSITIVE, most=1)] = 1e-5
    rope_theta: Annotated[
        float, Key("Base of the rotary embedding's frequencies.", sign=POSITIVE, least=1, most=1e12)
    ] = 10000.0
    rope_scaling: Annotated[
        RopeScaling | None, Key("Scaling of the rotary frequencies for longer rows; null: none.")
    ] = None
    tie_word_embeddings: Annotated[bool, Key("Whether the head shares the embedding's weights.")] = False
    attention_bias: Annotated[
        str,
        Key(
            "Projections of attention with a bias: none (LLaMA), q, k and v (Qwen2), or these and the output's (HF's "
            "`attention_bias: true`).",
            choices=("none", "qkv", "qkvo"),
        ),
    ] = "none"
    mlp_bias: Annotated[bool, Key("Whether the three projections of the feed-forward layer have a bias.")] = False
    qk_norm: Annotated[
        bool, Key("Whether each head's queries and keys pass an RMS norm before the rotation (Qwen3).")
    ] = False
    mup: Annotated[
        MupConfig | None,
        Key("Maximal update parametrization, with which learning rates suit models of other widths; null: none."),
    ] = None

    def check(self) -> None:
        check_model(self)


@dataclass(frozen=True)
class ComputeConfig(Section):
    """Implementation of the model's computation. It is not part of the model: a run may resume with other values."""

    SECTION: ClassVar[str] = "compute"

    attention_backend: Annotated[
        str,
        Key(
            "Implementation of attention: FlashAttention, torch's `scaled_dot_product_attention`, or plain matrix "
            "products; `auto` takes flash_attn where it can run (on Hopper and newer version 4 before 2), else sdpa.",
            choices=("auto", "flash_attn", "sdpa", "reference"),
            rule="`flash_attn` needs CUDA, bf16 and a `model.head_dim` that is a multiple of 8 up to 256.",
        ),
    ] = "auto"
    decoder_layer: Annotated[
        str,
        Key(
            "Implementation of the decoder layer: with a hand-written backward, or the reference with plain autograd.",
            choices=("manual_backward", "autograd"),
            rule="`autograd` takes only `parallel.recompute` none or full, and no `parallel.schedule` that defers "
            "weight gradients (zb_h1, dualpipe_v, zb_v, v_half, v_min).",
        ),
    ] = "manual_backward"
    fp8: Annotated[
        str,
        Key(
            "Products of the decoder layers in float8 (e4m3, gradients of outputs in e5m2): `current` scales each "
            "token and channel by its own magnitude, `delayed` each tensor by those of earlier steps "
            "([precision](precision.md)).",
            choices=("off", "current", "delayed"),
            rule="Needs `compute.decoder_layer: manual_backward`, a device with float8 products (Ada, Hopper or newer, "
            "or a CPU), and matrices whose sizes on a rank are multiples of 16.",
        ),
    ] = "off"
    fp8_weight_gradients: Annotated[
        bool,
        Key(
            "Whether weight gradients are products in float8, too; otherwise they keep the run's dtype.",
            rule="Needs `compute.fp8: delayed`, and tokens of a micro-batch on a rank in multiples of 16.",
        ),
    ] = False
    self_test: Annotated[
        str,
        Key(
            "Whether a start first trains a tiny model of the same structure under the run's layout and compares it "
            "with plain torch: `auto` at the first start of a layout on several ranks, `always`, or `off`.",
            choices=("auto", "always", "off"),
        ),
    ] = "auto"


@dataclass(frozen=True)
class TrainingConfig(Section):
    """Amount of training, and initial weights."""

    SECTION: ClassVar[str] = "training"

    global_batch: Annotated[
        int,
        Key(
            "Rows (sequences) per optimizer step.",
            "rows",
            POSITIVE,
            rule="Divisible by data-parallel size * `parallel.micro_batch`.",
        ),
    ]
    steps: Annotated[
        int,
        Key(
            "Length of the run.",
            "steps",
            POSITIVE,
            rule="A run file sets `steps` or `tokens`, not both.",
            default="`ceil(tokens / (global_batch * data.seq_len))`",
        ),
    ]
    tokens: Annotated[
        int,
        Key(
            "Length of the run.",
            "tokens",
            POSITIVE,
            rule="A run file sets `steps` or `tokens`, not both.",
            default="`steps * global_batch * data.seq_len`",
            most=MOST_TOKENS,
        ),
    ]
    initializer_range: Annotated[
        float,
        Key(
            "Standard deviation of initial weights; projections into the residual stream start smaller by "
            "`sqrt(2 * model.num_hidden_layers)`.",
            sign=POSITIVE,
            most=1e3,
        ),
    ] = 0.02
    batch_stages: Annotated[
        tuple[BatchStage, ...],
        Key(
            "First steps with smaller batches, in their order; `global_batch` is that of the steps after them. The "
            "resolved run has that as a last stage."
        ),
    ] = ()


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """The optimizer and its learning-rate schedule: AdamW (LLaMA paper, section 2.3), Muon or Lion."""

    SECTION: ClassVar[str] = "optimizer"

    lr: Annotated[float, Key("Peak learning rate.", sign=POSITIVE, most=3e38)]  # float32
    betas: Annotated[
        tuple[float, float],
        Key(
            "Decay rates of AdamW's first and second moment; of Lion's moment in the update, and from step to step.",
            rule="Each in [0, 1).",
        ),
    ] = (0.9, 0.95)
    eps: Annotated[
        float, Key("Added to the root of the second moment.", sign=POSITIVE, most=1, rule="With lion 1e-8.")
    ] = 1e-8
    weight_decay: Annotated[
        float,
        Key("Decoupled weight decay of matrices; norm weights and biases do not decay.", sign=NOT_NEGATIVE, most=1e3),
    ] = 0.1
    clip: Annotated[float, Key("Largest global gradient norm; longer gradients are clipped.", sign=POSITIVE)] = 1.0
    schedule: Annotated[
        str,
        Key(
            "Learning rate after warm-up: decay along a cosine, linear, or with the inverse square root of the step; "
            "constant with a decay at the end (warmup-stable-decay), or without.",
            choices=("cosine", "linear", "inverse_sqrt", "wsd", "constant"),
        ),
    ] = "cosine"
    warmup_steps: Annotated[
        int, Key("Length of the linear warm-up.", "steps", NOT_NEGATIVE, rule="Below `training.steps`.")
    ] = 2000
    min_lr_ratio: Annotated[
        float,
        Key(
            "Final learning rate / peak learning rate; with inverse_sqrt the lowest; with constant not used.",
            sign=NOT_NEGATIVE,
            rule="At most 1.",
        ),
    ] = 0.1
    decay_steps: Annotated[
        int,
        Key(
            "Length of the final decay of schedule wsd.",
            "steps",
            NOT_NEGATIVE,
            rule="With wsd 1 to `training.steps - warmup_steps`; with other schedules 0.",
        ),
    ] = 0
    decay_shape: Annotated[
        str,
        Key(
            "Final decay of schedule wsd: 1 - sqrt of the share of it that is done, or linear.",
            choices=("sqrt", "linear"),
            rule="With other schedules sqrt.",
        ),
    ] = "sqrt"
    name: Annotated[
        str,
        Key(
            "Optimizer: AdamW; Muon for the hidden matrices (projections of attention and feed-forward) and AdamW for "
            "other weights; or Lion.",
            choices=("adamw", "muon", "lion"),
            rule="`muon` and `lion` take no offload.",
        ),
    ] = "adamw"
    state_dtype: Annotated[
        str,
        Key(
            "Dtype in which the first moment is kept; the second one is fp32.",
            rule="`fp32` or `bf16`, which takes no offload.",
        ),
    ] = "fp32"
    masters: Annotated[
        str,
        Key(
            "The weights that the optimizer updates: fp32 masters; or the bf16 weights themselves, rounded at random "
            "(stochastic rounding), or with a bf16 compensation for what they lack (Kahan).",
            choices=("fp32", "bf16_stochastic", "bf16_kahan"),
            rule="bf16 ones need training in bf16 with ZeRO-1, without offload.",
        ),
    ] = "fp32"
    muon_lr: Annotated[
        float | None,
        Key(
            "Peak learning rate of the hidden matrices with muon.",
            sign=POSITIVE,
            most=3e38,
            rule="Without muon null.",
            default="`lr`",
        ),
    ] = None
    momentum: Annotated[float, Key("Muon's momentum.", sign=NOT_NEGATIVE, rule="Below 1; without muon 0.95.")] = 0.95
    nesterov: Annotated[bool, Key("Whether Muon's momentum is Nesterov's.", rule="Without muon true.")] = True
    muon_scale: Annotated[
        str,
        Key(
            "Scale of Muon's update of a matrix (n, m): 0.2 sqrt(max(n, m)), which suits AdamW's learning rate, or "
            "sqrt(max(1, n / m)), which suits a `muon_lr` of about 0.02.",
            choices=("moonlight", "jordan"),
            rule="Without muon moonlight.",
        ),
    ] = "moonlight"
    z_loss: Annotated[
        float, Key("Weight of the auxiliary loss (log Z)^2 (PaLM, section 5).", sign=NOT_NEGATIVE, most=1e3)
    ] = 0.0

    def check(self) -> None:
        check_optimizer(self)


@dataclass(frozen=True)
class RunConfig(Section):
    """A complete, resolved run. `deepspeed` is the user's DeepSpeed JSON as parsed, before the merge."""

    name: Annotated[
        str,
        Key(
            "Name of the run and of its folder.",
            rule="At most 128 letters, digits, '_', '-' and '.'; no '-' or '.' at the start.",
        ),
    ]
    seed: Annotated[
        int, Key("Seed of initial weights and of the order of rows.", sign=NOT_NEGATIVE, default="`0`", most=MOST_INT64)
    ]
    output_dir: Annotated[
        str, Key("Folder of the runs: files go to `output_dir/name`.", default="`runs`", is_path=True)
    ]
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed: Annotated[
        dict,
        Key(
            "DeepSpeed configuration: ZeRO, dtypes, buckets and offload.",
            form="path of a JSON file, relative to the run file's folder, or the mapping itself",
            rule="Keys that the run file owns are refused.",
            default="*required*",
            is_foreign=True,
        ),
    ] = field(default_factory=dict)
    deepspeed_path: str = ""
    path: str = ""  # the run file

    def check(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name, re.ASCII):
            raise self.broken(
                f"name = {shortened(repr(self.name))} names the run's folder: letters, digits, '_', '-' and '.' only"
            )
        if len(self.name) > MOST_NAME:
            raise self.broken(f"name = {shortened(self.name)} has {len(self.name)} characters; use at most {MOST_NAME}")

    @property
    def zero_stage(self) -> int:
        """ZeRO stage from the DeepSpeed JSON."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def reduces_in_bf16(self) -> bool:
        """Whether data-parallel ranks send gradients in bf16, from the DeepSpeed JSON."""
        return str(self.deepspeed.get("communication_data_type")).lower() == "bf16"

    @property
    def sums_in_fp32(self) -> bool:
        """Whether a rank sums the gradients of a step in fp32, from the DeepSpeed JSON."""
        return ((self.deepspeed.get("data_types") or {}).get("grad_accum_dtype") or "fp32") in FP32

    @property
    def adds_bf16_in_fp32(self) -> bool:
        """Whether gradients are sent in bf16 to ranks that add them in fp32 (`parallel/data_parallel.py`)."""
        return self.parallel.own_pipeline and self.reduces_in_bf16 and self.sums_in_fp32

    @property
    def run_dir(self) -> str:
        """Folder of the run's metrics, checkpoints and resolved configuration."""
        return f"{self.output_dir}/{self.name}"
