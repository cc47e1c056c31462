"""The model that a new run starts from, and the tokenizer that a run continues with: compared, and logged."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

from llama_ds.checkpoint.carried import Carried
from llama_ds.checkpoint.load_model import kind_of, open_as_found
from llama_ds.checkpoint.manifest import Description
from llama_ds.checkpoint.same_model import check_same_function, fingerprint
from llama_ds.checkpoint.weights import ModelFiles, check_shapes, tokenizer_in
from llama_ds.config.differences import Difference, shown
from llama_ds.config.schema import RunConfig
from llama_ds.data.text.same_tokenizer import difference
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError
from llama_ds.log import logger

TOKENIZER, VOCABULARY = "data.tokenizer", "model.vocab_size"  # keys of checkpoint.start_from_changes


def open_start(run: RunConfig, tokenizer: Tokenizer) -> ModelFiles | None:
    """Return the model that a new run starts from, None without `checkpoint.start_from`.

    Raises:
        UserError: it computes another function than the run's model, or has another tokenizer, and
            `checkpoint.start_from_changes` does not list the difference.
    """
    path, changes = run.checkpoint.start_from, run.checkpoint.start_from_changes
    if not path:
        return None
    files = found = open_as_found(path)
    changed = check_same_function(found, run.model, changes)
    if any(key == VOCABULARY for key, *_ in changed):
        files = open_as_found(path, run.model.vocab_size)
    check_shapes(files, run.model)
    other = _other_tokenizer(found, tokenizer)
    if other and TOKENIZER not in changes:
        raise UserError(
            f"{found.path}: was trained with another tokenizer than {tokenizer.path}: {other}; use the folder's "
            f"tokenizer and data built with it, or change it on purpose: checkpoint.start_from_changes=[{TOKENIZER}]"
        )
    if logger.isEnabledFor(logging.INFO):  # the first rank
        _log(run, found, changed, other)
    return replace(files, hf_config={}) if other else files


def carried_over(checkpoints: str, chosen: tuple[str, Description] | None, start: ModelFiles | None) -> Carried:
    """Return what a run takes over from the checkpoint in the folder `checkpoints` or the model that it starts from.

    Token ids, chat templates and generation settings belong to a tokenizer: with another one there are none.
    """
    if chosen and chosen[0] and chosen[1].hf_config:
        return Carried(chosen[1].hf_config, os.path.join(checkpoints, chosen[0]))
    if start and start.hf_config:
        return Carried(start.hf_config, start.path)
    return Carried()


def check_same_tokenizer(folder: str, tokenizer: Tokenizer) -> None:
    """Check that a run resumes from the checkpoint `folder` with the tokenizer that it was trained with.

    Raises:
        UserError: `tokenizer` gives other ids.
    """
    path = tokenizer_in(folder)
    if path and (other := _compared(path, tokenizer)):
        raise UserError(
            f"{folder}: was trained with another tokenizer than {tokenizer.path}: {other}; use the same one and data "
            "built with it, or another name for a new run"
        )


def _other_tokenizer(files: ModelFiles, tokenizer: Tokenizer) -> str:
    if files.tokenizer:
        return _compared(files.tokenizer, tokenizer)
    logger.warning("%s: has no tokenizer to compare with %s", files.path, tokenizer.path)
    for what, there, here in (("bos", files.bos_id, tokenizer.bos_id), ("eos", files.eos_id, tokenizer.eos_id)):
        if there is not None and there != here:
            return f"{what}_id {there}, not {shown(here)}"
    return ""


def _compared(path: str, tokenizer: Tokenizer) -> str:
    try:
        theirs = Tokenizer(path)
    except UserError as error:
        logger.warning("the tokenizer cannot be compared with %s: %s", tokenizer.path, error)
        return ""
    return difference(theirs, tokenizer)


def _rows(key: str, there: int, here: int) -> str:
    """Return what a change of the vocabulary does to its tables."""
    if key != VOCABULARY:
        return ""
    return f", {here - there} rows of zeros added" if here > there else f", the last {there - here} rows dropped"


def _log(run: RunConfig, found: ModelFiles, changed: list[Difference], other: str) -> None:
    """Log what was loaded, and in what the run differs from the training of these weights."""
    kind = kind_of(found.path)
    logger.info("starting from %s: %s, %s, fingerprint %s", found.path, kind, found.dtype, fingerprint(found))
    for note in found.notes:
        logger.info("%s", note)
    for key, there, here in changed:
        logger.info("changed on purpose: %s %s -> %s%s", key, shown(there), shown(here), _rows(key, there, here))
    if other:
        logger.info("changed on purpose: %s: %s", TOKENIZER, other)
    if run.data.seq_len > found.seq_len:
        logger.warning("rows of %d tokens: the model was trained on at most %d", run.data.seq_len, found.seq_len)
    if kind == "deepspeed" and run.data.document_mask != found.document_mask:
        logger.info("data.document_mask %s -> %s", shown(found.document_mask), shown(run.data.document_mask))
