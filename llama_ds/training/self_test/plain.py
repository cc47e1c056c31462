"""Training in plain torch on one rank: the numbers that every layout must reproduce.

The layers are those of `model/decoder.py` with autograd. Attention, document masks, the loss, Muon, Lion and muP are
written here once more, from their definitions, so that a fault in the model's own does not hide in the comparison.

Shapes: R rows, T tokens, H query heads, G key-value heads, K head size, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ds.config.document_marks import LLAMA_MARKS, DocumentMarks
from llama_ds.config.schema import OptimizerConfig, RunConfig
from llama_ds.layout.weights import Role, weight_of
from llama_ds.model.attention import CausalAttention
from llama_ds.model.decoder import LayerContext
from llama_ds.model.llama import Llama
from llama_ds.model.loss import IGNORED
from llama_ds.model.rope import RotaryTables
from llama_ds.model.tensor_parallel import SingleRank
from llama_ds.training.self_test.plain_lion import PlainLion
from llama_ds.training.self_test.plain_muon import PlainMuon

ROWS_AT_ONCE = 16  # rows of one forward, which bounds the memory of the scores


class PlainTraining:
    """A run's model on one rank, and its optimizer; `step` and `loss` take rows in which filler is marked."""

    def __init__(
        self, run: RunConfig, marks: DocumentMarks = LLAMA_MARKS, initial: torch.dtype = torch.float32
    ) -> None:
        """Build the model in float64, with its initial weights rounded to `initial`."""
        mup, settings = run.model.mup, run.optimizer
        wider = run.model.hidden_size / mup.base_width if mup else 1.0
        base_head = mup.base_head_dim if mup else None
        self.attention = PlainAttention(marks if run.data.document_mask else None, base_head)
        self.objective = PlainLoss(settings.z_loss, 1 / wider)
        model = replace(run.model, mup=None)
        context = LayerContext(
            model=model,
            seed=run.seed,
            tp=SingleRank(),
            attention=self.attention,
            rotary=RotaryTables(model, run.data.seq_len),
            initializer_range=run.training.initializer_range,
        )
        self.model = Llama(context, self.objective)  # type: ignore[arg-type]
        hidden = hidden_matrices(self.model)
        for matrix in hidden:
            matrix.data.mul_(wider**-0.5)
        self.model.to(initial).to(torch.float64)
        self.clip = settings.clip
        self.muon = PlainMuon(hidden if settings.name == "muon" else [], settings, run.model)
        self.lion = PlainLion(self.model.parameters() if settings.name == "lion" else [], settings, hidden, wider)
        others = [p for p in self.model.parameters() if p not in self.muon.momenta and p not in self.lion.moments]
        self.adamw = _adamw(others, hidden, settings, wider)

    def step(self, rows: np.ndarray, lr: float) -> tuple[float, float]:
        """Take a step on the global batch `rows` (R, T + 1); return its mean loss, and the norm before clipping."""
        self.model.zero_grad()
        loss = sum(self._backward(part, labels_of(rows)) for part in _parts(rows))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["factor"]
        self.adamw.step()
        self.muon.step(lr)
        self.lion.step(lr)
        return float(loss), norm.item()

    @torch.no_grad()
    def loss(self, rows: np.ndarray) -> float:
        """Return the mean loss of `rows` (R, T + 1), without z-loss."""
        return float(sum(self._forward(part, labels_of(rows)) for part in _parts(rows)))

    def _backward(self, rows: np.ndarray, labels: int) -> Tensor:
        loss = self._forward(rows, labels)
        loss.backward()
        return loss.detach()

    def _forward(self, rows: np.ndarray, labels: int) -> Tensor:
        marked = torch.from_numpy(rows)
        ids = torch.where(marked < 0, ~marked, marked)[:, :-1]
        self.attention.see(ids)
        self.objective.labels = labels
        return self.model(ids, marked[:, 1:].masked_fill(marked[:, 1:] < 0, IGNORED))


class PlainAttention(CausalAttention):
    """softmax(Q K^T / sqrt(K)) V over the earlier tokens of a token's document, or of its row without `marks`.

    With a size `base_head` of heads, muP's, it is softmax(Q K^T sqrt(base_head) / K) V.
    """

    def __init__(self, marks: DocumentMarks | None, base_head: int | None) -> None:
        super().__init__("reference")
        self.marks, self.base_head = marks, base_head
        self.hidden = torch.empty(0)

    def see(self, ids: Tensor) -> None:
        """Note which pairs of tokens of `ids` (R, T) do not see each other: (R, 1, 1, T, T) or (1, 1, 1, T, T)."""
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        self.hidden = later[None, None, None]
        if self.marks is not None:
            begin, eos = self.marks.begin, self.marks.eos
            opens = F.pad(ids[:, :-1] == eos, (1, 0)) if begin is None else ids == begin
            document = opens.cumsum(1)
            self.hidden = self.hidden | (document[:, :, None] != document[:, None, :])[:, None, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None = None) -> Tensor:
        """(R, T, H, K), (R, T, G, K), (R, T, G, K) -> (R, T, H, K)."""
        groups = k.shape[2]
        queries = q.unflatten(2, (groups, -1))  # consecutive heads share a key-value head
        scale = math.sqrt(self.base_head or q.shape[-1]) / q.shape[-1]
        scores = torch.einsum("rigqk,rjgk->rgqij", queries, k) * scale
        weights = scores.masked_fill(self.hidden, -math.inf).softmax(-1)
        return torch.einsum("rgqij,rjgk->rigqk", weights, v).flatten(2, 3)


class PlainLoss(nn.Module):
    """Cross-entropy, plus z-loss while training, summed over the labels and divided by their number in the batch."""

    def __init__(self, z_weight: float, factor: float) -> None:
        """`factor` is that of the logits."""
        super().__init__()
        self.z_weight, self.factor = z_weight, factor
        self.labels = 1

    def forward(self, head: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """Return the share of these labels (R, T) in the mean loss; head = (hidden states (R, T, D), W (V, D))."""
        x, weight = head
        logits, flat = (x @ weight.t()).flatten(0, 1) * self.factor, labels.flatten()
        total = F.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum")
        if self.z_weight and torch.is_grad_enabled():
            total = total + self.z_weight * logits.logsumexp(1).square()[flat != IGNORED].sum()
        return total / self.labels


def labels_of(rows: np.ndarray) -> int:
    """Return the number of labels of marked rows (R, T + 1)."""
    return int((rows[:, 1:] >= 0).sum())


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that Muon updates."""
    return [p for name, p in model.named_parameters() if weight_of(name).role is Role.HIDDEN_MATRIX]


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return np.array_split(rows, -(-len(rows) // ROWS_AT_ONCE))


def _adamw(
    parameters: Sequence[nn.Parameter], hidden: Sequence[nn.Parameter], settings: OptimizerConfig, wider: float
) -> torch.optim.AdamW:
    """Return AdamW for parameters, some of them hidden matrices, of a model that is `wider` than the base of muP."""
    matrices = [p for p in parameters if p in set(hidden)]
    tables = [p for p in parameters if p.dim() == 2 and p not in set(hidden)]
    vectors = [p for p in parameters if p.dim() == 1]  # norms and biases
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay * wider, "factor": 1 / wider},
        {"params": tables, "weight_decay": settings.weight_decay, "factor": 1.0},
        {"params": vectors, "weight_decay": 0.0, "factor": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps / wider)
