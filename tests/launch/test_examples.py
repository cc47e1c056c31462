"""The files in examples/ start a run that resolves on as many ranks as they ask for."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from llama_ds.config.run_file import load_run
from llama_ds.layout.layout import resolve_layout
from llama_ds.train import parse

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


def check(words: list[str], ranks: int) -> None:
    """Check the arguments after `-m llama_ds.train`."""
    arguments = parse(words[words.index("llama_ds.train") + 1 :])
    assert words[words.index("llama_ds.train") - 1] == "-m"
    run = load_run(arguments.run_file, arguments.overrides)
    assert resolve_layout(run, ranks).world == ranks
    assert run.output_dir.startswith("/shared/")  # what all pods see


def test_mpijob() -> None:
    spec = read("mpijob.yaml")["spec"]
    launcher, worker = (spec["mpiReplicaSpecs"][kind] for kind in ("Launcher", "Worker"))
    (starts,), (works,) = (pods["template"]["spec"]["containers"] for pods in (launcher, worker))
    ranks = worker["replicas"] * spec["slotsPerWorker"]
    assert works["resources"]["limits"]["nvidia.com/gpu"] == spec["slotsPerWorker"]
    assert starts["command"][:3] == ["mpirun", "-n", str(ranks)]
    check(starts["args"], ranks)


def test_pytorchjob() -> None:
    spec = read("pytorchjob.yaml")["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for pods in replicas.values():
        (container,) = pods["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"  # the operator sets its variables in the container of this name
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == spec["nprocPerNode"]
        check(container["args"], sum(each["replicas"] for each in replicas.values()) * int(spec["nprocPerNode"]))


def test_skypilot() -> None:
    task = read("skypilot.yaml")
    gpus = int(task["resources"]["accelerators"].partition(":")[2])
    check(shlex.split(task["run"].replace("\\\n", " ")), task["num_nodes"] * gpus)
