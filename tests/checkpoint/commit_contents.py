"""Checkpoints whose every element says which save it is of: ranks that hold such weights, and a check of their saves.

A save is (life, step): runs that were started anew save the same steps in another life. Files and trees are those of
DeepSpeed's ZeRO-1. Three ranks: 0 and 2 share tensor-parallel part 0, each with half of its optimizer; 1 has part 1.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ds.checkpoint import store
from llama_ds.checkpoint.attempt import SaveAttempt, new_id
from llama_ds.checkpoint.manifest import (
    WEIGHT,
    Description,
    check_present,
    describe,
    read_tensors,
    verify,
)
from llama_ds.checkpoint.snapshot import HostMemory, Located
from llama_ds.checkpoint.writing import Writer
from llama_ds.config.schema import ModelConfig
from llama_ds.layout.optimizer_states import ADAMW, MASTER
from llama_ds.layout.weights import Key, weight_of, weight_shapes

KINDS = (WEIGHT, *ADAMW.all_kinds())
MOMENTS = KINDS[2:]
SMALL = ModelConfig(6, 4, 6, 1, 2, 2, 2)
LARGE = ModelConfig(2048, 64, 128, 1, 4, 4, 16)  # 4 MB a checkpoint


@dataclass(frozen=True)
class Share:
    """What a rank holds: a tensor-parallel part of the weights, and a part of that one's optimizer."""

    tp_rank: int
    dp_rank: int
    dp_size: int


ONE = (Share(0, 0, 1),)
THREE = (Share(0, 0, 2), Share(1, 0, 1), Share(0, 1, 2))


@lru_cache(maxsize=4096)
def elements(model: ModelConfig, key: Key, kind: str, life: int, step: int) -> Tensor:
    """Return a whole tensor as it is at a step: no element is the same at another step, or in another life.

    All are whole numbers, exact in their dtype: bf16 up to 256, fp32 up to 2^24.
    """
    shape = weight_shapes(model)[key]
    number = list(weight_shapes(model)).index(key) * len(KINDS) + KINDS.index(kind)
    element = torch.arange(torch.Size(shape).numel())
    if kind == WEIGHT:
        values = ((element * 7 + number * 13 + step * 31 + life * 57) % 251).bfloat16()
    else:
        values = ((element * 48271 + number * 7919 + step * 104729 + life * 1299709) % 16777213).float()
    return values.view(shape)


class LiveRank:
    """The tensors of one rank, in memory that stays as it is from step to step."""

    def __init__(self, model: ModelConfig, share: Share, tp: int) -> None:
        self.model, self.share, self.tp = model, share, tp
        self.weights = {key: self._part(key, WEIGHT, 0, 0) for key in weight_shapes(model)}
        total = sum(weight.numel() for weight in self.weights.values())
        length = -(-total // share.dp_size)
        self.begin = share.dp_rank * length  # of this rank's optimizer, in all weights of the part one after the other
        self.flats = {kind: torch.zeros(min(length, total - self.begin)) for kind in (MASTER, *MOMENTS)}

    def set(self, life: int, step: int) -> None:
        """Become what the rank holds at a step."""
        for key, weight in self.weights.items():
            weight.copy_(self._part(key, WEIGHT, life, step))
        for kind, flat in self.flats.items():
            parts = torch.cat([self._part(key, kind, life, step).view(-1) for key in self.weights])
            flat.copy_(parts[self.begin : self.begin + len(flat)])

    def files(self) -> list[tuple[str, Any]]:
        """Return the state dicts that DeepSpeed would write."""
        share, moments = self.share, {kind: self.flats[kind] for kind in MOMENTS}
        optimizer = {"single_partition_of_fp32_groups": [self.flats[MASTER]], "base_optimizer_state": {0: moments}}
        module = {f"layers.{layer}.{name}": weight for (layer, name), weight in self.weights.items()}
        name = f"mp_rank_{share.tp_rank:02d}_model_states.pt"
        own = f"zero_pp_rank_{share.dp_rank}_mp_rank_{share.tp_rank:02d}_optim_states.pt"
        shared = [] if share.dp_rank else [(name, {"module": module, "dp_world_size": share.dp_size})]
        return [*shared, (own, {"optimizer_state_dict": optimizer})]

    def located(self) -> Iterator[Located]:
        """Yield the tensors that are to be found again."""
        first = 0  # element of this weight's part, among those of all weights
        for key, weight in self.weights.items():
            begin, end = max(first, self.begin), min(first + weight.numel(), self.begin + len(self.flats[MASTER]))
            if not self.share.tp_rank or weight_of(key[1]).cut is not None:
                part = self.share.tp_rank
                if not self.share.dp_rank:
                    yield Located(key, WEIGHT, part, 0, weight)
                for kind, flat in self.flats.items() if begin < end else ():
                    yield Located(key, kind, part, begin - first, flat[begin - self.begin : end - self.begin])
            first += weight.numel()

    def _part(self, key: Key, kind: str, life: int, step: int) -> Tensor:
        whole, dim = elements(self.model, key, kind, life, step), weight_of(key[1]).cut
        return whole.clone() if dim is None else whole.chunk(self.tp, dim)[self.share.tp_rank].contiguous()


def description(model: ModelConfig, shares: Sequence[Share], life: int, step: int) -> Description:
    """Return what is said of a save: every number in it follows from life and step."""
    tp = 1 + max(share.tp_rank for share in shares)
    layout = {"world": len(shares), "pp": 1, "tp": tp, "dp": max(share.dp_size for share in shares)}
    run = {"model": asdict(model), "seed": life}
    data = {"life": life, "rows": 4 * step}
    return Description(step, 128 * step, 1, "bf16", layout, run, data, optimizer_steps=step, rng={"seed": life})


class Rank:
    """One rank of a run: what it holds, and its writer."""

    def __init__(
        self,
        attempt: SaveAttempt,
        rank: int,
        model: ModelConfig,
        shares: Sequence[Share],
        tokenizer: str,
        keep: store.Retention,
    ) -> None:
        self.attempt = attempt
        self.model, self.shares = model, shares
        self.live = LiveRank(model, shares[rank], 1 + max(share.tp_rank for share in shares))
        self.memory = HostMemory()
        self.writer = Writer(attempt, rank, len(shares), tokenizer, keep)

    def start(self, life: int, step: int) -> None:
        """Begin to save a step, and go on: by the time that it is written, the live tensors are others."""
        self.live.set(life, step)
        snapshot = self.memory.take(self.live.files(), self.live.located())
        self.writer.start(description(self.model, self.shares, life, step), snapshot)
        for tensor in (*self.live.weights.values(), *self.live.flats.values()):
            tensor.fill_(-1)


def ranks(
    folder: str,
    shares: Sequence[Share] = THREE,
    tokenizer: str = "",
    keep: store.Retention = store.Retention(),  # noqa: B008 (frozen)
    model: ModelConfig = SMALL,
) -> list[Rank]:
    """Begin an attempt of a run whose ranks all live in this process; return them."""
    attempt = begin(folder)
    return [Rank(attempt, rank, model, shares, tokenizer, keep) for rank in range(len(shares))]


def begin(folder: str) -> SaveAttempt:
    """Begin an attempt, as rank 0 does."""
    attempt = SaveAttempt(folder, new_id())
    attempt.begin()
    return attempt


def names(attempt: SaveAttempt) -> set[str]:
    """Return what is in the folder of checkpoints beside the folder of the attempt, which must be empty."""
    assert os.listdir(attempt.path) == []
    return set(os.listdir(attempt.folder)) - {os.path.basename(attempt.path)}


def settle(run: Sequence[Rank]) -> tuple[list[Exception | None], list[Exception | None]]:
    """Wait for a save as training does, all ranks together; return what each says of its files, and of the commit."""
    written = [rank.writer.wait_written() for rank in run]
    return written, [rank.writer.wait_committed(abandon=any(written)) for rank in run]


def save(run: Sequence[Rank], life: int, step: int) -> None:
    """Save a step on all ranks."""
    for rank in run:
        rank.start(life, step)
    assert settle(run) == ([None] * len(run), [None] * len(run))


checked: dict[Any, tuple[int, int]] = {}  # checkpoints, by all that tells their files from others


def check_checkpoint(folder: str, tag: str, shares: Sequence[Share] = THREE) -> tuple[int, int]:
    """Check a checkpoint to its last element; return the (life, step) that it is of.

    One whose files were checked before, and have not been written to since, is known.
    """
    place = os.path.join(folder, tag)
    states = sorted((entry.name, entry.stat()) for entry in os.scandir(place)) if os.path.isdir(place) else []
    files = (tag, tuple(shares), *((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in states))
    if files not in checked:
        checked[files] = _check(place, tag, shares)
    return checked[files]


def _check(place: str, tag: str, shares: Sequence[Share]) -> tuple[int, int]:
    found = describe(place)
    check_present(place, found)
    verify(place, found, found.files)
    life, step = found.data["life"], int(tag.removeprefix("step_"))
    wanted = description(found.model, shares, life, step)
    content, said = asdict(found), asdict(wanted)
    for filled_in in ("files", "config_hash"):
        del content[filled_in], said[filled_in]
    assert content == json.loads(json.dumps(said))
    assert set(os.listdir(place)) == {*found.files, "llama_ds.json"}
    tensors = read_tensors(place, found, KINDS)
    assert list(tensors) == list(KINDS)
    for kind, spreads in tensors.items():
        for key in weight_shapes(found.model):
            is_equal = torch.equal(spreads[key].whole(), elements(found.model, key, kind, life, step))
            assert is_equal, f"{place}: {kind} of {key} is not that of step {step}"
    return life, step


def check_folder(folder: str, shares: Sequence[Share] = THREE) -> list[tuple[int, int]]:
    """Check all checkpoints that could be loaded; return the (life, step) of each, the one to load first."""
    return [check_checkpoint(folder, tag, shares) for tag in store.candidates(folder)]


def linked(base: Path, folder: Path) -> Path:
    """Return a copy of a folder with the same files: no save changes one, so that each need be checked only once."""
    return shutil.copytree(base, folder, copy_function=os.link)
