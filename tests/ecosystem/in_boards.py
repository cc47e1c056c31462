"""Write a run that resumes to W&B (offline), MLflow and Prometheus, and read it back by their own libraries.

One start ends by an error. Usage: in_boards.py FOLDER, with the project on PYTHONPATH; FOLDER is not used
"""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_ds.config.run_file import load_run
from llama_ds.job import requests
from llama_ds.job.run_end import RunEnd
from llama_ds.log import logger
from llama_ds.parallel import world
from llama_ds.training.boards import background
from llama_ds.training.run_log import RunLog, open_run_log
from llama_ds.training.samples import Sample

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = "{name: wandb, offline: true, project: p}, {name: mlflow, project: p}"
LOSSES = [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
PATIENCE_S = 300.0  # a machine under load imports mlflow for a minute
BLOCK, HEADER = 32768, struct.Struct("<IHB")  # LevelDB's log format, in which W&B writes


def started(folder: Path, boards: str, first: int, reports: list[dict[str, Any]]) -> RunLog:
    """Return the log of a start of a run, with its reports."""
    run_file = str(ROOT / "ds_configs" / "quickstart.yaml")
    log = open_run_log(load_run(run_file, [f"output_dir={folder}", "name=run", f"logging.boards=[{boards}]"]), first)
    for values in reports:
        log.record(values)
    return log


def write(folder: Path, boards: str, first: int, reports: list[dict[str, Any]]) -> None:
    """Write the reports of a start that is interrupted, and wait for its boards."""
    started(folder, boards, first, reports).close(RunEnd.INTERRUPTED)


def fail(folder: Path) -> None:
    """Write a start of a run that fails, as train.py does, in a process of its own; it does not return."""
    requests.CLOSE_S = background.CLOSE_S = PATIENCE_S
    own, log = requests.Requests(), started(folder, OFFLINE, 3, [{"step": 4, "loss": 1.0}])
    log.record_samples(4, [Sample("one, two,", " three")])
    with world.failing_together(close_outputs=own.close_outputs):
        own.before_end(log.close_boards)
        raise RuntimeError("as a rank fails")


def check(what: str, found: object, wanted: object) -> None:
    """End with an error unless what was read back is what was written."""
    if found != wanted:
        raise SystemExit(f"{what}: {found}, not {wanted}")
    print(f"{what}: {found}")


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""  # after the file's header
    while at + HEADER.size <= len(data):
        if BLOCK - at % BLOCK < HEADER.size:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        part += data[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(part)
            part = b""


def read_wandb(run: Path) -> tuple[set[str], list[tuple[int, float]], list[int], list[str]]:
    """Return the ids of the runs, (step, loss) of the points, the exit codes and the samples, of all starts."""
    ids, points, codes, texts = set(), [], [], []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("exit"):
                codes.append(record.exit.exit_code)
            if record.HasField("history"):
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                points += [(int(items["_step"]), float(items["loss"]))] if "loss" in items else []
                texts += [json.loads(items["samples/1"])] if "samples/1" in items else []
    return ids, points, codes, texts


def read_mlflow(run: Path) -> tuple[int, list[tuple[int, float]], str, str]:
    """Return the number of runs, (step, loss) of the points, the state, and a parameter."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    points = [(point.step, point.value) for point in history]
    return len(runs), points, runs[0].info.status, runs[0].data.params["training.global_batch"]


def read_prometheus() -> None:
    """Read the text of a run, with names that must be escaped, by Prometheus' own parser."""
    from prometheus_client.parser import text_string_to_metric_families

    from llama_ds.training.boards.prometheus import exposition

    text = exposition('a"b\\c', {"loss": 2.5, "tokens": 8, "tokens/a\nb": 8, "tokens/c": 0, "lr": float("inf")})
    found = [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    run = {"run": 'a"b\\c'}
    wanted = [
        ("llama_ds_loss", run, 2.5),
        ("llama_ds_tokens", run, 8.0),
        ("llama_ds_tokens_by_name", run | {"name": "a\nb"}, 8.0),
        ("llama_ds_tokens_by_name", run | {"name": "c"}, 0.0),
        ("llama_ds_lr", run, float("inf")),
    ]
    check("prometheus_client", found, wanted)


def without_servers(folder: Path) -> float:
    """Write to servers that are gone; return the seconds that the run spends on it."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    background.CLOSE_S = 3.0
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    begin = time.monotonic()
    write(folder, "{name: wandb}, {name: mlflow, uri: 'http://127.0.0.1:9'}", 0, [{"step": 1, "loss": 4.0}])
    for name in ("wandb", "mlflow"):
        if not any(line.startswith(f"board {name}: ") for line in heard):
            raise SystemExit(f"{name}: no warning that its server is gone: {heard}")
    print("\n".join(heard))
    return time.monotonic() - begin


def main() -> None:
    """Check all boards."""
    os.environ |= {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    background.CLOSE_S = PATIENCE_S
    with tempfile.TemporaryDirectory() as text:
        folder, run = Path(text), Path(text) / "run"
        write(folder, OFFLINE, 0, [{"step": n, "loss": 5.0 - n} for n in (1, 2, 3)] + [{"step": 3, "val_loss": 2.5}])
        write(folder, OFFLINE, 2, [{"step": 3, "loss": 9.0}])
        check("mlflow of a run that was interrupted", read_mlflow(run)[2], "KILLED")
        failed = subprocess.run([sys.executable, __file__, str(folder), "fail"], timeout=600)
        check("exit code of a run that fails", failed.returncode, 1)
        ids, points, codes, texts = read_wandb(run)
        check(f"wandb {version('wandb')}, runs", len(ids), 1)
        check("points of all starts", points, LOSSES)
        check("exit codes of all starts", codes, [255, 255, 1])
        check("samples", texts, ["one, two, three"])
        found = read_mlflow(run)
        check(f"mlflow {version('mlflow-skinny')}", found, (1, LOSSES, "FAILED", "16"))
        holding = [str(path) for path in run.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
        check("files that hold the key", holding, [])
        read_prometheus()
        print(f"servers that are gone: {without_servers(folder / 'gone'):.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(fail(Path(sys.argv[1])) if sys.argv[2:] == ["fail"] else main())
