"""The run file's sections as frozen dataclasses: every key a run file may hold, its type and its default.

Names follow Hugging Face's LlamaConfig where it has one. `config/run_file.py` reads YAML into these.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling of the rotary embedding (Llama 3.1 release; HF `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a LLaMA model (arXiv 2302.13971, table 2; grouped-query attention from 2307.09288)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # run files may leave it out: num_attention_heads
    head_dim: int  # run files may leave it out: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attention_backend: str = "auto"  # auto | flash_attn | sdpa | reference


@dataclass(frozen=True)
class SourceConfig:
    """One source of the data mixture."""

    name: str
    path: str  # folder or URL with the source's manifest.json: file, http(s), s3, gs, or "pipe:COMMAND {}"
    weight: float  # share of the sampled rows; the weights of a mixture sum to 1
    epochs: float | None = None  # epochs the run means to make over it; checked against the manifest


@dataclass(frozen=True)
class MixtureStage:
    """Other weights from a point of the run on."""

    at_tokens: int  # tokens of the run before it; it begins with the first step that finds as many read
    weights: dict[str, float]  # by source; they sum to 1, a source left out is not read


@dataclass(frozen=True)
class SkipConfig:
    """Rows that the run passes over, as after a spike of the loss (PaLM, arXiv 2204.02311, section 5.1)."""

    at_step: int  # steps of the run before it
    steps: int  # whose rows are not read: this one, counted from 0, reads those that would come so many steps later


@dataclass(frozen=True)
class DataConfig:
    """What the model reads."""

    tokenizer: str  # path of the sentencepiece .model file
    seq_len: int
    sources: tuple[SourceConfig, ...]
    mixture: tuple[MixtureStage, ...] = ()  # changes of the sources' weights in mid-run
    skip: tuple[SkipConfig, ...] = ()  # by at_step; a run that resumes keeps those of its past
    document_mask: bool = False  # True: attention does not cross document boundaries in a packed row
    cache_dir: str = ""  # a folder on every node's own disk, for the shards of sources that are URLs
    cache_gib: float = 64.0  # what it may hold; the least recently used shards go first
    deadline_s: float = 300.0  # how long a shard is asked for again before it counts as damaged
    check_interval: int = 100  # steps after which ranks compare what they read, and agree on damaged shards
    max_bad_shards: int = 16  # damaged shards that are replaced by others before the run stops


@dataclass(frozen=True)
class TrainingConfig:
    """How much is trained. Exactly one of `steps` and `tokens` stands in a run file; both are set here."""

    global_batch: int  # rows (sequences) per optimizer step
    steps: int
    tokens: int


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule (LLaMA paper, section 2.3)."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only: norms are not decayed
    clip: float = 1.0  # global gradient norm
    schedule: str = "cosine"  # cosine | wsd
    warmup_steps: int = 2000
    min_lr_ratio: float = 0.1  # final learning rate / peak
    decay_steps: int = 0  # wsd only: length of the final decay
    z_loss: float = 0.0  # weight of (log Z)^2 (PaLM, section 5)


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is cut. dp and the accumulation steps are derived, never written."""

    pp: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    micro_batch: int = 1
    partition: tuple[int, ...] | None = None  # decoder layers per stage, pp * virtual_stages; None: balanced by cost
    decoder_layer: str = "written_out"  # written_out | autograd (the reference)
    # Of decoder layers, `model/written_out.py`: none | selective | full, a list with one for each stage, or the memory
    # that a rank's layers may keep: {budget: 20 GiB}, or auto: as little as the device's memory allows, measured or
    # given: {auto: 80 GiB}. Held as one text: "selective", "none,full", "budget: 20 GiB".
    recompute: str = "none"
    schedule: str = (
        "1f1b"  # 1f1b | interleaved | zb_h1 | dualpipe_v (`llama_ds.schedules`) | deepspeed (its own engine)
    )
    extra_warmup: int = (
        0  # 1f1b, zb_h1: forwards more to start with, for each rank behind: memory that hides slow links
    )
    virtual_stages: int = 1  # stages of the model on each pipeline rank: interleaved 2 or more, dualpipe_v 2


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation during training."""

    interval: int = 0  # steps; 0: only after the last step
    rows: int = 64  # validation rows, fixed for the run; 0: no validation


@dataclass(frozen=True)
class CheckpointConfig:
    """Where and when to save, and whether to go on from what is there."""

    interval: int = 0  # steps; 0: only after the last step
    stop_at: int = 0  # save and end after this step, as at a wall-time limit; 0: run to training.steps
    resume: str = "auto"  # auto: from the newest good checkpoint of this run if any | never | must
    strict: bool = False  # True: end at a damaged newest checkpoint instead of going on from an older one
    rewind_to: int = 0  # go back, once: to the newest good checkpoint at or before this step; 0: no
    rewind_id: int = 0  # another id makes it another rewind: to go back to the same step once more
    start_from: str = ""  # weights to begin a new run with: a checkpoint, or a model folder of Hugging Face or Meta
    asynchronous: bool = True  # False: training waits until a checkpoint is on the disk
    keep_last: int = 0  # newest checkpoints to keep; 0: all
    keep_every: int = 0  # and beside them those of every so many steps; 0: none
    save: bool = True  # False: nothing is saved, as for a profile
    wall_time_s: float = 0.0  # the job's time limit: save and end before it; 0: none
    wall_time_margin_s: float = 120.0  # how long before it


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported."""

    interval: int = 1  # steps between log lines
    tensorboard: bool = False
    straggler_interval: int = 100  # steps between reports of ranks that the others wait for; 0: none
    trace_step: int = 0  # write what every rank did from this step on, and when, to the run's folder; 0: nothing
    trace_steps: int = 1  # how many steps
    profile_ranks: tuple[int, ...] = ()  # ranks that run torch's profiler, over as many steps again after these
    check_finite: bool = False  # debugging: name the first layer that puts out NaN or infinity; slow


NO_BOARDS = ("logging.tensorboard=false",)  # overrides of a run that reports to no board


@dataclass(frozen=True)
class RunConfig:
    """A whole run, resolved. `deepspeed` is the user's DeepSpeed JSON as parsed, before the merge."""

    name: str
    seed: int
    output_dir: str  # the run's files go to output_dir/name
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed: dict = field(default_factory=dict)
    deepspeed_path: str = ""
    path: str = ""  # the run file

    @property
    def zero_stage(self) -> int:
        """ZeRO stage from the DeepSpeed JSON."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def run_dir(self) -> str:
        """Folder of the run's metrics, checkpoints and resolved configuration."""
        return f"{self.output_dir}/{self.name}"
