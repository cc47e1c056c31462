"""Loads models of any supported format into transformers, to generate text and to compare logits."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from llama_ds.checkpoint.formats.hf_config import hf_config
from llama_ds.checkpoint.formats.hf_tokenizer import imitation, tokenizer_config
from llama_ds.checkpoint.load_model import kind_of, open_model
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
    """Return the transformers model in a Hugging Face folder."""
    logging.disable_progress_bar()  # loading local files takes only a few seconds
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@torch.no_grad()
def fp32_logits(folder: str, ids: Tensor) -> Tensor:
    """Return the logits (1, T, V) that transformers computes in fp32 with a Hugging Face folder."""
    return load_exported(folder, torch.float32).eval()(input_ids=ids, use_cache=False).logits


def load(path: str, kind: str | None) -> tuple[Any, Any]:
    """Return the transformers tokenizer and model for a folder of any kind."""
    kind = kind or kind_of(path)
    files = open_model(path, kind)
    if kind == "hf":
        if not os.path.exists(os.path.join(path, "tokenizer.json")):
            raise UserError(f"{path}: has no tokenizer.json; convert its model again with tools/convert.py")
        return AutoTokenizer.from_pretrained(path), load_exported(path, "auto")
    if files.tokenizer is None:
        raise UserError(f"{files.path}: has no tokenizer.model; copy the model's own into it")
    content = imitation(Tokenizer(files.tokenizer))
    if content is None:
        raise UserError(f"{files.tokenizer}: not a BPE model without normalisation, so transformers cannot imitate it")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokenizer_config()), _with_weights(files)


def _with_weights(files: ModelFiles) -> Any:
    """Return a transformers model with the weights of `files`, loaded layer by layer."""
    dtype = DTYPES[files.dtype]
    config = LlamaConfig(**hf_config(files.model, files.seq_len, str(dtype).removeprefix("torch.")))
    model = LlamaForCausalLM(config).to(dtype)
    for layer in files.layers():
        named = {hf_name(layer, name, files.model.num_hidden_layers): w for name, w in files.layer(layer).items()}
        model.load_state_dict(named, strict=False)
    return model


def continuations(model: Any, tokenizer: Any, prompt: str, how: Sampling) -> list[str]:
    """Return continuations of `prompt`."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if how.temperature > 0:
        sampling = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    ids = model.generate(
        **inputs,
        **sampling,
        max_new_tokens=how.max_new_tokens,
        num_return_sequences=how.count if how.temperature > 0 else 1,
        # Either id ends a document, because every document in the training rows begins with bos.
        eos_token_id=[tokenizer.bos_token_id, tokenizer.eos_token_id],
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
