"""Batches of prompts that are being continued: their ids, caches, and which rows still run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama_ds.model.decoder import LayerContext
from llama_ds.model.key_value_cache import KeyValueCache
from llama_ds.model.next_token import DecodePass, Draw, choose_tokens


@dataclass(frozen=True)
class Prompt:
    """The ids before a continuation, and how it is chosen."""

    number: int  # the index of its request
    ids: tuple[int, ...]
    new_tokens: int  # ids of the continuation at most
    stops: tuple[str, ...] = ()
    draw: Draw | None = None  # None: greedy
    truncated: bool = False  # whether its context lost tokens on the left, or fewer follow than asked for

    @property
    def positions(self) -> int:
        """Tokens of prompt and continuation."""
        return len(self.ids) + self.new_tokens


@dataclass
class _Row:
    prompt: Prompt
    new: list[int] = field(default_factory=list)
    ended: bool = False


Ended = Callable[[Prompt, list[int]], bool]  # whether a continuation with these ids is complete


class RunningBatch:
    """Prompts that are continued together. Rows that have ended leave it once they are half of it."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._rows = [_Row(prompt) for prompt in prompts]
        self.cache = KeyValueCache(len(prompts), max(prompt.positions for prompt in prompts))

    def next_pass(self, context: LayerContext, device: torch.device, dtype: torch.dtype, fill: int) -> DecodePass:
        """Return the pass for the next token of every row, for layers of `context` that compute in `dtype`.

        `fill` is the id behind the shorter prompts of the first pass; attention is causal, so nothing sees it.
        """
        if self.cache.empty:
            prompts = [row.prompt.ids for row in self._rows]
            tokens = max(map(len, prompts))
            ids = [[*prompt, *[fill] * (tokens - len(prompt))] for prompt in prompts]
            last = [len(prompt) - 1 for prompt in prompts]
        else:
            tokens = 1
            ids = [row.new[-1:] for row in self._rows]
            last = [0] * len(ids)
        self.cache.begin(tokens, context.rotary, device, dtype)
        draws, steps = [row.prompt.draw for row in self._rows], [len(row.new) for row in self._rows]

        def choose(logits: Tensor) -> Tensor:
            return choose_tokens(logits, draws, steps, context)

        return DecodePass(torch.tensor(ids, device=device), torch.tensor(last, device=device), self.cache, choose)

    def take(self, tokens: Sequence[int], ended: Ended) -> dict[int, list[int]]:
        """Append the next token of every row that runs; return the continuations that it ends, by request."""
        first = self.cache.empty
        self.cache.end([len(row.prompt.ids) if first else int(not row.ended) for row in self._rows])
        done = {}
        for row, token in zip(self._rows, tokens, strict=True):
            if row.ended:
                continue
            row.new.append(token)
            row.ended = len(row.new) == row.prompt.new_tokens or ended(row.prompt, row.new)
            if row.ended:
                done[row.prompt.number] = row.new
        self._compact()
        return done

    @property
    def runs(self) -> bool:
        """Whether a row has not ended."""
        return bool(self._rows)

    def _compact(self) -> None:
        running = [n for n, row in enumerate(self._rows) if not row.ended]
        if not running:
            self._rows = []
        elif 2 * len(running) <= len(self._rows):
            self.cache.keep(running)
            self._rows = [self._rows[n] for n in running]
