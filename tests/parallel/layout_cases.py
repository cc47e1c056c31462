"""The tiny run that every layout trains, its data and its reference in plain torch without DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import torch

from llama_ds.config.schema import (
    ComputeConfig,
    DataConfig,
    ModelConfig,
    MupConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeScaling,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from llama_ds.data.filler import count_labels, mark_filler
from llama_ds.layout.layout import Layout
from llama_ds.layout.weights import key_of, weights
from llama_ds.model.llama import Llama, layer_context
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.tensor_parallel import SingleRank
from llama_ds.training.device_batches import MicroBatch, ids_and_labels
from llama_ds.training.lr_schedule import learning_rate
from llama_ds.training.self_test.plain_lion import PlainLion
from llama_ds.training.self_test.plain_muon import PlainMuon

STEPS, GLOBAL_BATCH, SEQ_LEN = 20, 8, 32
NEIGHBOUR: dict[str, Any] = {
    "attention_bias": "qkvo",
    "mlp_bias": True,
    "qk_norm": True,
    "rope_scaling": RopeScaling(4.0, None, None, 8, "yarn"),
}
VALIDATION = 100  # a step that is not trained and has rows with filler


@dataclass(frozen=True)
class Case:
    """One layout and the options that change what is computed."""

    pp: int = 1
    tp: int = 1
    dp: int = 1
    zero: int = 1
    sequence_parallel: bool = False
    tied: bool = False
    document_mask: bool = False
    recompute: str = "none"
    decoder_layer: str = "manual_backward"
    dtype: str = "fp32"
    micro_batch: int = 1
    partition: tuple[int, ...] | None = None
    z_loss: float = 0.0
    schedule: str = "1f1b"
    extra_warmup: int = 0
    virtual_stages: int = 1
    layers: int = 4
    vocab: int = 96
    hpz: int = 1  # ranks over which ZeRO-3 keeps a second copy of the weights
    # All that LLaMA does not have: biases, norms of queries and keys, scaled rotary frequencies.
    neighbour: bool = False
    mup: int = 0  # width of the base model, whose heads are of size 2; 0: no muP
    muon: str = ""  # rule of scale of Muon's updates; "": AdamW
    lion: bool = False
    clip: float = 0.5
    state_dtype: str = "fp32"
    masters: str = "fp32"
    cp: int = 1
    cp_method: str = "auto"
    cp_all_to_all: int = 0
    kv_heads: int = 4
    pass_times: tuple[int, ...] | None = None
    post_validation: bool = False
    tp_chunks: int = 1
    joint_weight_gradients: int = 1
    fp8: str = "off"
    fp8_weight_gradients: bool = False
    bf16_sums: int = 0  # neighbours that add gradients before they travel in bf16; 0: these travel in fp32
    cuda_graphs: bool = False  # emulated
    through_host: bool = False  # messages, as between ranks that share a GPU
    steps: int = STEPS  # number of steps to train; the learning-rate schedule always spans STEPS

    @property
    def world(self) -> int:
        return self.pp * self.tp * self.dp * self.cp

    @property
    def name(self) -> str:
        options = [(k, v) for k, v in list(asdict(self).items())[4:] if v != getattr(Case, k)]
        words = [k if v is True else f"{k}={v}" for k, v in options]
        return " ".join([f"pp{self.pp} tp{self.tp} dp{self.dp} zero{self.zero}", *words])

    @property
    def layout(self) -> Layout:
        accumulation = GLOBAL_BATCH // self.dp // self.micro_batch
        sizes = {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp}
        return Layout(**sizes, micro_batch=self.micro_batch, accumulation=accumulation)

    @property
    def reference(self) -> Case:
        """The same mathematics on one rank: the key under which the plain torch run is shared between layouts."""
        return Case(
            tied=self.tied,
            document_mask=self.document_mask,
            z_loss=self.z_loss,
            layers=self.layers,
            vocab=self.vocab,
            neighbour=self.neighbour,
            mup=self.mup,
            muon=self.muon,
            lion=self.lion,
            clip=self.clip,
            kv_heads=self.kv_heads,
            fp8=self.fp8,
            fp8_weight_gradients=self.fp8_weight_gradients,
            steps=STEPS if self.fp8 == "off" else self.steps,
        )

    @property
    def run(self) -> RunConfig:
        return run_of(self)


@cache  # to make and check it takes as long as a step
def run_of(case: Case) -> RunConfig:
    model = ModelConfig(
        vocab_size=case.vocab,
        hidden_size=32,
        intermediate_size=88 if case.fp8 == "off" else 128,  # a multiple of 16 on each rank
        num_hidden_layers=case.layers,
        num_attention_heads=8,
        num_key_value_heads=case.kv_heads,
        head_dim=8,
        tie_word_embeddings=case.tied,
        mup=MupConfig(case.mup, 2) if case.mup else None,
        **(NEIGHBOUR if case.neighbour else {}),
    )
    return RunConfig(
        name="layouts",
        seed=11,
        output_dir="unused",
        model=model,
        data=DataConfig("unused", SEQ_LEN, (SourceConfig("s", "unused", 1.0),), document_mask=case.document_mask),
        training=TrainingConfig(GLOBAL_BATCH, STEPS, STEPS * GLOBAL_BATCH * SEQ_LEN, initializer_range=0.1),
        # By default clipping bites at every step, so a wrong norm changes the losses too. With Adam's usual eps of 1e-8
        # one gradient that happens to be of that size, half of it rounding, is a whole step of its weight.
        optimizer=OptimizerConfig(warmup_steps=5, clip=case.clip, z_loss=case.z_loss, **_optimizer(case)),
        parallel=ParallelConfig(
            case.pp,
            case.tp,
            case.sequence_parallel,
            case.micro_batch,
            case.partition,
            case.recompute,
            case.schedule,
            case.extra_warmup,
            case.virtual_stages,
            case.cp,
            case.cp_method,
            case.cp_all_to_all,
            case.pass_times,
            case.post_validation,
            case.tp_chunks,
            case.joint_weight_gradients,
            max(1, case.bf16_sums),
            case.cuda_graphs,
        ),
        compute=ComputeConfig(
            decoder_layer=case.decoder_layer, fp8=case.fp8, fp8_weight_gradients=case.fp8_weight_gradients
        ),
        deepspeed={
            "zero_optimization": {
                "stage": case.zero,
                **({"zero_hpz_partition_size": case.hpz} if case.hpz > 1 else {}),
            },
            "bf16": {"enabled": case.dtype == "bf16"},
            **({"communication_data_type": "bf16"} if case.bf16_sums else {}),
        },
        path="layouts.yaml",
    )


def _optimizer(case: Case) -> dict[str, Any]:
    dtypes = {"state_dtype": case.state_dtype, "masters": case.masters}
    if case.lion:
        return {"name": "lion", "lr": 5e-4, "betas": (0.9, 0.98), **dtypes}
    muon = {"name": "muon", "muon_scale": case.muon, "muon_lr": 1e-2} if case.muon else {}
    return {"lr": 3e-3, "eps": 1e-6, **muon, **dtypes}


def global_rows(step: int, vocab: int = 96) -> np.ndarray:
    """Return the (GLOBAL_BATCH, SEQ_LEN + 1) rows of a step: short token sequences with document boundaries.

    In the second step of three, two rows end in filler.
    """
    generator = np.random.default_rng(step)
    first, stride = generator.integers(3, vocab, (GLOBAL_BATCH, 1)), generator.integers(1, 4)
    rows = (first + np.arange(SEQ_LEN + 1) * stride) % (vocab - 3) + 3
    rows[generator.random(rows.shape) < 0.1] = 1
    rows = rows.astype(np.int64)
    if step % 3 == 1:
        labels = np.full(GLOBAL_BATCH, SEQ_LEN)
        labels[[2, 7]] = 1, 20
        rows[2, 2:] = rows[7, 21:] = 2
        mark_filler(rows, labels)
    return rows


def step_batches(case: Case, dp_rank: int, step: int) -> list[MicroBatch]:
    """Return the micro-batches of one data-parallel rank in a step."""
    rows, size = global_rows(step, case.vocab), GLOBAL_BATCH // case.dp
    labels = count_labels(rows) / (GLOBAL_BATCH // case.micro_batch)
    parts = np.split(rows[dp_rank * size : (dp_rank + 1) * size], size // case.micro_batch)
    return [MicroBatch(part, labels) for part in parts]


def micro_batches(case: Case, dp_rank: int, first_step: int = 0) -> Iterator[MicroBatch]:
    """Yield the micro-batches of one data-parallel rank, endlessly."""
    for step in count(first_step):
        yield from step_batches(case, dp_rank, step)


def reference_model(case: Case) -> Llama:
    """Return the model of a case in fp32 on one rank, with its initial weights and plain autograd.

    With products in float8 its layers are those that the layouts have: `tests/model/test_fp8.py` compares them with
    autograd.
    """
    run = replace(case.run, compute=replace(case.run.compute, attention_backend="reference"))
    context = layer_context(run, SingleRank(), "cpu", torch.float32)
    policies = None if case.fp8 == "off" else ["none"] * case.layers
    return Llama(context, NextTokenLoss(context.tp, run.optimizer.z_loss), policies)


def train_reference(case: Case, nudge: int = 0) -> list[tuple[float, float, float, dict[str, list[float]]]]:
    """Train in plain torch on one rank; with `nudge`, a seed, every initial weight is about a rounding away.

    Return of each step (loss, gradient norm before clipping, then the loss of the rows of step `VALIDATION`, the norms
    of every weight by kind, in the order of the weight table).
    """
    run, model = case.run, reference_model(case)
    if nudge:
        noise = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for p in model.parameters():
                p *= 1 + 1e-7 * torch.randn(p.shape, generator=noise)
    hidden = [p for name, p in model.named_parameters() if "_proj.weight" in name]
    wider = run.model.hidden_size / case.mup if case.mup else 1.0
    muon = PlainMuon(hidden if case.muon else [], run.optimizer, run.model)
    lion = PlainLion(model.parameters() if case.lion else [], run.optimizer, hidden, wider)
    others = [p for p in model.parameters() if p not in muon.momenta and p not in lion.moments]
    decay, matrices = run.optimizer.weight_decay, [p for p in others if p in set(hidden)]
    groups = [
        {"params": matrices, "weight_decay": decay * wider, "factor": 1 / wider},
        {"params": [p for p in others if p.dim() == 2 and p not in set(hidden)], "weight_decay": decay},
        {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0},  # norms and biases
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=run.optimizer.betas, eps=run.optimizer.eps / wider)
    history, outputs = [], list[torch.Tensor]()
    for layer in list(model.layers)[1 : case.layers + 1]:
        layer.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    for step in range(case.steps):
        outputs.clear()
        loss = model(*ids_and_labels(global_rows(step, case.vocab), torch.device("cpu")))
        norms = {"activation": [float(x.detach().square().mean().sqrt()) for x in outputs]}
        model.zero_grad()
        loss.backward()
        named = {key_of(name): p for name, p in model.named_parameters()}
        ordered = [named[key] for key, _ in weights(run.model)]
        before = [p.detach().clone() for p in ordered]
        norms["gradient"] = [float(p.grad.norm()) for p in ordered if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, run.optimizer, STEPS) * group.get("factor", 1.0)
        optimizer.step()
        model.context.products.end_step()
        muon.step(learning_rate(step, run.optimizer, STEPS))
        lion.step(learning_rate(step, run.optimizer, STEPS))
        with torch.no_grad():
            after = model(*ids_and_labels(global_rows(VALIDATION, case.vocab), torch.device("cpu")))
        norms["weight"] = [float(p.detach().norm()) for p in ordered]
        norms["update"] = [float((p.detach() - old).norm()) for p, old in zip(ordered, before, strict=True)]
        history.append((loss.item(), norm.item(), after.item(), norms))
    return history
