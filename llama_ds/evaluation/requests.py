"""Requests in ids: how a context and its continuation are tokenized, windowed and truncated, as lm-eval does it.

A request is a list of ids of which the last `scored` are predicted, each from all ids before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError

# What happened to truncated requests, in words.
TRUNCATED = "are longer than the model's rows: their contexts lost tokens on the left, or their texts end early"


@dataclass(frozen=True)
class ScoringRequest:
    """A context and the continuation whose log-likelihood is asked for; texts."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Encoded:
    """A request as ids: at most T + 1 for a model with rows of T tokens."""

    ids: tuple[int, ...]
    scored: int  # ids at the end that are predicted
    cut: int = 0  # ids that truncation removed on the left


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a continuation in nats, and whether greedy decoding would produce it."""

    log_likelihood: float
    greedy: bool
    truncated: bool = False  # whether the context lost tokens on the left


def encode(tokenizer: Tokenizer, request: ScoringRequest, seq_len: int) -> Encoded:
    """Return a request in ids, behind bos, truncated from the left to `seq_len` + 1 ids.

    White space at the end of the context counts as part of the continuation, because tokens begin with a space.

    Raises:
        UserError: nothing is predicted, or the continuation alone is longer than a row.
    """
    before = prefix(tokenizer)
    bare = request.context.rstrip()
    continuation = request.context[len(bare) :] + request.continuation
    if bare:
        context = tokenizer.encode(bare)
        whole = tokenizer.encode(bare + continuation)
    else:
        context, whole = [], tokenizer.encode(continuation)
    scored = len(whole) - len(context)
    if scored < 1:
        raise UserError(
            f"evaluation: the continuation {request.continuation!r} adds no token to its context; give a longer one"
        )
    if scored > seq_len:
        raise UserError(
            f"evaluation: a continuation of {scored} tokens is longer than a row of {seq_len}; use a rolling "
            "log-likelihood, or a model with longer rows"
        )
    # Where a token would cross the boundary, the context keeps its own ids, as in lm-eval, whose numbers are compared.
    ids = [*before, *context, *whole[len(context) :]]
    cut = max(0, len(ids) - seq_len - 1)
    return Encoded(tuple(ids[cut:]), scored, cut)


def rolling(tokenizer: Tokenizer, text: str, seq_len: int) -> list[Encoded]:
    """Return the windows that together predict every id of `text` once, the first one from bos.

    A window has `seq_len` + 1 ids. The last one predicts what remains and fills its context with ids before it.
    """
    before, ids = prefix(tokenizer), tokenizer.encode(text)
    return list(_windows([*before, *ids], seq_len))


def _windows(ids: list[int], seq_len: int) -> Iterator[Encoded]:
    done = 1  # ids that need no prediction: bos, and those of earlier windows
    while done < len(ids):
        end = min(done + seq_len, len(ids))
        yield Encoded(tuple(ids[max(0, end - seq_len - 1) : end]), end - done)
        done = end


def prefix(tokenizer: Tokenizer) -> list[int]:
    """Return the ids before a text: bos.

    Raises:
        UserError: the tokenizer has no bos, so its models never saw the beginning of a text behind a mark.
    """
    if tokenizer.bos_id is None:
        raise UserError(
            f"{tokenizer.path}: names no bos, from which the first token of a text is predicted; set bos_token in the "
            "tokenizer_config.json beside it (to the eos, if documents follow one another after it)"
        )
    return [tokenizer.bos_id]
