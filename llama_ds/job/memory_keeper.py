"""Frees the memory of a run on one host when its job has ended, however it ended. Standard library only.

It is a process of its own, because ranks and launcher may be killed. It watches the locks of the run (`run_lock`),
which their holders touch every few seconds; the memory is deleted once none of them has changed for LEASE_S.

    python -I memory_keeper.py FOLDER LEASE_S LOCK...
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time

HELD = "keeper"  # name of the file in the folder that the keeper of the folder locks
POLL_S = 1.0


def heartbeats(locks: list[str]) -> dict[str, int]:
    """Return the times of the last heartbeats of the holders of locks, in ns, by file."""
    found = {}
    for lock in locks:
        try:
            for path in (os.path.join(lock, name) for name in os.listdir(lock)):
                with open(path, "rb") as file:  # opening makes NFS ask the server
                    found[path] = os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            continue
    return found


def is_kept(folder: str) -> bool:
    """Return whether a keeper watches the folder."""
    try:
        held = os.open(os.path.join(folder, HELD), os.O_RDWR)
    except OSError:  # none has ever
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(held)
    return False


def main() -> None:
    """Keep the folder until its job has ended, then delete it."""
    folder, lease_s, locks = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
    if os.fork():  # the rank that started this waits for its end; the child has no parent that others would kill
        return
    try:
        held = os.open(os.path.join(folder, HELD), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another keeper holds it, or the run has ended already
        return
    last, changed = heartbeats(locks), time.monotonic()
    while os.path.isdir(folder):
        time.sleep(POLL_S)
        now = heartbeats(locks)
        if now and now != last:
            last, changed = now, time.monotonic()
        if time.monotonic() - changed > lease_s:
            shutil.rmtree(folder, ignore_errors=True)
    try:
        os.rmdir(os.path.dirname(folder))
    except OSError:
        return


if __name__ == "__main__":
    main()
