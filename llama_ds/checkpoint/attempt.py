"""One attempt of a run, that is one start of its ranks, as the folder of checkpoints knows it.

An attempt has a folder of its own there, `attempt_` with a random id that its ranks agree on. Before its first save
rank 0 makes it, and moves the folders of all other attempts into it. From then on every change of what others see is
one rename out of this folder or into it:

| from | to | |
|---|---|---|
| `attempt_X/step_00000100` | `step_00000100` | a checkpoint is committed |
| `attempt_X/latest` | `latest` | and is the newest |
| `step_00000100` | `attempt_X/step_00000100.replaced` | one of the same step makes room for it |
| `step_00000050` | `attempt_X/step_00000050.removed` | one that is kept no longer is deleted |
| `step_00000100` | `attempt_X/step_00000100.rewound`, `step_00000100.rewound` | one is set aside, in two renames |

So an attempt can act only while its folder is there: whatever it does takes effect before the next attempt has begun,
or fails with FileNotFoundError. A process of an earlier attempt may be as late as it likes: its records are not where
this attempt looks for its own, and it can neither publish nor replace nor delete anything. Nor can it bring its folder
back, since only `begin` makes one.
"""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass

from llama_ds.checkpoint import store
from llama_ds.checkpoint.manifest import sync, write_complete
from llama_ds.checkpoint.store import ATTEMPT, DAMAGED, LATEST, REMOVED, REPLACED, REWOUND, Retention, tag_of
from llama_ds.errors import UserError
from llama_ds.log import logger

DELETE_TRIES = 3  # on a network file system an earlier attempt may still add a file to what is being deleted


def new_id() -> str:
    """Return a random id for an attempt. One rank draws it for all."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class SaveAttempt:
    """The changes that an attempt makes in `folder`, the run's folder of checkpoints. Rank 0 makes them."""

    folder: str
    id: str

    @property
    def path(self) -> str:
        """The attempt's own folder."""
        return os.path.join(self.folder, ATTEMPT + self.id)

    def partial(self, step: int) -> str:
        """Return the folder of the checkpoint of `step` while it is written."""
        return os.path.join(self.path, tag_of(step))

    def begin(self) -> list[str]:
        """Make the attempt's folder, and end all other attempts; return the names of what they left.

        Raises:
            UserError: the folder cannot be written, or another attempt's could still be written by its processes.
        """
        try:
            os.makedirs(self.folder, exist_ok=True)
            os.mkdir(self.path)
            found = sorted(os.listdir(self.folder))
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); set output_dir to another") from None
        others = [name for name in found if store.is_leftover(name) and name != os.path.basename(self.path)]
        return [name for name in others if self._take_over(name)]

    def check(self) -> None:
        """Check that no other attempt has begun since.

        Raises:
            UserError: one has, so that this one cannot save any more.
        """
        if not os.path.isdir(self.path):
            raise UserError(
                f"{self.path}: is gone, because another start of this run has taken over {self.folder}; "
                "let only one of them run, or give each a name of its own"
            )

    def publish(self, step: int) -> None:
        """Make the partial checkpoint of `step`, all of whose files are on the disk, a complete one, and the newest."""
        tag = os.path.join(self.folder, tag_of(step))
        if os.path.lexists(tag):  # left by a run that went back to an earlier step; `latest` does not name it
            os.rename(tag, self._own(tag_of(step) + REPLACED))
        os.rename(self.partial(step), tag)
        sync(self.folder)
        sync(self.path)
        self.point_to(tag_of(step))

    def point_to(self, tag: str) -> None:
        """Make `latest` name `tag`, atomically."""
        write_complete(os.path.join(self.folder, LATEST), tag, os.path.join(self.path, LATEST))
        sync(self.folder)

    def go_back(self, tag: str, newer: list[str]) -> None:
        """Make `tag` the newest, and set the complete checkpoints `newer` aside, so that nobody resumes from them.

        `latest` goes first: cut off before that the run has not gone back, and after it, whatever is set aside, it has.
        """
        self.point_to(tag)
        for other in newer:
            self._set_aside(other, REWOUND)
        sync(self.folder)

    def set_aside_damaged(self, tag: str) -> str:
        """Rename a damaged checkpoint, if it is there, so that nobody takes it for a good one; return its new name."""
        if not os.path.lexists(os.path.join(self.folder, tag)):
            return "gone"
        return self._set_aside(tag, DAMAGED)

    def remove_old(self, keep: Retention) -> None:
        """Delete the checkpoints that `keep` does not keep, and those that were replaced. The newest always stays."""
        for name in os.listdir(self.path):
            if store.is_leftover(name):
                delete(os.path.join(self.path, name))
        if not keep.last:
            return
        latest = store.named(self.folder)
        for tag in [tag for tag in store.tags(self.folder) if tag != latest][max(keep.last - 1, 0) :]:
            if not keep.every or store.step_of(tag) % keep.every:
                self._remove(os.path.join(self.folder, tag))
        for name in store.outlived(self.folder):
            self._remove(os.path.join(self.folder, name))
            logger.info("removed %s/%s: the run that went back has saved a later step", self.folder, name)

    def discard(self, step: int) -> None:
        """Delete what was written of a save that failed. Nobody writes to it any more."""
        try:
            self._remove(self.partial(step))
        except FileNotFoundError:  # nothing was written, or another attempt has begun
            pass
        except OSError as error:
            logger.warning("%s: cannot be removed (%s)", self.partial(step), error)

    def end(self) -> None:
        """Delete the attempt's folder."""
        delete(self.path)

    def _take_over(self, name: str) -> bool:
        """Move what another attempt left into this one's folder and delete it; return whether it was still there."""
        moved = self._own(name)
        try:
            os.rename(os.path.join(self.folder, name), moved)
        except FileNotFoundError:
            self.check()  # or else its own process has committed or deleted it just now
            return False
        except OSError as error:
            raise UserError(
                f"{os.path.join(self.folder, name)}: cannot be moved ({error.strerror}), so an earlier start of this "
                "run could still commit what it writes there; make it writable, or remove it"
            ) from None
        for place in [os.path.join(place, own) for place, owns, _ in os.walk(moved) for own in owns]:
            if store.is_set_aside(os.path.basename(place)):  # the other ended amid the two renames
                os.rename(place, store.free_name(os.path.join(self.folder, os.path.basename(place))))
        delete(moved)
        return True

    def _set_aside(self, tag: str, suffix: str) -> str:
        own = self._own(tag + suffix)
        os.rename(os.path.join(self.folder, tag), own)
        aside = store.free_name(os.path.join(self.folder, tag + suffix))
        os.rename(own, aside)
        return os.path.basename(aside)

    def _remove(self, path: str) -> None:
        removed = self._own(tag_of(store.step_of(os.path.basename(path))) + REMOVED)
        os.rename(path, removed)  # at once, as far as readers are concerned
        delete(removed)

    def _own(self, name: str) -> str:
        """Return a path in the attempt's folder that is not taken yet."""
        return store.free_name(os.path.join(self.path, name))


def delete(path: str) -> None:
    """Delete a file or a folder, if it is there; report it where that fails."""
    problem: OSError | None = None
    for _ in range(DELETE_TRIES):
        try:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except FileNotFoundError as error:  # somebody else deletes it, too
            problem = error
        except OSError as error:
            problem = error
        if not os.path.lexists(path):
            return
    logger.warning("%s: cannot be deleted (%s); it is in nobody's way, and only takes room", path, problem)
