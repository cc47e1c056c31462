"""The files in examples/ are what their programs accept, and start a run that resolves on the ranks that they ask for.

schemas/ has excerpts of the programs' own schemas. Each of them names its source, and what it leaves out.
"""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from llama_ds.config.run_file import load_run
from llama_ds.layout.layout import resolve_layout
from llama_ds.train import parse

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCHEMAS = Path(__file__).with_name("schemas")
OURS = {"ladder.yaml", "grafana"}  # read by programs of this project, or about its values
WRONG: list[list[str]] = [[]]  # the wrong type everywhere
FREE = ("limits", "volumes")  # resources of a pod and volumes of a SkyPilot task, whose keys are names of the cluster's


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / name).with_suffix(".json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def wrong_fields(example: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the example with each of its keys misspelt, and with a wrong value at each of them."""
    node = example
    for key in path:
        node = node[key]
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from wrong_fields(example, (*path, key))
        for misspelt in (True, False) if isinstance(node, dict) and (not path or path[-1] not in FREE) else (False,):
            changed = parent = copy.deepcopy(example)
            for step in path:
                parent = parent[step]
            value = parent.pop(key) if misspelt else WRONG
            parent[f"{key}x" if misspelt else key] = value
            yield (*path, key), changed


@pytest.mark.parametrize("name", sorted({path.name for path in EXAMPLES.iterdir()} - OURS))
def test_an_example_has_the_fields_of_its_schema_and_a_wrong_one_is_noticed(name: str) -> None:
    found, example = validator(name), read(name)
    found.validate(example)
    accepted = {path for path, changed in wrong_fields(example) if found.is_valid(changed)}
    assert accepted == ({("volumes", "/shared")} if name == "skypilot.yaml" else set())  # free there


def check(words: list[str], ranks: int) -> None:
    """Check the arguments after `-m llama_ds.train`."""
    arguments = parse(words[words.index("llama_ds.train") + 1 :])
    assert words[words.index("llama_ds.train") - 1] == "-m"
    run = load_run(arguments.run_file, arguments.overrides)
    assert resolve_layout(run, ranks).world == ranks
    assert run.output_dir.startswith("/shared/")  # what all pods see


def check_volumes(pods: dict[str, Any]) -> None:
    """Check that mounted volumes are those of the pod."""
    spec = pods["template"]["spec"]
    mounted = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", ())}
    assert mounted == {volume["name"] for volume in spec.get("volumes", ())}


def test_mpijob() -> None:
    spec = read("mpijob.yaml")["spec"]
    launcher, worker = (spec["mpiReplicaSpecs"][kind] for kind in ("Launcher", "Worker"))
    (starts,), (works,) = (pods["template"]["spec"]["containers"] for pods in (launcher, worker))
    ranks = worker["replicas"] * spec["slotsPerWorker"]
    assert works["resources"]["limits"]["nvidia.com/gpu"] == spec["slotsPerWorker"]
    assert starts["command"][:3] == ["mpirun", "-n", str(ranks)]
    check(starts["args"], ranks)
    check_volumes(launcher)
    check_volumes(worker)


def test_pytorchjob() -> None:
    spec = read("pytorchjob.yaml")["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for pods in replicas.values():
        check_volumes(pods)
        (container,) = pods["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"  # the operator sets its variables in the container of this name
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == spec["nprocPerNode"]
        check(container["args"], sum(each["replicas"] for each in replicas.values()) * int(spec["nprocPerNode"]))


def test_skypilot() -> None:
    task = read("skypilot.yaml")
    gpus = int(task["resources"]["accelerators"].partition(":")[2])
    check(shlex.split(task["run"].replace("\\\n", " ")), task["num_nodes"] * gpus)
