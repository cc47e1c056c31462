"""Continuations of texts by a decoder: a model in one process, or the engine of a run under its layout."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError
from llama_ds.evaluation.requests import prefix
from llama_ds.evaluation.running_batch import Ended, Prompt, RunningBatch
from llama_ds.layout.cache_memory import cache_bytes
from llama_ds.log import logger
from llama_ds.model.cached_layer import join_products
from llama_ds.model.decoder import LayerContext
from llama_ds.model.decoding_rule import GREEDY, DecodingRule
from llama_ds.model.llama import Llama
from llama_ds.model.next_token import DecodePass, Draw

ANCHOR = 8  # ids before a continuation that are decoded with it: some tokenizers drop the space of a first token
MIB = 2**20


@dataclass(frozen=True)
class GenerationRequest:
    """A text to continue."""

    context: str
    until: tuple[str, ...] = ()  # strings before which the continuation ends
    max_tokens: int = 256
    rule: DecodingRule = GREEDY
    sample: int = 0  # number of the sample; samples of one context differ by it


@dataclass(frozen=True)
class Generated:
    """A continuation: its text up to the stop string, and all its ids with those of the stop or the document's end."""

    text: str
    ids: tuple[int, ...]
    truncated: bool = False  # whether its context lost tokens on the left, or fewer follow than asked for


class Decoder(Protocol):
    """Computes next tokens. Every rank of a job calls it alike."""

    positions: int  # tokens of a prompt and its continuation at most
    rows: int  # prompts of a batch
    in_flight: int  # batches that are continued at the same time
    ranks: int  # ranks among whom the prompts are divided
    rank: int  # this one's number among them
    context: LayerContext
    dtype: torch.dtype  # dtype in which the layers compute
    device: torch.device
    layers: int  # decoder layers of this rank

    def next_tokens(self, passes: Sequence[DecodePass]) -> list[Tensor]:
        """Return the next ids (B,) of every pass. Collective under an engine."""

    def anyone(self, runs: bool) -> bool:
        """Return whether this rank continues: because it has prompts, or because those that have need its weights."""

    def gather(self, found: dict[int, list[int]]) -> dict[int, list[int]]:
        """Return the continuations of all ranks. Collective."""


Tick = Callable[[int], object]  # gets the number of requests just answered


class TextGenerator:
    """Continues texts with a decoder."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.cache_bytes = 0  # size of the largest cache so far, on this rank
        marks = tokenizer.marks
        # Either id ends a document, because the next one in the training rows begins with the first.
        self._ends = {marks.begin, marks.eos} - {None}

    def generate(self, requests: Sequence[GenerationRequest], tick: Tick = lambda count: None) -> list[Generated]:
        """Return the continuation of each request. Collective under an engine.

        Raises:
            UserError: the tokenizer has no bos, or a request asks for no token.
        """
        prompts = [self._prompt(number, request) for number, request in enumerate(requests)]
        found = self._continued(prompts, tick)
        return [self._generated(prompt, found[prompt.number]) for prompt in prompts]

    def text(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """Return the text that the ids `new` add behind those of `prompt`."""
        before = list(prompt[-ANCHOR:])
        whole, known = self.tokenizer.decode([*before, *new]), self.tokenizer.decode(before)
        return whole[len(known) :] if whole.startswith(known) else self.tokenizer.decode(list(new))

    def _prompt(self, number: int, request: GenerationRequest) -> Prompt:
        if request.max_tokens < 1:
            raise UserError(f"generation: max_tokens = {request.max_tokens}: a continuation has 1 token or more")
        ids = [*prefix(self.tokenizer), *self.tokenizer.encode(request.context)]
        positions = self.decoder.positions
        new = min(request.max_tokens, max(positions // 2, positions - len(ids)))
        cut = max(0, len(ids) + new - positions)
        kept = tuple(ids[cut:])
        draw = Draw(request.rule, kept, request.sample) if request.rule.temperature > 0 else None
        return Prompt(number, kept, new, request.until, draw, truncated=cut > 0 or new < request.max_tokens)

    def _generated(self, prompt: Prompt, new: list[int]) -> Generated:
        ids = new[:-1] if new[-1] in self._ends else new
        return Generated(cut_at(self.text(prompt.ids, ids), prompt.stops), tuple(new), prompt.truncated)

    def _ended(self, prompt: Prompt, new: list[int]) -> bool:
        if new[-1] in self._ends:
            return True
        if not prompt.stops:
            return False
        text = self.text(prompt.ids, new)
        return any(stop in text for stop in prompt.stops)

    def _continued(self, prompts: Sequence[Prompt], tick: Tick) -> dict[int, list[int]]:
        """Return the ids of all continuations by request."""
        decoder = self.decoder
        ordered = sorted(prompts, key=lambda prompt: (-prompt.positions, prompt.number))  # the largest cache first
        if ordered:
            self._say(ordered)
        own = ordered[decoder.rank :: decoder.ranks]
        waiting: deque[Sequence[Prompt]] = deque(
            own[start : start + decoder.rows] for start in range(0, len(own), decoder.rows)
        )
        return decoder.gather(decode(decoder, waiting, self._ended, self.tokenizer.marks.eos, tick))

    def _say(self, ordered: Sequence[Prompt]) -> None:
        decoder = self.decoder
        share = -(-len(ordered) // decoder.ranks)
        rows = min(share, decoder.rows * decoder.in_flight)
        size = cache_bytes(
            decoder.context.model,
            decoder.layers,
            rows,
            ordered[0].positions,
            decoder.context.tp.size,
            decoder.dtype.itemsize,
        )
        self.cache_bytes = max(self.cache_bytes, size)
        logger.info(
            "generation: %d prompts; a cache of %.1f MiB on this rank for %d rows of up to %d tokens",
            len(ordered), size / MIB, rows, ordered[0].positions,
        )  # fmt: skip


def decode(
    decoder: Decoder, waiting: deque[Sequence[Prompt]], ended: Ended, fill: int, tick: Tick = lambda count: None
) -> dict[int, list[int]]:
    """Return the continuations of this rank's batches by request; `ended` tells whether one is complete. Collective."""
    running: list[RunningBatch] = []
    found: dict[int, list[int]] = {}
    while decoder.anyone(bool(waiting or running)):
        while waiting and len(running) < decoder.in_flight:
            running.append(RunningBatch(waiting.popleft()))
        # Without prompts of its own a rank computes a token that nobody reads.
        batches = running or [RunningBatch([Prompt(-1, (fill,), 1)])]
        with decoder.context.whole_rows():  # positions are those of whole rows
            passes = [batch.next_pass(decoder.context, decoder.device, decoder.dtype, fill) for batch in batches]
        tokens = decoder.next_tokens(passes)
        for batch, chosen in zip(running, tokens, strict=False):
            done = batch.take(chosen.tolist(), ended)
            found |= done
            tick(len(done))
        running = [batch for batch in running if batch.runs]
    return found


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of the stop strings in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def position_limit(context: LayerContext) -> int:
    """Return the number of tokens up to which cached keys stay right.

    Under `dynamic` scaling the frequencies change with the length of a row once it exceeds the original one.
    """
    scaling = context.model.rope_scaling
    limit = context.rotary.seq_len
    if scaling is not None and scaling.rope_type == "dynamic" and scaling.original_max_position_embeddings:
        return min(limit, scaling.original_max_position_embeddings)
    return limit


class ModelDecoder:
    """A model on one device, without an engine."""

    in_flight, ranks, rank = 1, 1, 0

    def __init__(self, model: Llama, rows: int) -> None:
        weight = next(model.parameters())
        self.model, self.rows, self.context = model, rows, model.context
        self.positions = position_limit(model.context)
        self.dtype, self.device = weight.dtype, weight.device
        self.layers = model.context.model.num_hidden_layers
        join_products(model)

    @torch.no_grad()
    def next_tokens(self, passes: Sequence[DecodePass]) -> list[Tensor]:
        found = []
        for one in passes:
            with self.context.caches.using(one.cache):
                found.append(one.choose(self.model(one.ids, None, one.last)))
        return found

    def anyone(self, runs: bool) -> bool:
        return runs

    def gather(self, found: dict[int, list[int]]) -> dict[int, list[int]]:
        return found
