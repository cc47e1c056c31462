"""Flips a bit of what a run stores or sends, and asks the code that reads it whether it is intact."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llama_ds.benchmarks.flips.request import Flip
from llama_ds.checkpoint.damage import damaged_files
from llama_ds.checkpoint.manifest import describe
from llama_ds.config.schema import RunConfig
from llama_ds.job import memory_link
from llama_ds.job.memory_link import MemoryServer, put
from llama_ds.job.memory_slots import open_slots
from llama_ds.layout.layout import Layout
from llama_ds.layout.optimizer_states import states_of
from llama_ds.parallel.world import RankInfo
from llama_ds.training import memory_state
from llama_ds.training.checkpoints import Checkpoints

TOKEN = b"flips"


class StoredStates:
    """A rank's state in memory and a checkpoint of the run on disk."""

    def __init__(self, run: RunConfig, layout: Layout, engine: Any, rank: int, ranks: int, folder: Path) -> None:
        """Collective; the optimizer has moments."""
        checkpoints = Checkpoints(run, layout, "bf16", RankInfo(rank, ranks, rank))
        checkpoints.begin()
        checkpoints.save(engine, 1, {"segments": []})
        checkpoints.close()
        self._checkpoint = os.path.join(checkpoints.folder, "step_00000001")
        slots = folder / f"slots{rank}"
        slots.mkdir()
        size = memory_state.payload_bytes(engine, states_of(run.optimizer))
        self._slot, *_ = open_slots(slots, rank, size)
        about, _ = memory_state.write(engine, self._slot.payload)
        self._slot.complete({"step": 1, "checksum": self._slot.checksum(), **about})
        self._server = MemoryServer("127.0.0.1", TOKEN)
        (slots / "copies").mkdir()
        self._server.keep({rank: open_slots(slots / "copies", rank, size)})
        self._rank = rank

    def trial(self, flip: Flip) -> str:
        """Flip a bit of a state in memory, in a transfer, or of a file; return why it is refused, "" if it is not."""
        if flip.site == "checkpoint file":
            return self._in_file(flip)
        if flip.site == "state in memory":
            _flip_byte(self._slot.payload, flip)
            found = memory_state.problem(self._slot)
            _flip_byte(self._slot.payload, flip)
            return found
        try:
            with damaged_transfer(flip):
                put(self._server.address, TOKEN, self._rank, self._slot)
        except OSError as error:
            return str(error)
        return ""

    def _in_file(self, flip: Flip) -> str:
        found = describe(self._checkpoint)
        names = sorted(found.files)
        name = names[int(flip.layer * len(names))]
        path = Path(self._checkpoint, name)
        intact = path.read_bytes()
        content = bytearray(intact)
        if not content:
            raise AssertionError(f"{path} is empty")
        _flip_byte(memoryview(content), flip)
        path.write_bytes(content)
        problems = damaged_files(self._checkpoint, found, [name])
        path.write_bytes(intact)
        return problems.get(name, "")


@contextmanager
def damaged_transfer(flip: Flip) -> Iterator[None]:
    """Flip a bit of every state that this process sends inside."""
    send = memory_link._send_all

    def damaged(connection: Any, payload: memoryview, mib_per_s: float = 0.0) -> None:
        sent = bytearray(payload)
        _flip_byte(memoryview(sent), flip)
        send(connection, memoryview(sent), mib_per_s)

    with patch.object(memory_link, "_send_all", damaged):
        yield


def _flip_byte(content: memoryview, flip: Flip) -> None:
    content[int(flip.element * len(content))] ^= 1 << flip.bit % 8
