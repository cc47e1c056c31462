"""A tokenizer of any kind in the files that transformers' AutoTokenizer reads, with equal ids for every text.

A sentencepiece model is converted by `checkpoint.formats.hf_tokenizer`, Llama 3's tiktoken file by transformers; both
conversions are compared on a text that covers what tokenizers do differently. A tokenizer.json is taken as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import processors
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama_ds.checkpoint.carried import ORIGINAL, TOKENIZER_CONFIG, TOKENIZER_JSON
from llama_ds.checkpoint.formats.hf_config import read_object
from llama_ds.checkpoint.formats.hf_tokenizer import ONLY_AUTO, PROBE, imitation, sentencepiece_config, tokenizer_config
from llama_ds.checkpoint.formats.huggingface import HfTokenizer
from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.data.text.sentencepiece_model import SentencepieceModel
from llama_ds.data.text.tiktoken_ranks import BOS, EOS, PATTERN, SPECIAL_TOKENS, TiktokenRanks
from llama_ds.data.text.tokenizer import Tokenizer, tokenizer_files
from llama_ds.errors import UserError


def hf_tokenizer(files: ModelFiles) -> tuple[HfTokenizer | None, str]:
    """Return a model's tokenizer in transformers' form, and a warning or nothing.

    If ids would differ there is no tokenizer.json, but a file with which AutoTokenizer fails.
    """
    if files.tokenizer is None:
        return None, ""
    try:
        ours = Tokenizer(files.tokenizer)
    except UserError as error:
        return None, f"{error}; no tokenizer.json is written"
    try:
        copy = ORIGINAL if ours.kind == TiktokenRanks.KIND else None
        return HfTokenizer(exported(ours, files.from_hf), ours.bos_id, ours.eos_id, copy), ""
    except UserError as error:
        found = HfTokenizer(refusal(ours, files.from_hf), ours.bos_id, ours.eos_id)
        return found, f"{error}; no tokenizer.json is written"


def exported(tokenizer: Tokenizer, continued: bool = False) -> dict[str, bytes]:
    """Return the contents of tokenizer.json and tokenizer_config.json by name.

    Args:
        tokenizer: a tokenizer in any folder.
        continued: its folder came from Hugging Face, and its tokenizer_config.json says more, as a chat template.

    Raises:
        UserError: transformers' tokenizers would give other ids.
    """
    vocabulary = tokenizer.vocabulary
    path = os.path.join(os.path.dirname(tokenizer.path), TOKENIZER_CONFIG)
    said = read_object(path) if continued and os.path.exists(path) else {}
    if isinstance(vocabulary, SentencepieceModel):
        content = imitation(vocabulary, said.get("add_bos_token"), said.get("add_eos_token") is True)
        config = sentencepiece_config(vocabulary)
    elif isinstance(vocabulary, TiktokenRanks):
        content, config = _converted(vocabulary), _tiktoken_config()
    else:
        return _readable(tokenizer_files(tokenizer.path))
    if content is None:
        raise UserError(
            f"{tokenizer.path}: transformers would give other ids, because it is not a BPE model without "
            "normalisation; use the tokenizer itself, not transformers'"
        )
    if said:
        # Templates spell special tokens, so that their names must not be text.
        config = {**config, "split_special_tokens": False, **said, **_ours(config)}
    return {TOKENIZER_JSON: _json(content), TOKENIZER_CONFIG: _json(config)}


def refusal(tokenizer: Tokenizer, continued: bool = False) -> dict[str, bytes]:
    """Return the tokenizer_config.json with which AutoTokenizer fails, for a tokenizer without a tokenizer.json.

    Otherwise transformers would convert tokenizer.model by itself, to other ids. In a folder that came from Hugging
    Face (`continued`) the configuration is kept, if there is one: there transformers' ids may be those of training.
    """
    if continued and os.path.exists(os.path.join(os.path.dirname(tokenizer.path), TOKENIZER_CONFIG)):
        return {}
    vocabulary = tokenizer.vocabulary
    config = sentencepiece_config(vocabulary) if isinstance(vocabulary, SentencepieceModel) else _tiktoken_config()
    reason = "transformers would give other ids than the model was trained with: use tokenizer.model itself"
    return {TOKENIZER_CONFIG: _json({**config, "encode": reason})}  # see `hf_tokenizer.ONLY_AUTO`


def _tiktoken_config() -> dict[str, Any]:
    return tokenizer_config(bos_token=BOS, eos_token=EOS, add_bos_token=True, add_eos_token=False)


def _ours(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that belong to the tokenizer.json beside them."""
    keys = ("tokenizer_class", *ONLY_AUTO, "add_prefix_space", "clean_up_tokenization_spaces")
    return {key: config[key] for key in keys if key in config}


def _readable(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return a tokenizer.json with its configuration; transformers 5 replaces parts of it for most other classes."""
    config = {**json.loads(files[TOKENIZER_CONFIG]), "tokenizer_class": "PreTrainedTokenizerFast", **ONLY_AUTO}
    return {**files, TOKENIZER_CONFIG: _json(config)}


def _converted(vocabulary: TiktokenRanks) -> dict[str, Any] | None:
    converter = TikTokenConverter(vocabulary.path, PATTERN, extra_special_tokens=list(SPECIAL_TOKENS))
    converter.load_tiktoken_bpe = lambda path: vocabulary.ranks  # tiktoken's loader caches files by path
    theirs: tokenizers.Tokenizer = converter.converted()
    bos = vocabulary.bos_id
    theirs.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, bos)]),
        ]
    )
    theirs.encode_special_tokens = True  # the effect of split_special_tokens
    same = theirs.token_to_id(EOS) == vocabulary.eos_id and theirs.get_vocab_size() == vocabulary.vocab_size
    if not same or theirs.encode(PROBE, add_special_tokens=False).ids != vocabulary.encode(PROBE):
        return None
    return json.loads(theirs.to_str())


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode()
