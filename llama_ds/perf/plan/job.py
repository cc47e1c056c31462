"""Input of the time model: the work of a step and its layout, for runs of this stack and published ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llama_ds.config.context_parallel import WHOLE_ROWS, CpSizes, cp_sizes
from llama_ds.config.recompute import POLICIES
from llama_ds.config.schema import ModelConfig, RunConfig
from llama_ds.layout.axes import Axes
from llama_ds.layout.layout import Layout
from llama_ds.layout.optimizer_states import states_of
from llama_ds.layout.pipeline_schedule import schedule_of
from llama_ds.layout.planned_documents import PlannedRows, one_document, planned_rows
from llama_ds.layout.recompute import StagePolicies
from llama_ds.layout.vocab_parts import part_rows
from llama_ds.perf.plan.communication import RankGroup
from llama_ds.perf.plan.program import OURS, OURS_FP32, Program
from llama_ds.perf.plan.program_options import with_bf16_reduction
from llama_ds.perf.plan.row_sharing import RowSharing
from llama_ds.schedules.instructions import Placement
from llama_ds.schedules.schedule import Schedule, joint_shares, split_share

Counts = tuple[tuple[str, int], ...]  # decoder layers of a stage by save policy
OP = "op"  # torchtitan's policy for published runs: attention and every second product are saved


def layers_by_policy(stages: Iterable[Counts]) -> Counter[str]:
    """Return the number of layers with each policy over all these stages, in order of first appearance."""
    found: Counter[str] = Counter()
    for policy, layers in (pair for stage in stages for pair in stage):
        found[policy] += layers
    return found


@dataclass(frozen=True)
class StepJob:
    """One optimizer step on a layout."""

    model: ModelConfig
    program: Program
    seq_len: int
    micro_batch: int
    micro_batches: int
    axes: Axes
    sequence_parallel: bool
    zero_stage: int
    schedule: str
    chunks: int  # stages of the model on each pipeline rank
    extra_warmup: int
    stages: tuple[Counts, ...]  # policies of the decoder layers of each of the pp * chunks stages
    whole_model: bool = True  # False: bare layers, without embedding, head and optimizer
    launch_blocking: bool = False  # CUDA_LAUNCH_BLOCKING=1: host time and GPU time add up
    cp_sizes: CpSizes = WHOLE_ROWS  # ranks that share rows
    optimizer: str = "adamw"
    state_ranks: int = 0  # data-parallel ranks that share weights and states, copies elsewhere; 0: all do
    low_precision: bool = False  # whether optimizer states are bf16
    pass_times: tuple[int, ...] | None = None  # times that order a V
    post_validation: bool = False  # whether steps begin before the norm of the step before
    tp_chunks: int = 1  # chunks of tokens, whose tensor-parallel collectives overlap the products of others
    fp8: str = "off"  # scaling of the layers' products in float8: `compute.fp8`
    fp8_weight_gradients: bool = False
    joint: int = 1  # micro-batches whose weight gradients are one product: `parallel.joint_weight_gradients`
    exchanged: int = 0  # ranks that add gradients before owners get and add bf16; 0: gradients are reduce-scattered
    assumed_joint_share: float | None = None  # `joint_share` of all stages before the schedule has an order
    cuda_graphs: bool = False  # whether decoder layers are launched as graphs
    planned: PlannedRows | None = None  # rows whose documents attention does not leave; None: each is one document

    @property
    def pp(self) -> int:
        return self.axes.pp

    @property
    def dp(self) -> int:
        return self.axes.dp

    @property
    def tp(self) -> int:
        return self.axes.tp

    @property
    def ranks(self) -> int:
        return self.axes.world

    def group(self, axis: str) -> RankGroup:
        """Return the shape of the groups along an axis."""
        return RankGroup(getattr(self.axes, axis), self.axes.stride(axis))

    @property
    def data_group(self) -> RankGroup:
        """The ranks that reduce gradients and share optimizer states: dp and cp together."""
        return RankGroup(self.axes.data_axis, self.tp)

    @property
    def state_group(self) -> RankGroup:
        """The ranks of the data group that share weights and optimizer states."""
        return RankGroup(self.state_ranks or self.axes.data_axis, self.tp)

    @property
    def copies_group(self) -> RankGroup:
        """The ranks of the data group that hold the same share of the states."""
        group = self.state_group
        return RankGroup(self.axes.data_axis // group.size, group.stride * group.size)

    @property
    def sharing(self) -> RowSharing:
        """How context-parallel ranks share rows."""
        return RowSharing(self.cp_sizes, self.axes.stride("cp"), self.ranks)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.micro_batch * self.seq_len // self.axes.cp

    @property
    def documents(self) -> PlannedRows:
        """Rows with the documents that attention does not leave."""
        return self.planned or one_document(self.seq_len)

    @property
    def attended(self) -> PlannedRows:
        """Rows with the documents that attention computes: whole rows without a fused kernel."""
        return self.documents if self.program.flash else one_document(self.seq_len)

    @property
    def rows(self) -> int:
        """Sequences of a step."""
        return self.micro_batch * self.micro_batches * self.dp

    @property
    def vocab(self) -> int:
        """Vocabulary size on one tensor-parallel rank, with the program's padding."""
        unit = self.program.padded_vocab
        return unit * part_rows(self.model.vocab_size, unit * self.tp)

    @property
    def layers(self) -> list[int]:
        """Decoder layers of each stage."""
        return [sum(n for _, n in counts) for counts in self.stages]

    @property
    def fp8_weight_uses(self) -> int:
        """Micro-batches for which a weight in float8 is made: `layout.rank_memory.keeps_fp8_weights`."""
        return self.micro_batches if self.zero_stage < 3 else 1

    @property
    def placement(self) -> Placement:
        """The placement of stages on pipeline ranks, which no number of micro-batches changes."""
        return self.plan(max(self.micro_batches, 2 * self.pp)).placement

    @property
    def split_share(self) -> float:
        """Share of the backwards whose weight gradients the schedule defers."""
        if self.joint > 1:
            return 1.0
        return split_share(self.schedule, self.pp, self.micro_batches, self.chunks, self.extra_warmup)

    @property
    def period(self) -> int:
        """Number of micro-batches after which the passes of a full pipeline repeat."""
        return math.lcm(self.pp, self.joint)

    def plan(self, micro_batches: int) -> Schedule:
        """Return the schedule of the job for this number of micro-batches."""
        sizes = self.pp, micro_batches, self.chunks, self.extra_warmup
        return Schedule(self.schedule, *sizes, self.pass_times, self.joint)

    def joint_share(self, stage: int) -> float:
        """Return the share of a stage's micro-batches whose weight gradients are products for `joint` of them."""
        if self.joint == 1:
            return 0.0
        if self.assumed_joint_share is not None:
            return self.assumed_joint_share
        plan = self.plan(min(self.micro_batches, 4 * self.period + self.micro_batches % self.period))
        rank, chunk = plan.placement.home(stage)
        return joint_shares(plan)[rank][chunk]


def job_of(run: RunConfig, layout: Layout, policies: Sequence[StagePolicies], dtype: str = "bf16") -> StepJob:
    """Return the step of a run of this stack in `dtype` (bf16 or fp32); `policies` has one entry per stage."""
    schedule = schedule_of(run, layout)
    program = OURS if dtype == "bf16" else OURS_FP32
    return StepJob(
        model=run.model,
        program=with_bf16_reduction(program) if run.reduces_in_bf16 else program,
        seq_len=run.data.seq_len,
        micro_batch=layout.micro_batch,
        micro_batches=layout.accumulation,
        axes=Axes(**layout.sizes._asdict()),
        sequence_parallel=run.parallel.sequence_parallel,
        zero_stage=run.zero_stage,
        schedule=schedule.name,
        chunks=schedule.chunks,
        extra_warmup=schedule.extra_warmup,
        stages=tuple(_counts(stage.policies) for stage in policies),
        cp_sizes=cp_sizes(run)[0] if layout.cp > 1 else WHOLE_ROWS,
        optimizer=run.optimizer.name,
        low_precision=bool(states_of(run.optimizer).bf16),
        pass_times=schedule.pass_times,
        joint=schedule.joint,
        post_validation=run.parallel.post_validation,
        tp_chunks=run.parallel.tp_chunks,
        fp8=run.compute.fp8,
        fp8_weight_gradients=run.compute.fp8_weight_gradients,
        exchanged=run.parallel.gradient_neighbours if run.adds_bf16_in_fp32 else 0,
        cuda_graphs=run.parallel.cuda_graphs,
        planned=planned_rows(run),
    )


def _counts(policies: tuple[str, ...]) -> Counts:
    return tuple((name, policies.count(name)) for name in POLICIES if name in policies)
