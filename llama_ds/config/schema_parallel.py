"""The section `parallel` of a run file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from llama_ds.config.context_parallel import CP_METHODS
from llama_ds.config.declare import NOT_NEGATIVE, POSITIVE, Key, Section
from llama_ds.config.section_rules import STOCK_ENGINE, check_parallel
from llama_ds.schedules.schedule import NAMES as SCHEDULES


@dataclass(frozen=True)
class ParallelConfig(Section):
    """Parallel layout. Data-parallel size and accumulation steps are derived from the world size."""

    SECTION: ClassVar[str] = "parallel"

    pp: Annotated[
        int, Key("Pipeline-parallel size.", "ranks", POSITIVE, rule="At most `model.num_hidden_layers`.", most=1e4)
    ] = 1
    tp: Annotated[
        int,
        Key(
            "Tensor-parallel size.",
            "ranks",
            POSITIVE,
            rule="Divides `model.num_attention_heads`, `num_key_value_heads` and `intermediate_size`.",
            most=1e4,
        ),
    ] = 1
    sequence_parallel: Annotated[
        bool,
        Key(
            "Whether tensor-parallel ranks shard the activations between matrix products by sequence.",
            rule="Needs tp > 1.",
        ),
    ] = False
    micro_batch: Annotated[int, Key("Rows per micro-batch of a data-parallel rank.", "rows", POSITIVE, most=1e6)] = 1
    partition: Annotated[
        tuple[int, ...] | None,
        Key(
            "Decoder layers of each pipeline stage; null: balanced by cost.",
            "layers",
            rule="`pp * virtual_stages` positive entries that sum to `model.num_hidden_layers`.",
            most=1e4,
        ),
    ] = None
    recompute: Annotated[
        str,
        Key(
            "Activations that decoder layers recompute in the backward (see below).",
            form="none, selective, full, a list of these for each stage, `{budget: 20 GiB}`, auto or `{auto: 80 GiB}`",
            rule="A list names `pp * virtual_stages` stages.",
        ),
    ] = "none"  # canonical text of lists and mappings: `config/recompute.py`
    schedule: Annotated[
        str,
        Key(
            "Pipeline schedule for `pp` > 1 (`llama_ds/schedules`); `deepspeed` is DeepSpeed's own pipeline engine.",
            choices=(*SCHEDULES, STOCK_ENGINE),
        ),
    ] = "1f1b"
    extra_warmup: Annotated[
        int,
        Key(
            "Additional warm-up forwards for each following rank, with weight gradients of zb_h1 deferred as much "
            "longer; in zb_v, v_half and v_min additional micro-batches that every rank may hold: more activation "
            "memory, which hides slow links.",
            "micro-batches",
            NOT_NEGATIVE,
            rule="Above 0 for pp > 1, not for schedules interleaved, dualpipe_v and deepspeed.",
            most=1e6,
        ),
    ] = 0
    virtual_stages: Annotated[
        int,
        Key(
            "Stages of the model on each pipeline rank.",
            "stages",
            POSITIVE,
            rule="Schedule interleaved needs 2 or more, dualpipe_v, zb_v, v_half and v_min 2, others 1.",
            most=1e4,
        ),
    ] = 1
    cp: Annotated[
        int,
        Key(
            "Context-parallel size: ranks that share the tokens of each row.",
            "ranks",
            POSITIVE,
            rule="`2 * cp` divides `data.seq_len` with method ring, `cp` with all_to_all, and with hierarchical `cp` "
            "and twice the number of groups; with `data.document_mask`, `cp` is enough.",
            most=1e4,
        ),
    ] = 1
    cp_method: Annotated[
        str,
        Key(
            "Attention over rows that several ranks share: keys and values travel around a ring, or an all-to-all "
            "exchanges tokens for heads, or neighbouring ranks exchange heads and a ring passes between these groups "
            "(`hierarchical`); `auto` decides by heads and tokens of a rank and the ranks of a host.",
            choices=CP_METHODS,
            rule="`all_to_all` needs `model.num_attention_heads / tp` divisible by `cp`.",
        ),
    ] = "auto"
    cp_all_to_all: Annotated[
        int,
        Key(
            "Ranks of a group that exchanges heads under `cp_method: hierarchical`; 0: as many as heads and the ranks "
            "of a host allow.",
            "ranks",
            NOT_NEGATIVE,
            rule="Divides `cp` and `model.num_attention_heads / tp`, and is neither 1 nor `cp`.",
            most=1e4,
        ),
    ] = 0
    pass_times: Annotated[
        tuple[int, ...] | None,
        Key(
            "Times by which zb_v, v_half and v_min order their computations, in one unit: forward, input backward and "
            "weight backward of a stage, and a message between ranks. `profile_run.py analyse` prints measured ones; "
            "null: all passes equal, messages free.",
            form="list of integers",
            rule="4 entries, or 3 for each of the `2 * pp` stages in the model's order and 1 for the message.",
            most=1e9,
        ),
    ] = None

    post_validation: Annotated[
        bool,
        Key(
            "Whether a step's first forwards may begin before the global gradient norm of the step before is known. "
            "After a step that was not clipped, the update precedes its norm; if this one clips or is not finite, the "
            "update and these forwards are undone and repeated. Keeps a second copy of masters and moments.",
            rule="For schedules dualpipe_v, zb_v, v_half and v_min, and AdamW with masters and states in fp32; not "
            "with `compute.fp8`, `checkpoint.compare_repeats`, `compare_states` or `logging.check_finite`.",
        ),
    ] = False

    tp_chunks: Annotated[
        int,
        Key(
            "Chunks into which decoder layers cut their tokens, so that tensor-parallel collectives of one chunk "
            "overlap the matrix products of others: in the forward, and in the backward where the schedule defers "
            "weight gradients, which otherwise overlap them. Smaller products are slower; `plan.py` says what pays.",
            "chunks",
            POSITIVE,
            rule="More than 1 needs tp > 1 and `compute.decoder_layer: manual_backward`; divides `data.seq_len`, "
            "divided by `cp`, and by tp under `sequence_parallel`.",
            most=64,
        ),
    ] = 1

    joint_weight_gradients: Annotated[
        int,
        Key(
            "Micro-batches of a stage whose weight gradients are one product, which is added to the fp32 buffers once. "
            "Above 1 every backward is split, and a rank holds the inputs of so many micro-batches' weight gradients. "
            "Matrices for which copying these side by side moves more bytes than it saves are multiplied one by one.",
            "micro-batches",
            POSITIVE,
            rule="Above 1 for pp > 1 with `compute.decoder_layer: manual_backward`, not for schedule deepspeed.",
            most=64,
        ),
    ] = 1

    gradient_neighbours: Annotated[
        int,
        Key(
            "Neighbouring data-parallel ranks, those of one host, that add their gradients in fp32 before the sums "
            "travel to other hosts in bf16.",
            "ranks",
            POSITIVE,
            rule="Above 1 for pp > 1 with `communication_data_type: bf16` in the DeepSpeed JSON and sums in fp32, not "
            "for schedule deepspeed; divides dp * cp.",
            most=64,
        ),
    ] = 1

    cuda_graphs: Annotated[
        bool,
        Key(
            "Whether decoder layers train as CUDA graphs, of which the host launches one for each pass of a layer: for "
            "stages that are launch-bound (small models). Their memory is kept from step to step. It has no effect on "
            "a CPU. `plan.py` says what pays.",
            rule="Needs `tp` 1, `cp` 1, `compute.decoder_layer: manual_backward`, ZeRO below 3; not with "
            "`data.document_mask`, `compute.fp8` or schedule deepspeed.",
        ),
    ] = False

    @property
    def own_pipeline(self) -> bool:
        """Whether this stack's pipeline engine trains, not DeepSpeed's, nor an engine of one stage."""
        return self.pp > 1 and self.schedule != STOCK_ENGINE

    def check(self) -> None:
        check_parallel(self)
