"""The checkpoints of a run: choosing one to resume from, loading, and saving in the background, for all ranks alike."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from llama_ds.checkpoint import store
from llama_ds.checkpoint.attempt import SaveAttempt, new_id
from llama_ds.checkpoint.carried import Carried
from llama_ds.checkpoint.damage import damaged_files, missing_files, needed_to_resume
from llama_ds.checkpoint.manifest import DESCRIPTION, INDEX, WEIGHT, Description, describe, read_tensors
from llama_ds.checkpoint.snapshot import HostMemory, Located, Snapshot
from llama_ds.checkpoint.weights import Readable
from llama_ds.checkpoint.writing import Abandoned, Writer
from llama_ds.config.batch_stages import tokens_before
from llama_ds.config.document_marks import LLAMA_MARKS, DocumentMarks
from llama_ds.config.rules import NONFINITE
from llama_ds.config.run_file import resolved
from llama_ds.config.schema import RunConfig
from llama_ds.data.text.tokenizer import tokenizer_files
from llama_ds.errors import UserError
from llama_ds.layout.layout import Layout
from llama_ds.layout.optimizer_states import MASTER, states_of
from llama_ds.layout.weights import Key, key_of, weight_of
from llama_ds.log import logger
from llama_ds.model.products import PlainProducts, Products
from llama_ds.parallel import world
from llama_ds.parallel.optimizer_state import adam_steps, begin_moments, fragments, set_counts, spread_masters
from llama_ds.parallel.state_files import state_files
from llama_ds.training.reading import check_finite, read_part
from llama_ds.training.rewind import Choice, choice, rewinds

NOTHING = Carried()
DRAIN_S = 60.0  # grace period for an in-flight save when a rank fails
SHARED_S = 10.0  # time for a file written by another host to become visible


class Checkpoints:
    """One rank's view of the checkpoints of a run."""

    def __init__(self, run: RunConfig, layout: Layout, dtype: str, rank_info: world.RankInfo) -> None:
        """Agree with the other ranks on the attempt's identity. Collective."""
        self.run, self.layout, self.dtype, self.rank_info = run, layout, dtype, rank_info
        self.folder = os.path.join(run.run_dir, "checkpoints")
        keep = store.Retention(run.checkpoint.keep_last, run.checkpoint.keep_every)
        self._attempt = SaveAttempt(self.folder, world.gather(new_id())[0])
        self._writer = Writer(self._attempt, rank_info.rank, rank_info.world, self._copies, keep)
        self.products: Products = PlainProducts()  # those of the engine that is saved and loaded
        self._marks, self._hf_config = LLAMA_MARKS, dict[str, Any]()
        self._carried: dict[str, bytes] = {}  # files of the model that the run started from
        self._memory = HostMemory()
        self._step = 0  # step of the save in flight
        self._announced, self._stalled_s = 0, 0.0  # last step reported as saved; seconds that training waited for it
        self._news: list[str] = []
        self._lost = ""  # why the last save failed
        self._seen: Choice | None = None  # content of the folder when a checkpoint was chosen
        self._chosen: tuple[str, Description] | None = None
        self._damaged: list[str] = []  # tags skipped as damaged
        self._rewinds: list[dict[str, int]] = []  # rewinds of this run so far

    def choose(self) -> tuple[str, Description] | None:
        """Return tag and description of the newest intact checkpoint to resume from, if any. Collective.

        Each rank reads a share of its files and verifies their checksums. A damaged checkpoint is reported and skipped,
        unless a resume reads none of the damaged files. The folder does not change before `begin`.

        Raises:
            UserError: it belongs to another run, or `checkpoint.resume` or `checkpoint.strict` forbids using it.
        """
        settings = self.run.checkpoint
        self._seen = world.gather(choice(self.folder, self.run) if self.rank_info.rank == 0 else Choice([], []))[0]
        tags, aside = self._seen.tags, self._seen.aside
        if aside and not tags:
            raise UserError(
                f"{self.folder}: no checkpoint at or before checkpoint.rewind_to = {settings.rewind_to}, the first is "
                f"{aside[-1]}; go back to a later step, or move the folder away to start anew"
            )
        if tags and settings.resume == "never":
            raise UserError(
                f"{self.folder}: holds checkpoints of an earlier run and checkpoint.resume = never; "
                "choose another name, move the folder away, or set checkpoint.resume=auto"
            )
        self._chosen, self._damaged = None, []
        for tag in tags:
            found, problem, unread = self._examine(tag)
            if problem is None:
                assert found
                if unread and settings.strict:
                    raise UserError(
                        f"{unread[0]} (checkpoint.strict: without it the run would resume without this file)"
                    )
                for text in unread:
                    logger.warning("DAMAGED FILE, which a resume does not read: %s", text)
                # All ranks have read the same description, so all of them raise or none does.
                store.check_resumable(os.path.join(self.folder, tag), found, resolved(self.run))
                self._rewinds = rewinds(self.run, found)
                self._chosen = tag, found
                return self._chosen
            if settings.strict:
                raise UserError(f"{problem} (checkpoint.strict: without it the newest intact one would be used)")
            logger.warning("DAMAGED CHECKPOINT: %s", problem)
            self._damaged.append(tag)
        if self._damaged:
            raise UserError(
                f"{self.folder}: none of its {len(self._damaged)} checkpoints is intact; copy them again, or move the "
                f"folder away to start anew ({problem})"
            )
        if settings.resume == "must":
            raise UserError(f"{self.folder}: no checkpoint to resume from (checkpoint.resume = must); set it to auto")
        self._rewinds = rewinds(self.run, None)
        return None

    def adopt(self, found: Description) -> None:
        """Continue from a state that is newer than any checkpoint here, instead of `choose`."""
        self._rewinds = rewinds(self.run, found)

    def _examine(self, tag: str) -> tuple[Description | None, str | None, list[str]]:
        """Examine a checkpoint. Collective.

        Returns:
            Its description, the first problem found by any rank that prevents a resume, and the problems of files that
            a resume does not read.
        """
        folder, found, problems = os.path.join(self.folder, tag), None, {}
        try:
            found = describe(folder)
        except UserError as error:
            problems = {DESCRIPTION: str(error)}
        else:
            rank, ranks = self.rank_info.rank, self.rank_info.world
            problems = damaged_files(folder, found, [n for n, file in found.files.items() if file.rank % ranks == rank])
            if self.rank_info.local_rank == 0:  # once per host: each call stats all files on the shared file system
                problems |= missing_files(folder, found)
        every: dict[str, str] = {}
        for one in world.gather(problems):
            every = {**one, **every}
        needed = world.gather(self._needed(folder, found, every))[0] if every else set()
        unread = [text for name, text in every.items() if name not in needed]
        return found, next((text for name, text in every.items() if name in needed), None), unread

    def _needed(self, folder: str, found: Description | None, damaged: Mapping[str, str]) -> set[str]:
        """Return the damaged files that a resume reads; all of them if the checkpoint does not tell."""
        if found is None or INDEX in damaged:
            return set(damaged)
        try:
            return needed_to_resume(folder, found)
        except UserError:
            return set(damaged)

    def begin(self, marks: DocumentMarks = LLAMA_MARKS, carried: Carried = NOTHING) -> None:
        """End all earlier attempts, whose processes may still run; set damaged checkpoints aside. Collective.

        Call it before the first save, once data and engine have accepted the checkpoint, so that a wrong command
        changes nothing. A run with `checkpoint.save` off leaves the folder unchanged. `marks` are the tokenizer's;
        `carried` goes into every checkpoint of the run.

        Raises:
            UserError: the folder cannot be written or is not shared by all hosts, or another attempt is using it.
        """
        self._marks, self._hf_config = marks, dict(carried.hf_config)
        if self.run.checkpoint.save:
            self._carried = carried.files() if self.rank_info.rank == 0 else {}
            world.together(lambda: self._begin() if self.rank_info.rank == 0 else None)
            world.together(self._find)

    def _copies(self) -> dict[str, bytes]:
        """Return the files beside the weights: the tokenizer's, unless a carried one is the same, and those carried."""
        carried = self._carried
        own = tokenizer_files(self.run.data.tokenizer)
        return {name: content for name, content in own.items() if content not in carried.values()} | carried

    def _begin(self) -> None:
        self._check_unchanged()
        for name in self._attempt.begin():
            logger.info("removed %s/%s, which was never finished", self.folder, name)
        self._check_unchanged()  # again: an earlier attempt may have committed until `begin` ended it
        aside = self._seen.aside if self._seen else []
        try:
            for tag in self._damaged:
                logger.warning("%s is now %s", tag, self._attempt.set_aside_damaged(tag))
            if self._damaged and self._chosen and not aside:
                self._attempt.point_to(self._chosen[0])
        except OSError as error:
            logger.warning("%s: damaged checkpoints cannot be set aside (%s)", self.folder, error)
        if self._chosen and aside:
            self._go_back(self._chosen[0], aside)

    def _check_unchanged(self) -> None:
        """Check that the checkpoints have not changed since `choose`, if it was called."""
        if self._seen is None:
            return
        unchanged = choice(self.folder, self.run) == self._seen
        if self._chosen:
            unchanged = unchanged and describe(os.path.join(self.folder, self._chosen[0])) == self._chosen[1]
        if not unchanged:
            raise UserError(
                f"{self.folder}: another start of this run has changed its checkpoints while this one was starting; "
                "let only one of them run, and start it again"
            )

    def _go_back(self, tag: str, aside: list[str]) -> None:
        try:
            self._attempt.go_back(tag, aside)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be set back to {tag} ({error}); make it writable") from None
        logger.warning("REWOUND to %s: set aside as %s: %s", tag, store.REWOUND, ", ".join(aside))

    def _find(self) -> None:
        deadline = time.monotonic() + SHARED_S
        while not os.path.exists(self._attempt.path):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.folder}: rank {self.rank_info.rank} on host {socket.gethostname()} does not see what rank "
                    "0 wrote there; set output_dir to a folder that all hosts share"
                )
            with suppress(OSError):
                os.listdir(self.folder)  # refreshes a network file system's cache of absent names
            time.sleep(0.05)

    def load(self, engine: Any, tag: str, found: Description) -> int:
        """Load a checkpoint written by any layout, and return its step. Collective.

        Each rank reads only the elements that it holds.
        """
        folder = os.path.join(self.folder, tag)
        kinds = world.together(lambda: read_tensors(folder, found, found.states.all_kinds()))
        begin_moments(engine, found.optimizer_steps or 0, states_of(self.run.optimizer))
        self._fill(engine, kinds)
        set_counts(engine, found.step, found.optimizer_steps or 0)
        self.products.load(found.fp8_history, world.device())
        return found.step

    def start_from(self, engine: Any, weights: Mapping[Key, Readable]) -> None:
        """Initialize a run with the weights of a model. Collective.

        Raises:
            UserError: a weight is NaN or infinite, and the run does not allow it.
        """
        self._fill(engine, {MASTER: weights}, check=NONFINITE not in self.run.checkpoint.start_from_changes)

    def _fill(self, engine: Any, kinds: Mapping[str, Mapping[Key, Readable]], check: bool = False) -> None:
        def fill() -> None:
            for fragment in fragments(engine):
                key = key_of(fragment.name)
                rank, size = self._part(engine, key)
                for kind, target in fragment.tensors.items():
                    if kind in kinds:
                        read_part(kinds[kind][key], target, rank, size, fragment.start)
                        if check:
                            check_finite(self.run.checkpoint.start_from, key, target)

        world.together(fill)
        spread_masters(engine)

    def save(self, engine: Any, step: int, data: Mapping[str, Any]) -> None:
        """Begin to save `step`, and return as soon as everything is copied to host memory. Collective.

        It first waits for a save that is still in flight.
        """
        self.settle()
        begin = time.monotonic()
        snapshot = self.snapshot(engine, step)
        self._writer.start(replace(self.description(step, data), optimizer_steps=adam_steps(engine)), snapshot)
        self._step, self._stalled_s = step, time.monotonic() - begin
        if not self.run.checkpoint.asynchronous:
            self.settle()

    def description(self, step: int, data: Mapping[str, Any]) -> Description:
        """Return the description of the state after `step`, without the optimizer's count of steps."""
        return Description(
            step=step,
            tokens=tokens_before(self.run, step),
            zero_stage=self.run.zero_stage,
            dtype=self.dtype,
            layout=self.layout.as_data(),
            run=resolved(self.run),
            data=dict(data),
            rng={"seed": self.run.seed},
            rewinds=self._rewinds,
            bos_id=self._marks.bos,
            eos_id=self._marks.eos,
            hf_config=self._hf_config,
            fp8_history=self.products.state(),
        )

    def snapshot(self, engine: Any, step: int) -> Snapshot:
        """Copy this rank's share of a checkpoint to host memory, reusing the memory of the last one. Collective."""
        tied = self.run.model.tie_word_embeddings and self.layout.pp > 1
        files = state_files(engine, store.tag_of(step), self.run.model, tied)
        return self._memory.take(files, self._located(engine))

    def settle(self) -> None:
        """Wait for the save in flight, if any, and agree on whether it succeeded. Collective.

        Raises:
            UserError: it failed because another start of the run has begun, so every later save would fail, too.
        """
        if not self._writer.in_flight:
            return
        errors = world.gather(_reason(self._writer.wait_written()))
        failed = [(rank, reason) for rank, reason in enumerate(errors) if reason]
        outcome = self._writer.wait_committed(abandon=bool(failed))
        committed = world.gather(None if isinstance(outcome, Abandoned) else _reason(outcome))[0]
        if committed and not failed:
            failed = [(0, committed)]
        self._lost = f"rank {failed[0][0]}: {failed[0][1]}" if failed else ""
        if failed:
            world.together(self._attempt.check)
            logger.warning(
                "CHECKPOINT LOST: %s was not written (%s); training continues, and the next save will be attempted",
                os.path.join(self.folder, store.tag_of(self._step)),
                self._lost,
            )
        else:
            self._announce()

    def _announce(self) -> None:
        """Report once that the last save is committed."""
        if self._announced < self._step:
            self._announced = self._step
            self._news.append(
                f"step {self._step} | saved {os.path.join(self.folder, store.tag_of(self._step))} | "
                f"training waited {self._stalled_s:.2f} s, written in {self._writer.seconds:.2f} s"
            )

    def news(self) -> list[str]:
        """Return the messages since the last call. Only rank 0 has any, because its save ends with the commit."""
        if self.rank_info.rank == 0 and self._writer.ended and not self._writer.error:
            self._announce()
        news, self._news = self._news, []
        return news

    def close(self) -> None:
        """Wait for the last save. Collective.

        Raises:
            UserError: it failed.
        """
        self.settle()
        if self._lost:
            newest = world.gather(store.newest(self.folder) if self.rank_info.rank == 0 else None)[0]
            raise UserError(
                f"{self.folder}: the last checkpoint, {store.tag_of(self._step)}, could not be written ({self._lost}); "
                f"free space and run the same command again: it resumes from {newest or 'the start'}"
            )
        if self.rank_info.rank == 0:
            self._attempt.end()

    @contextmanager
    def drained(self, hurried: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """If this rank fails, wait up to DRAIN_S, or until `hurried`, for its save in flight. Not collective."""
        try:
            yield
        except BaseException:
            self._writer.wait_committed(timeout_s=DRAIN_S, hurried=hurried)
            raise

    def _located(self, engine: Any) -> Iterator[Located]:
        """Yield the tensors to index in this rank's files. Only one rank indexes a replicated tensor."""
        for parameter, name in engine.param_names.items():
            key = key_of(name)
            if self._is_indexed(engine, key, parameter) and not hasattr(parameter, "ds_id"):
                part, parts = self._part(engine, key)
                own = weight_of(key[1]).own_numel(self.run.model, part, parts)
                yield Located(key, WEIGHT, part, 0, parameter.detach().view(-1)[:own])
        parameters = {name: parameter for parameter, name in engine.param_names.items()}
        for fragment in fragments(engine):
            key = key_of(fragment.name)
            part, parts = self._part(engine, key)
            own = weight_of(key[1]).own_numel(self.run.model, part, parts) - fragment.start  # padding may follow
            if own > 0 and self._is_indexed(engine, key, parameters[fragment.name]):
                for kind, tensor in fragment.tensors.items():
                    yield Located(key, kind, part, fragment.start, tensor[:own])

    def _part(self, engine: Any, key: Key) -> tuple[int, int]:
        """Return the index of this rank's tensor-parallel part of a weight, and the number of parts."""
        if weight_of(key[1]).cut is None:
            return 0, 1
        return engine.mpu.get_tensor_model_parallel_rank(), self.layout.tp

    def _is_indexed(self, engine: Any, key: Key, parameter: Any) -> bool:
        tp_replica = weight_of(key[1]).cut is None and engine.mpu.get_tensor_model_parallel_rank() > 0
        return not tp_replica and not getattr(parameter, "ds_pipe_replicated", False)


def _reason(error: Exception | None) -> str | None:
    """Return the text of an OSError. Any other error is a bug of this program.

    Raises:
        Exception: `error`, if it is not an OSError.
    """
    if error and not isinstance(error, OSError):
        raise error
    return str(error) if error else None
