"""One rank of a batch of commands: the launcher starts this once, and it starts every command as that rank.

    deepspeed --num_accelerators 2 rank_recorder.py BATCH.json FOLDER

BATCH is a list of {"arguments": of train.py, with {rank} for the rank, "port": of its process group}. Rank r leaves the
exit code and the output of case i in FOLDER/i.rR.json. No launcher watches the single commands and ends the ranks that
are left, so each has to end by itself: one that waits for the others is seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[2] / "llama_ds" / "train.py"
TIMEOUT_S = 60


def main() -> None:
    """Run the batch."""
    batch, folder = sys.argv[-2:]
    for number, case in enumerate(json.loads(Path(batch).read_text())):
        done = run(case["arguments"], case["port"])
        Path(folder, f"{number}.r{os.environ['RANK']}.json").write_text(json.dumps(done))


def run(arguments: list[str], port: int) -> dict[str, object]:
    """Run one case; its exit code is None when it had to be killed."""
    command = [sys.executable, str(TRAIN), *(word.replace("{rank}", os.environ["RANK"]) for word in arguments)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "MASTER_PORT": str(port)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
        return {"code": process.returncode, "output": output}
    except subprocess.TimeoutExpired:
        process.kill()
        return {"code": None, "output": process.communicate()[0]}


if __name__ == "__main__":
    main()
