"""One attempt of a run (one start of its ranks) and the changes that it makes in the checkpoint folder.

An attempt has a private folder there, `attempt_` plus a random id that its ranks agree on. Before the first save,
rank 0 creates that folder and moves the folders of all other attempts into it. From then on, every visible change is
a single rename into or out of this folder:

| from | to | |
|---|---|---|
| `attempt_X/step_00000100` | `step_00000100` | a checkpoint is committed |
| `attempt_X/latest` | `latest` | that checkpoint becomes the newest |
| `step_00000100` | `attempt_X/step_00000100.replaced` | a new checkpoint replaces one of the same step |
| `step_00000050` | `attempt_X/step_00000050.removed` | a checkpoint that is no longer retained is deleted |
| `step_00000100` | `attempt_X/step_00000100.rewound`, `step_00000100.rewound` | one is set aside, in two renames |

An attempt can therefore act only while its folder exists. Each of its actions either takes effect before the next
attempt begins or fails with FileNotFoundError. A process of an earlier attempt may be arbitrarily late: this attempt
never reads its records, and it can no longer publish, replace or delete anything. It cannot recreate its folder
either, because only `begin` creates one.
"""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass

from llama_ds.atomic_files import write_atomically
from llama_ds.checkpoint import store
from llama_ds.checkpoint.manifest import sync
from llama_ds.checkpoint.store import ATTEMPT, DAMAGED, LATEST, REMOVED, REPLACED, REWOUND, Retention, tag_of
from llama_ds.errors import UserError
from llama_ds.log import logger

DELETE_TRIES = 3  # on a network file system, an earlier attempt may still add a file to a folder being deleted


def new_id() -> str:
    """Return a random id for an attempt. One rank draws it and broadcasts it."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class SaveAttempt:
    """One attempt's changes to `folder`, the checkpoint folder of the run. Only rank 0 makes them."""

    folder: str
    id: str

    @property
    def path(self) -> str:
        """Path of the attempt's private folder."""
        return os.path.join(self.folder, ATTEMPT + self.id)

    def partial(self, step: int) -> str:
        """Return the folder in which the checkpoint of `step` is written."""
        return os.path.join(self.path, tag_of(step))

    def begin(self) -> list[str]:
        """Create the attempt's folder and end all other attempts; return the names of their leftovers.

        Raises:
            UserError: the folder cannot be written, or another attempt's folder cannot be moved.
        """
        try:
            os.makedirs(self.folder, exist_ok=True)
            os.mkdir(self.path)
            found = sorted(os.listdir(self.folder))
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot write checkpoints there ({error.strerror}); set output_dir to another"
            ) from None
        others = [name for name in found if store.is_leftover(name) and name != os.path.basename(self.path)]
        return [name for name in others if self._take_over(name)]

    def check(self) -> None:
        """Check that no later attempt has begun.

        Raises:
            UserError: one has, so this attempt can no longer save.
        """
        if not os.path.isdir(self.path):
            raise UserError(
                f"{self.path}: no longer exists, because another start of this run has taken over {self.folder}; "
                "let only one of them run, or give each a different name"
            )

    def publish(self, step: int) -> None:
        """Commit the checkpoint of `step`, whose files are all durable, and make `latest` name it."""
        tag = os.path.join(self.folder, tag_of(step))
        if os.path.lexists(tag):  # left by a run that was rewound to an earlier step; `latest` does not name it
            os.rename(tag, self._own(tag_of(step) + REPLACED))
        os.rename(self.partial(step), tag)
        sync(self.folder)
        sync(self.path)
        self.point_to(tag_of(step))

    def point_to(self, tag: str) -> None:
        """Make `latest` name `tag`, atomically."""
        latest = os.path.join(self.folder, LATEST)
        write_atomically(latest, tag, durable=True, temporary=os.path.join(self.path, LATEST))
        sync(self.folder)

    def go_back(self, tag: str, newer: list[str]) -> None:
        """Make `latest` name `tag`, and set the complete checkpoints `newer` aside so that no run resumes from them.

        `latest` changes first: this one rename decides whether an interrupted rewind has taken place.
        """
        self.point_to(tag)
        for other in newer:
            self._set_aside(other, REWOUND)
        sync(self.folder)

    def set_aside_damaged(self, tag: str) -> str:
        """Rename a damaged checkpoint, if it exists, so that no run resumes from it; return its new name."""
        if not os.path.lexists(os.path.join(self.folder, tag)):
            return "gone"
        return self._set_aside(tag, DAMAGED)

    def remove_old(self, keep: Retention) -> None:
        """Delete replaced checkpoints and those that `keep` does not retain. The newest is always retained."""
        for name in os.listdir(self.path):
            if store.is_leftover(name):
                delete(os.path.join(self.path, name))
        if not keep.last:
            return
        latest = store.latest_tag(self.folder)
        for tag in [tag for tag in store.tags(self.folder) if tag != latest][max(keep.last - 1, 0) :]:
            if not keep.every or store.step_of(tag) % keep.every:
                self._remove(os.path.join(self.folder, tag))
        for name in store.expired_rewound(self.folder):
            self._remove(os.path.join(self.folder, name))
            logger.info("removed %s/%s: the rewound run has saved a later step", self.folder, name)

    def discard(self, step: int) -> None:
        """Delete the files of a failed save. All ranks have stopped writing to it."""
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
        """Move another attempt's leftover into this one's folder and delete it; return whether it still existed."""
        moved = self._own(name)
        try:
            os.rename(os.path.join(self.folder, name), moved)
        except FileNotFoundError:
            self.check()  # if this passes, the other attempt has just committed or deleted it
            return False
        except OSError as error:
            raise UserError(
                f"{os.path.join(self.folder, name)}: cannot be moved ({error.strerror}), so an earlier start of this "
                "run could still commit what it writes there; make it writable, or remove it"
            ) from None
        for path in [os.path.join(parent, name) for parent, names, _ in os.walk(moved) for name in names]:
            if store.is_set_aside(os.path.basename(path)):  # the other attempt ended between the two renames
                os.rename(path, store.free_name(os.path.join(self.folder, os.path.basename(path))))
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
        os.rename(path, removed)  # for readers the checkpoint disappears atomically
        delete(removed)

    def _own(self, name: str) -> str:
        """Return an unused path in the attempt's folder."""
        return store.free_name(os.path.join(self.path, name))


def delete(path: str) -> None:
    """Delete a file or folder if it exists; log a warning on failure."""
    problem: OSError | None = None
    for _ in range(DELETE_TRIES):
        try:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except FileNotFoundError as error:  # another process is deleting it too
            problem = error
        except OSError as error:
            problem = error
        if not os.path.lexists(path):
            return
    logger.warning("%s: cannot be deleted (%s); it does no harm but occupies disk space", path, problem)
