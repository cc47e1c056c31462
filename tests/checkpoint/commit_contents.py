"""Checkpoints in which every element identifies its save: ranks that hold such weights, and a check of their saves.

A save is (life, step): a run that is started again saves the same steps in another life. Files and trees are those of
DeepSpeed's ZeRO-1. Three ranks: 0 and 2 share tensor-parallel part 0, each with half of its optimizer states; rank 1
has part 1.
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
from llama_ds.checkpoint.carried import TOKENIZER
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
LARGE = ModelConfig(2048, 64, 128, 1, 4, 4, 16)  # 4 MB per checkpoint


@dataclass(frozen=True)
class Share:
    """What a rank holds: a tensor-parallel part of the weights, and a shard of its optimizer states."""

    tp_rank: int
    dp_rank: int
    dp_size: int


ONE = (Share(0, 0, 1),)
THREE = (Share(0, 0, 2), Share(1, 0, 1), Share(0, 1, 2))


@lru_cache(maxsize=4096)
def elements(model: ModelConfig, key: Key, kind: str, life: int, step: int) -> Tensor:
    """Return an unsharded tensor at a step. Every element differs from that of any other step or life.

    All elements are integers that are exact in their dtype: bf16 up to 256, fp32 up to 2^24.
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
    """The tensors of one rank, in the same memory at every step."""

    def __init__(self, model: ModelConfig, share: Share, tp: int) -> None:
        self.model, self.share, self.tp = model, share, tp
        self.weights = {key: self._part(key, WEIGHT, 0, 0) for key in weight_shapes(model)}
        total = sum(weight.numel() for weight in self.weights.values())
        length = -(-total // share.dp_size)
        self.begin = share.dp_rank * length  # start of this rank's shard in the flattened weights of the part
        self.flats = {kind: torch.zeros(min(length, total - self.begin)) for kind in (MASTER, *MOMENTS)}

    def set(self, life: int, step: int) -> None:
        """Set the tensors to their values at a step."""
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
        """Yield the tensors that the index must locate."""
        first = 0  # position of this weight in the flattened weights of the part
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
        full, dim = elements(self.model, key, kind, life, step), weight_of(key[1]).cut
        return full.clone() if dim is None else full.chunk(self.tp, dim)[self.share.tp_rank].contiguous()


def description(model: ModelConfig, shares: Sequence[Share], life: int, step: int) -> Description:
    """Return the description of a save. Every number in it follows from life and step."""
    tp = 1 + max(share.tp_rank for share in shares)
    layout = {"world": len(shares), "pp": 1, "tp": tp, "dp": max(share.dp_size for share in shares)}
    run = {"model": asdict(model), "seed": life}
    data = {"life": life, "rows": 4 * step}
    return Description(step, 128 * step, 1, "bf16", layout, run, data, optimizer_steps=step, rng={"seed": life})


class Rank:
    """One rank of a run: its tensors and its writer."""

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
        self.writer = Writer(
            attempt, rank, len(shares), lambda: {TOKENIZER: Path(tokenizer).read_bytes()} if tokenizer else {}, keep
        )

    def start(self, life: int, step: int) -> None:
        """Begin to save a step, and then overwrite the live tensors as training would."""
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
    """Begin an attempt of a run whose ranks are all in this process; return the ranks."""
    attempt = begin(folder)
    return [Rank(attempt, rank, model, shares, tokenizer, keep) for rank in range(len(shares))]


def begin(folder: str) -> SaveAttempt:
    """Begin an attempt, as rank 0 does; return it."""
    attempt = SaveAttempt(folder, new_id())
    attempt.begin()
    return attempt


def names(attempt: SaveAttempt) -> set[str]:
    """Return the names in the checkpoint folder beside the attempt's folder, which must be empty."""
    assert os.listdir(attempt.path) == []
    return set(os.listdir(attempt.folder)) - {os.path.basename(attempt.path)}


def settle(run: Sequence[Rank]) -> tuple[list[Exception | None], list[Exception | None]]:
    """Wait for a save on all ranks as training does; return each rank's error of its own files and of the commit."""
    written = [rank.writer.wait_written() for rank in run]
    return written, [rank.writer.wait_committed(abandon=any(written)) for rank in run]


def save(run: Sequence[Rank], life: int, step: int) -> None:
    """Save a step on all ranks."""
    for rank in run:
        rank.start(life, step)
    assert settle(run) == ([None] * len(run), [None] * len(run))


checked: dict[Any, tuple[int, int]] = {}  # (life, step) of checked checkpoints, by the identity of their files


def check_checkpoint(folder: str, tag: str, shares: Sequence[Share] = THREE) -> tuple[int, int]:
    """Check every element of a checkpoint; return its (life, step).

    Files that were checked before and have not been written to since are not checked again.
    """
    path = os.path.join(folder, tag)
    states = sorted((entry.name, entry.stat()) for entry in os.scandir(path)) if os.path.isdir(path) else []
    files = (tag, tuple(shares), *((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in states))
    if files not in checked:
        checked[files] = _check(path, tag, shares)
    return checked[files]


def _check(path: str, tag: str, shares: Sequence[Share]) -> tuple[int, int]:
    found = describe(path)
    check_present(path, found)
    verify(path, found, found.files)
    life, step = found.data["life"], int(tag.removeprefix("step_"))
    content, wanted = asdict(found), asdict(description(found.model, shares, life, step))
    for filled_in in ("files", "config_hash"):
        del content[filled_in], wanted[filled_in]
    assert content == json.loads(json.dumps(wanted))
    assert set(os.listdir(path)) == {*found.files, "llama_ds.json"}
    tensors = read_tensors(path, found, KINDS)
    assert list(tensors) == list(KINDS)
    for kind, spreads in tensors.items():
        for key in weight_shapes(found.model):
            is_equal = torch.equal(spreads[key].whole(), elements(found.model, key, kind, life, step))
            assert is_equal, f"{path}: {kind} of {key} is not that of step {step}"
    return life, step


def check_folder(folder: str, shares: Sequence[Share] = THREE) -> list[tuple[int, int]]:
    """Check all checkpoints that a run could resume from; return the (life, step) of each, in the order of trying."""
    return [check_checkpoint(folder, tag, shares) for tag in store.candidates(folder)]


def linked(base: Path, folder: Path) -> Path:
    """Return a copy of a folder with hard links to its files. Saves never modify files, so one check each suffices."""
    return shutil.copytree(base, folder, copy_function=os.link)
