"""Checkpoints in the memory of hosts: a restarted job loses a step, not those since the last save on disk.

Every `checkpoint.memory_interval` steps each rank copies its masters and moments into a file in its host's memory, and
a thread sends them to the rank's peer on another host (`layout/peers.py`). When the job restarts under the same layout,
each rank takes its state from its own host, else from the host that has the copy. If a copy is missing, damaged or not
finite, or if the run or its layout has changed, the job resumes from the checkpoints on disk.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llama_ds.checkpoint.manifest import Description, description_from, write_durably
from llama_ds.config.reader import ConfigSource
from llama_ds.config.run_file import resolved
from llama_ds.config.schema import RunConfig
from llama_ds.errors import Corruption, UserError
from llama_ds.job.memory_link import Address, MemoryServer, get, put
from llama_ds.job.memory_slots import (
    HEADER_BYTES,
    STATES,
    MemorySlot,
    oldest,
    open_slots,
    remove,
    whole_slots,
)
from llama_ds.layout.optimizer_states import states_of
from llama_ds.layout.peers import peer_ranks
from llama_ds.log import logger
from llama_ds.parallel import world
from llama_ds.parallel.first_rank import own_address
from llama_ds.parallel.optimizer_state import begin_moments, set_counts, spread_masters
from llama_ds.parallel.pipeline_optimizer import PipelineOptimizer
from llama_ds.training import memory_state
from llama_ds.training.checkpoints import Checkpoints
from llama_ds.training.memory_folder import MemoryFolder

# A file in the run's folder, changed by each start that does not go on from memory. States in memory with another id
# are of a deleted run of its name, or of steps that the run has taken again since, from a checkpoint on disk.
ID = "memory.id"


@dataclass(frozen=True)
class _Copy:
    """A rank's state in the memory of a host."""

    rank: int
    step: int
    host: str
    nbytes: int  # bytes of its payload
    history: str  # id of the start whose steps led to it, and of those that went on from its states in memory


class MemoryCheckpoints:
    """One rank's part of the checkpoints in memory. With an interval of 0 every method does nothing."""

    def __init__(self, run: RunConfig, checkpoints: Checkpoints, hosts: list[str], device: torch.device) -> None:
        """Begin to serve other ranks; `run` is as the user gave it, `hosts` are those of all ranks. Collective."""
        self.run, self._checkpoints, self._device = run, checkpoints, device
        layout, rank_info = checkpoints.layout, checkpoints.rank_info
        self.found: Description | None = None  # the state that `find` has brought to this host
        self._every = run.checkpoint.memory_interval if run.checkpoint.save else 0
        self._slots: list[MemorySlot] = []  # all that this rank writes to
        if not self._every:
            return
        self._rank, self._hosts = rank_info.rank, hosts
        self._local = [rank for rank, host in enumerate(hosts) if host == hosts[self._rank]]
        self._folder = MemoryFolder(run, hosts[self._rank])
        self._id_path = Path(run.run_dir, ID)
        found = self._id_path.read_text() if self._rank == 0 and self._id_path.exists() else ""
        token, self._history, run_id = world.gather((secrets.token_hex(32), secrets.token_hex(8), found))[0]
        self._token = bytes.fromhex(token)
        about = {key: value for key, value in resolved(run).items() if key not in ("path", "deepspeed_path")}
        self._about_run = {"run": about, "layout": layout.as_data(), "dtype": checkpoints.dtype}
        self._identity = self._identity_with(run_id) if run_id else ""  # "": no state in memory can be of this run
        self._server = MemoryServer(own_address(), self._token)
        self._addresses: list[Address] = world.gather(self._server.address)
        self._peers = peer_ranks(layout, hosts)
        self._own: list[MemorySlot] = []
        self._restored: MemorySlot | None = None
        self._thread: threading.Thread | None = None
        self._without_copy = False  # whether the last state has no copy on another host

    def find(self, disk_step: int) -> Description | None:
        """Bring the newest state of all ranks that is whole into this host's memory, and describe it. Collective.

        Args:
            disk_step: step of the newest checkpoint on disk, 0 without one. Only a later state is of use.
        """
        if not self._every or not self._identity or self.run.checkpoint.resume == "never":
            return None
        with_header: dict[tuple[int, int], MemorySlot] = {}

        def listed() -> list[_Copy]:
            self._folder.check_owner()
            with_header.update({(rank, slot.step): slot for rank, slot in self._usable()})
            self._server.offer(with_header)
            return self._listed(with_header)

        copies = {copy for one in world.gather_results(listed) for copy in one}
        steps = sorted({copy.step for copy in copies if copy.step > disk_step}, reverse=True)
        for step in steps:
            while chosen := self._chosen(copies, step):
                bad = self._verify(chosen, with_header) or self._fetch(chosen, with_header)
                if not bad:
                    self.found = self._describe(chosen, disk_step)
                    return self.found
                for copy, problem in bad.items():
                    logger.warning(
                        "MEMORY CHECKPOINT: the state of rank %d after step %d on %s is not used: %s",
                        *(copy.rank, copy.step, copy.host, problem),
                    )
                copies -= bad.keys()
        if steps:
            logger.warning("MEMORY CHECKPOINT: no step after %d is whole in memory; resuming from the disk", disk_step)
        return None

    def load(self, engine: Any) -> int:
        """Load the state that `find` has brought here; return its step. Collective."""
        assert self._restored and self.found
        found, slot = self.found, self._restored
        taken = found.optimizer_steps or 0
        begin_moments(engine, taken, found.states)

        def read() -> None:
            if not memory_state.read(engine, slot):
                raise UserError(
                    f"{slot.path}: holds other weights than this rank; delete {slot.path.parent.parent} on every host"
                )

        world.together(read)
        spread_masters(engine)
        set_counts(engine, found.step, taken)
        return found.step

    def begin(self, engine: Any, first: int) -> None:
        """Take the memory for this rank's states, and for the copies that it keeps; `first` steps are done. Collective.

        Raises:
            UserError: on all ranks alike: a host has too little memory.
        """
        if not self._every:
            return
        kept = [rank for rank, peer in enumerate(self._peers or ()) if peer == self._rank]

        def about() -> tuple[str, int, list[int]]:
            run_id = self._marked() if self._rank == 0 else ""
            return run_id, memory_state.payload_bytes(engine, states_of(self.run.optimizer)), [self._rank, *kept]

        run_ids, sizes, every = zip(*world.gather_results(about), strict=True)
        self._identity = self._identity_with(run_ids[0])
        taken = {rank: len(STATES) * (HEADER_BYTES + size) for rank, size in enumerate(sizes)}
        here = {rank for other in self._local for rank in every[other]}

        needed = sum(taken[rank] for rank in here)
        first_here = self._rank == self._local[0]
        world.together(lambda: self._folder.prepare(here, needed) if first_here else None)

        def take() -> None:
            try:
                self._own = open_slots(self._folder.path, self._rank, sizes[self._rank])
                copies = {rank: open_slots(self._folder.path, rank, sizes[rank]) for rank in kept}
            except OSError as error:
                raise self._folder.too_little(str(error), here) from None
            self._slots = [slot for slots in (self._own, *copies.values()) for slot in slots]
            for slot in self._slots:
                if slot.step > first or not self._is_usable(slot):
                    slot.clear()
            self._server.keep(copies)

        world.together(take)
        if self._restored and self._peers:  # another peer, or one that has not received this state
            self._start(self._restored, lambda: None)
        logger.info(
            "memory checkpoints every %d steps in %s, %.3g GiB on this host, %s",
            *(self._every, self._folder.path.parent, needed / 2**30),
            "with a copy of each rank's on another" if self._peers else "without copies, because there is no other",
        )

    def after_step(self, engine: Any, done: int, data: Callable[[], dict[str, Any]]) -> None:
        """Copy this rank's state into memory, if it is time to, and let a thread send it to the peer.

        It first waits for the transfer of the state before, and for this step: else a fast rank would overwrite the
        only state that a slow one has, too. Not collective. `data` returns the state of the data.
        """
        if not self._every or done % self._every or not memory_state.has_moments(engine):
            return
        if isinstance(engine.optimizer, PipelineOptimizer):
            engine.optimizer.settle()
        self._wait()
        world.finish(self._device)
        slot = oldest(self._own)
        slot.clear()
        about, ready = memory_state.write(engine, slot.payload)
        description = asdict(self._checkpoints.description(done, data()))
        header = {"step": done, "identity": self._identity, "history": self._history, "description": description}
        header |= about

        def complete() -> None:
            if ready is not None:
                ready.synchronize()
            slot.complete(header | {"checksum": slot.checksum()})

        self._start(slot, complete)

    @contextmanager
    def trusted(self) -> Iterator[None]:
        """Forget the states that were copied since the last comparison if what they were copied from is wrong."""
        try:
            yield
        except Corruption as error:
            if self._every:  # the error is raised on all ranks alike
                self._wait()
                self._forget_after(error.good_step)  # before the barrier, which fails if another rank dies now
                world.barrier()
                self._forget_after(error.good_step)  # with the copies that were still on their way here
                world.barrier()  # once one of them reports the error, all may be killed
            raise

    def close(self, ended: bool) -> None:
        """Wait for transfers and stop serving; with `ended` free the memory. Collective."""
        if not self._every:
            return
        self._wait()
        world.barrier()
        self._server.close()
        if ended and self._rank == self._local[0]:
            remove(self._folder.path)

    def abandon(self) -> None:
        """End the transfers, whose connections are broken, and stop serving."""
        if self._every:
            self._wait()
            self._server.close()

    def _start(self, slot: MemorySlot, complete: Callable[[], None]) -> None:
        """Let a thread complete a state and send it to the peer, if there is one."""

        def run() -> None:
            complete()
            if self._peers:
                self._send(slot, self._peers[self._rank])

        self._thread = threading.Thread(target=run, name="memory checkpoint", daemon=True)
        self._thread.start()

    def _send(self, slot: MemorySlot, peer: int) -> None:
        try:
            put(self._addresses[peer], self._token, self._rank, slot, self.run.checkpoint.memory_rate)
            self._without_copy = False
        except OSError as error:
            if not self._without_copy:
                logger.error(  # the log of a rank other than the first shows nothing less
                    "MEMORY CHECKPOINT: the state of rank %d has no copy on %s since step %d: %s",
                    *(self._rank, self._hosts[peer], slot.step, error),
                )
            self._without_copy = True

    def _forget_after(self, step: int) -> None:
        for slot in self._slots:
            if slot.step > step:
                slot.clear()

    def _wait(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def _identity_with(self, run_id: str) -> str:
        text = json.dumps({**self._about_run, "id": run_id}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _is_usable(self, slot: MemorySlot) -> bool:
        header = slot.header
        return header is not None and header.get("identity") == self._identity

    def _usable(self) -> Iterator[tuple[int, MemorySlot]]:
        """Yield the states of this run and layout in the memory of this host, by rank."""
        others = 0
        for rank, slot in whole_slots(self._folder.path):
            if self._is_usable(slot):
                yield rank, slot
            else:
                others += 1
        if others:
            logger.info("MEMORY CHECKPOINT: %d states of another run file, override or layout are not used", others)

    def _listed(self, here: dict[tuple[int, int], MemorySlot]) -> list[_Copy]:
        """Return the copies on this host; one rank of each host lists them."""
        if self._rank != self._local[0]:
            return []
        host = self._hosts[self._rank]
        return [
            _Copy(rank, step, host, len(slot.payload), header["history"])
            for (rank, step), slot in here.items()
            if (header := slot.header)
        ]

    def _chosen(self, copies: set[_Copy], step: int) -> list[_Copy] | None:
        """Return the copy of each rank's state to use, if every rank has one, those on the rank's host first."""
        of_step = sorted((copy for copy in copies if copy.step == step), key=lambda copy: copy.host)
        for history in sorted({copy.history for copy in of_step}):
            found: dict[int, _Copy] = {}
            for copy in of_step:
                if copy.history == history and (copy.rank not in found or copy.host == self._hosts[copy.rank]):
                    found[copy.rank] = copy
            if len(found) == len(self._hosts):
                return [found[rank] for rank in sorted(found)]
        return None

    def _verify(self, chosen: list[_Copy], here: dict[tuple[int, int], MemorySlot]) -> dict[_Copy, str]:
        """Return what is wrong with the chosen states, each of which a rank on its host reads. Collective."""
        mine = [copy for copy in chosen if copy.host == self._hosts[self._rank]]
        place, ranks = self._local.index(self._rank), len(self._local)
        problems = {copy: memory_state.problem(here[copy.rank, copy.step]) for copy in mine[place::ranks]}
        return {copy: text for one in world.gather(problems) for copy, text in one.items() if text}

    def _fetch(self, chosen: list[_Copy], here: dict[tuple[int, int], MemorySlot]) -> dict[_Copy, str]:
        """Bring this rank's state here; return which could not be brought, and why. Collective."""
        copy = chosen[self._rank]
        problem = ""
        if copy.host == self._hosts[self._rank]:
            self._restored = here[copy.rank, copy.step]
        else:
            holders = [rank for rank, host in enumerate(self._hosts) if host == copy.host]
            address = self._addresses[holders[self._rank % len(holders)]]
            try:
                self._folder.make()
                self._restored = oldest(open_slots(self._folder.path, self._rank, copy.nbytes))
                get(address, self._token, copy.rank, copy.step, self._restored)
            except (OSError, UserError) as error:
                problem = f"it could not be brought to {self._hosts[self._rank]} ({error})"
        return {copy: text for copy, text in zip(chosen, world.gather(problem), strict=True) if text}

    def _describe(self, chosen: list[_Copy], disk_step: int) -> Description:
        assert self._restored
        header = self._restored.header
        assert header
        moved = [f"{copy.rank} from {copy.host}" for copy in chosen if copy.host != self._hosts[copy.rank]]
        logger.info(
            "MEMORY CHECKPOINT: step %d is in the memory of the hosts, the disk has step %d; %d of %d ranks have their "
            "state on their own host%s",
            *(chosen[0].step, disk_step, len(chosen) - len(moved), len(chosen)),
            f"; copies of other hosts: rank {', '.join(moved)}" if moved else "",
        )
        self._history = header["history"]
        found = description_from(header["description"], ConfigSource(str(self._restored.path)))
        return replace(found, optimizer_steps=memory_state.step_count(self._restored))

    def _marked(self) -> str:
        """Return the id: a new one unless this start goes on from memory. Later states of lost hosts lead elsewhere."""
        if not self.found:
            try:
                write_durably(str(self._id_path), secrets.token_hex(16))
            except OSError as error:
                raise UserError(
                    f"{self._id_path}: cannot be written ({error.strerror}); make the run's folder writable"
                ) from None
        return self._id_path.read_text()
