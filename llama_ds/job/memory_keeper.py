"""Frees the memory of a run on one host when its job has ended, however it ended. Standard library only.

It is a process of its own, because ranks and launcher may be killed. It watches the locks in the run's folder
(`run_lock`), which their holders touch every few seconds; the memory is deleted once no lock has changed for `lease_s`.

    python -I memory_keeper.py FOLDER RUN_DIR LEASE_S
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time

LOCKS = ("ranks.lock", "launcher.lock")
HELD = "keeper"  # name of the file in the folder that the keeper of the folder locks
POLL_S = 1.0


def heartbeats(run_dir: str) -> dict[str, int]:
    """Return the times of the last heartbeats of the locks of a run, in ns, by file."""
    found = {}
    for lock in LOCKS:
        folder = os.path.join(run_dir, lock)
        try:
            for name in os.listdir(folder):
                with open(os.path.join(folder, name), "rb") as file:  # opening makes NFS ask the server
                    found[f"{lock}/{name}"] = os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            continue
    return found


def main() -> None:
    """Keep the folder until its job has ended, then delete it."""
    folder, run_dir, lease_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
    try:
        held = os.open(os.path.join(folder, HELD), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another keeper holds it, or the run has ended already
        return
    last, changed = heartbeats(run_dir), time.monotonic()
    while os.path.isdir(folder):
        time.sleep(POLL_S)
        now = heartbeats(run_dir)
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
