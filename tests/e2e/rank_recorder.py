"""One rank of a batch of commands: it starts every command as that rank.

    rank_recorder.py BATCH.json FOLDER, as one of two ranks that have torch and DeepSpeed imported

BATCH is a list of {"arguments": of train.py, with {rank} for the rank, "port": of its process group}. Rank r leaves the
exit code and the output of case i in FOLDER/i.rR.json. No launcher watches the single commands and ends the ranks that
are left, so each has to end by itself: one that waits for the others is seen.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import forking

TRAIN = Path(__file__).resolve().parents[2] / "llama_ds" / "train.py"
TIMEOUT_S = 60


def main() -> None:
    """Run the batch."""
    batch, folder = sys.argv[-2:]
    for number, case in enumerate(json.loads(Path(batch).read_text())):
        done = run(case["arguments"], case["port"], Path(folder, f"output.r{os.environ['RANK']}"))
        Path(folder, f"{number}.r{os.environ['RANK']}.json").write_text(json.dumps(done))


def run(arguments: list[str], port: int, output: Path) -> dict[str, object]:
    """Run one case; its exit code is None when it had to be killed."""
    words = [word.replace("{rank}", os.environ["RANK"]) for word in arguments]
    if not (pid := os.fork()):
        os.environ["MASTER_PORT"] = str(port)
        with open(output, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        forking.run([str(TRAIN), *words])
    deadline = time.monotonic() + TIMEOUT_S
    ended = 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status) if ended else None, "output": output.read_text(errors="replace")}


if __name__ == "__main__":
    main()
