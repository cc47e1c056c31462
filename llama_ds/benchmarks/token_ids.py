"""The ids of bos and eos of a folder whose settings hold none: its tokenizer does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from llama_ds.checkpoint.choices import INCOMPLETE_FOLDERS
from llama_ds.checkpoint.formats.huggingface import holds_huggingface
from llama_ds.checkpoint.manifest import DESCRIPTION
from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.data.text.tiktoken_ranks import TiktokenRanks
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError


def with_token_ids(files: ModelFiles, bos: int | None, eos: Sequence[int]) -> ModelFiles:
    """Return a model with the ids given, or else those of its tokenizer, and a note of what they are.

    Args:
        files: a model of any format; only those of `choices.INCOMPLETE` have no ids of their own.
        bos: the id that begins a text; None: not given.
        eos: the ids that end one, the first of them in training; empty: not given.

    Raises:
        UserError: an id is not in the vocabulary, or the files name their ids themselves.
    """
    if holds_huggingface(files.path) or os.path.exists(os.path.join(files.path, DESCRIPTION)):
        if bos is not None or eos:
            raise UserError(
                f"command line: --bos-id and --eos-id apply only to {INCOMPLETE_FOLDERS}; {files.path} "
                "names its ids itself: change them in config.json and generation_config.json of the result"
            )
        return files
    tokenizer = _tokenizer(files)
    given = [i for i in (bos, *eos) if i is not None]
    if wrong := [i for i in given if not 0 <= i < files.model.vocab_size]:
        size = files.model.vocab_size
        raise UserError(f"command line: the id {wrong[0]} is not below vocab_size = {size}; correct it")
    if tokenizer is not None:
        bos = tokenizer.bos_id if bos is None else bos
        eos = eos or [i for i in (tokenizer.eos_id,) if i is not None]
    ids = {"bos_token_id": bos, "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None} if given else {}
    notes = (*files.notes, _note(files, tokenizer, bos, eos, bool(given)))
    return replace(files, bos_id=bos, eos_id=eos[0] if eos else None, hf_config=ids, notes=notes)


def with_missing_rows_noted(files: ModelFiles) -> ModelFiles:
    """Return a model with a note if its tokenizer has ids without a row in the vocabulary tables."""
    tokenizer, rows = _tokenizer(files), files.model.vocab_size
    if tokenizer is None or tokenizer.vocab_size <= rows:
        return files
    ids = tokenizer.vocab_size
    note = (
        f"vocabulary: the tables have {rows} rows, the tokenizer {ids} ids, of which those from {rows} on cannot be "
        f"computed; --vocab-size {ids} adds rows of zeros"
    )
    return replace(files, notes=(*files.notes, note))


def _tokenizer(files: ModelFiles) -> Tokenizer | None:
    try:
        return None if files.tokenizer is None else Tokenizer(files.tokenizer)
    except UserError:  # reported where the tokenizer is converted
        return None


def _note(files: ModelFiles, tokenizer: Tokenizer | None, bos: int | None, eos: Sequence[int], given: bool) -> str:
    if bos is None and not eos:
        return f"token ids: none, {files.path} has no tokenizer that names them: --bos-id N --eos-id N"
    where = "the command line" if given or tokenizer is None else os.path.basename(tokenizer.path)
    text = f"token ids: bos {bos}, eos {', '.join(map(str, eos)) or None}, of {where}"
    if not given and tokenizer is not None and isinstance(tokenizer.vocabulary, TiktokenRanks):
        text += "; instruct models end turns with others: --eos-id N N"
    return text
