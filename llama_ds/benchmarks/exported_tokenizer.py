"""A tokenizer of any kind in the files that transformers' AutoTokenizer reads, with equal ids for every text.

A sentencepiece model is converted by `checkpoint.formats.hf_tokenizer`, Llama 3's tiktoken file by transformers; both
conversions are compared on a text that covers what tokenizers do differently. A tokenizer.json is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import processors
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama_ds.checkpoint.formats.hf_tokenizer import PROBE, UNK, imitation, tokenizer_config
from llama_ds.checkpoint.manifest import TOKENIZER_CONFIG, TOKENIZER_JSON
from llama_ds.data.text.sentencepiece_model import SentencepieceModel
from llama_ds.data.text.tiktoken_ranks import BOS, EOS, PATTERN, SPECIAL_TOKENS, TiktokenRanks
from llama_ds.data.text.tokenizer import Tokenizer, tokenizer_files
from llama_ds.errors import UserError


def exported(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the contents of tokenizer.json and tokenizer_config.json by name.

    Raises:
        UserError: transformers' tokenizers would give other ids.
    """
    vocabulary = tokenizer.vocabulary
    if isinstance(vocabulary, SentencepieceModel):
        content, config = imitation(vocabulary), tokenizer_config(unk_token=UNK)
    elif isinstance(vocabulary, TiktokenRanks):
        content, config = _converted(vocabulary), tokenizer_config(BOS, EOS)
    else:
        return _readable(tokenizer_files(tokenizer.path))
    if content is None:
        raise UserError(
            f"{tokenizer.path}: transformers would give other ids, because it is not a BPE model without "
            "normalisation; use the tokenizer itself, not transformers'"
        )
    return {TOKENIZER_JSON: _json(content), TOKENIZER_CONFIG: _json(config)}


def _readable(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return a tokenizer.json with its configuration; transformers 5 replaces parts of it for most other classes."""
    config = {**json.loads(files[TOKENIZER_CONFIG]), "tokenizer_class": "PreTrainedTokenizerFast"}
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
