"""A complete model on one device, without process group or DeepSpeed; for notebooks, evaluation and conversion."""

from __future__ import annotations

import torch

from llama_ds.config.document_marks import LLAMA_MARKS, DocumentMarks
from llama_ds.config.run_file import find_run_file, load_run
from llama_ds.config.schema import ModelConfig, RunConfig
from llama_ds.errors import UserError
from llama_ds.model.attention import CausalAttention, choose_backend
from llama_ds.model.cpu_products import choose_products
from llama_ds.model.decoder import LayerContext
from llama_ds.model.llama import Llama
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.rope import RotaryTables
from llama_ds.model.tensor_parallel import SingleRank

DEFAULT_SEQ_LEN = 2048  # sequence length of the LLaMA paper's models


def build_model(
    shape: str | RunConfig | ModelConfig,
    seq_len: int | None = None,
    seed: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    document_mask: bool | None = None,
    marks: DocumentMarks = LLAMA_MARKS,
) -> Llama:
    """Return the model of the given shape with its initial weights; all layers use plain autograd.

    `model(ids, labels)` returns the differentiable loss, `model.logits(ids)` the logits.

    Args:
        shape: name of a run file in ds_configs/ such as "7b", path of a run file, RunConfig, or ModelConfig.
        seq_len: maximum tokens of a row; None: the run's, or DEFAULT_SEQ_LEN for a ModelConfig.
        seed: seed of the initial weights, which do not depend on the device; None: the run's, or 0 for a ModelConfig.
        device: device of weights and computation, which also decides the attention backend.
        dtype: dtype of weights and computation.
        document_mask: whether attention stays inside the documents of a row; None: the run's setting, or False for a
            ModelConfig.
        marks: the ids between documents, those of the tokenizer; for the mask.

    Raises:
        UserError: the run file is missing or invalid, the device is unavailable, or the length is not positive.
    """
    if isinstance(shape, str):
        shape = load_run(find_run_file(shape))
    if isinstance(shape, RunConfig):
        seq_len = shape.data.seq_len if seq_len is None else seq_len
        seed = shape.seed if seed is None else seed
        document_mask = shape.data.document_mask if document_mask is None else document_mask
        shape = shape.model
    seq_len = DEFAULT_SEQ_LEN if seq_len is None else seq_len
    if seq_len < 1:
        raise UserError(f"seq_len {seq_len}: a row has one token at least; give a positive number")
    device = _checked_device(device)
    if device.type == "cpu":
        choose_products()
    context = LayerContext(
        model=shape,
        seed=seed or 0,
        tp=SingleRank(),
        # The run file's backend is ignored: it may not run on this device.
        attention=CausalAttention(choose_backend("auto", device.type, dtype, shape.head_dim)),
        rotary=RotaryTables(shape, seq_len),
        document_mask=bool(document_mask),
        marks=marks,
    )
    return Llama(context, NextTokenLoss(context.tp)).to(device, dtype)


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises one or the other
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"device {str(device)!r}: not available here ({reason}); use cpu, cuda or cuda:0") from None
    return torch.device(device)
