"""Tokenizers of every kind, in the files of real releases, trained on a little text."""

from __future__ import annotations

import base64
import json
import sysconfig
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llama_ds.data.text.tiktoken_ranks import BOS, EOS, PATTERN, SPECIAL_TOKENS

RANKS = 701  # odd, as 32,001 is: tp does not divide a vocabulary of that size
# Scripts, odd Unicode and names of special tokens, for comparisons of ids.
ODD = (
    "  Two  spaces, ﬁne 2048 ｆｕｌｌ e\u0301é 漢字仮名。한국어, العربية עברית हिन्दी ไทย русский Ελληνικά\t\x00\r\n\r\n"
    "\u3000\u2028x\u00a0y\u200b \ufeff😀👩‍👩‍👧 '\u0301 I'LL don't 12345 1.5e3 __init__(self)\n    return\n\n\n"
    "<|end_of_text|><|begin_of_text|><|endoftext|></s><s>\u2581 a\u2581 \U0010ffff end  "
)


def sample() -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"]) / "json"
    return [*(path.read_text("utf-8") for path in sorted(folder.glob("*.py"))), ODD]


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """Return a byte-level BPE tokenizer without special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(sample(), trainers.BpeTrainer(vocab_size=RANKS, initial_alphabet=alphabet))
    return tokenizer


def write_llama3(folder: Path) -> tuple[str, str]:
    """Write a tokenizer of Llama 3's shape as Meta and as Hugging Face publish it; return both paths."""
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer = byte_level(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]))
    spelled = {chr(char): byte for char, byte in zip(_characters(), range(256), strict=True)}
    ranks = sorted((rank, bytes(spelled[c] for c in token)) for token, rank in tokenizer.get_vocab().items())
    meta = folder / "meta" / "tokenizer.model"
    meta.parent.mkdir()
    meta.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return str(meta), write_json(folder / "hf", tokenizer, {"bos_token": BOS, "eos_token": EOS})


def write_gpt_neox(folder: Path) -> str:
    """Write a tokenizer of the shape of GPT-NeoX and SmolLM: GPT-2's pattern, and one token as bos and eos."""
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return write_json(folder / "neox", tokenizer, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})


def write_json(folder: Path, tokenizer: Tokenizer, config: dict[str, object]) -> str:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "tokenizer.json")


def _characters() -> list[int]:
    """Return the code point that spells each byte in a byte-level vocabulary, as GPT-2 defines it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [byte if byte in plain else next(others) for byte in range(256)]
