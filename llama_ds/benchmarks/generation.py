"""Loads models of any supported format into transformers, to generate text and to compare logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from llama_ds.checkpoint.formats.folded import folded
from llama_ds.checkpoint.formats.hf_config import hf_config
from llama_ds.checkpoint.formats.inventory import shown
from llama_ds.checkpoint.load_model import kind_of, open_as_found
from llama_ds.checkpoint.names import hf_name
from llama_ds.checkpoint.weights import DTYPES, ModelFiles
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters: `count` continuations per prompt; greedy decoding if `temperature` is 0."""

    max_new_tokens: int
    temperature: float
    top_p: float
    count: int


def load_exported(folder: str, dtype: torch.dtype | str) -> Any:
    """Return the transformers model in a Hugging Face folder.

    Raises:
        UserError: transformers cannot load the folder, or finds some weights under no name that it knows, and would
            make up random ones.
    """
    logging.disable_progress_bar()  # loading local files takes only a few seconds
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:  # a damaged file gives errors of many types
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise UserError(
            f"{folder}: transformers cannot load it ({reason}); export the model again with tools/convert.py --to hf"
        ) from None
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{folder}: transformers finds no weights for {shown(missing)}; convert it to a new folder with "
            "tools/convert.py --to hf, which removes prefixes from names"
        )
    return model


@torch.no_grad()
def fp32_logits(folder: str, ids: Tensor) -> Tensor:
    """Return the logits (1, T, V) that transformers computes in fp32 with a Hugging Face folder."""
    return load_exported(folder, torch.float32).eval()(input_ids=ids, use_cache=False).logits


def load(path: str, kind: str | None) -> tuple[Tokenizer, Any]:
    """Return the tokenizer and the transformers model for a folder of any kind.

    Raises:
        UserError: the folder is damaged, or has no tokenizer.
    """
    kind = kind or kind_of(path)
    files = open_as_found(path, kind=kind)
    if files.tokenizer is None:
        where = "copy the model's own into it, or convert its model again with tools/convert.py"
        raise UserError(f"{files.path}: has no tokenizer.json and no tokenizer.model; {where}")
    return Tokenizer(files.tokenizer), load_exported(path, "auto") if kind == "hf" else _with_weights(folded(files))


def _with_weights(files: ModelFiles) -> Any:
    """Return a transformers model with the weights of `files`, loaded layer by layer."""
    dtype = DTYPES[files.dtype]
    config = AutoConfig.for_model(**hf_config(files.model, files.seq_len, str(dtype).removeprefix("torch.")))
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for layer in files.layers():
        named = {hf_name(layer, name, files.model.num_hidden_layers): w for name, w in files.layer(layer).items()}
        model.load_state_dict(named, strict=False)
    return model


def continuations(model: Any, tokenizer: Tokenizer, prompt: str, how: Sampling) -> list[str]:
    """Return continuations of `prompt`, which begins as a document does."""
    marks = tokenizer.marks
    before = [] if marks.begin is None else [marks.begin]
    if not prompt and not before:
        before = [marks.eos]  # after the document before
    ids = torch.tensor([[*before, *tokenizer.encode(prompt)]], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if how.temperature > 0:
        sampling = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **sampling,
        max_new_tokens=how.max_new_tokens,
        num_return_sequences=how.count if how.temperature > 0 else 1,
        # Either id ends a document, because the next one in the training rows begins with the first.
        eos_token_id=[*({marks.begin} - {None}), marks.eos],
        pad_token_id=marks.eos,
    )
    return [tokenizer.decode(row) for row in found[:, ids.shape[1] :].tolist()]
