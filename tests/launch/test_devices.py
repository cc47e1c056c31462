"""Ranks use the CUDA devices that the user has chosen, and no others on a shared machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from llama_ds.errors import UserError
from llama_ds.job import devices
from llama_ds.job.devices import decode, encode, visible_devices
from llama_ds.job.folder import Job
from llama_ds.launch.hostfile import select
from llama_ds.launch.rendezvous import Rendezvous
from llama_ds.launch.supervise.supervisor import LaunchSettings, command_of
from llama_ds.machine import free_port
from llama_ds.parallel import world

HERE = "localhost"


@pytest.mark.parametrize(
    ("slots", "environ", "expected"),
    [
        ({HERE: [0, 1]}, {"CUDA_VISIBLE_DEVICES": "2,3"}, {HERE: "2,3"}),
        ({HERE: [0, 1]}, {"CUDA_VISIBLE_DEVICES": "4, 5,6,7"}, {HERE: "4,5"}),
        ({HERE: [2, 3]}, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, {HERE: "6,7"}),
        ({HERE: [0]}, {"CUDA_VISIBLE_DEVICES": "GPU-8932f937,GPU-11"}, {HERE: "GPU-8932f937"}),
        ({HERE: [0, 1]}, {"CUDA_VISIBLE_DEVICES": ""}, {HERE: ""}),
        ({HERE: [0, 1]}, {"CUDA_VISIBLE_DEVICES": "-1"}, {HERE: ""}),
        ({HERE: [2, 3]}, {}, {HERE: "2,3"}),
        ({HERE: [0, 1], "node2": [0, 1]}, {}, {}),
        # The variable of this shell says nothing of another host.
        ({"node2": [0, 1]}, {"CUDA_VISIBLE_DEVICES": "2,3"}, {}),
        ({HERE: [0], "node2": [1, 5]}, {"CUDA_VISIBLE_DEVICES": "3"}, {HERE: "3", "node2": "1,5"}),
        ({HERE: [0, 1]}, {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}, {}),
    ],
)
def test_slots_become_devices(
    slots: Mapping[str, list[int]], environ: Mapping[str, str], expected: dict[str, str]
) -> None:
    found = visible_devices(slots, HERE, environ)
    assert found == expected
    counts = {host: len(chosen) for host, chosen in slots.items()}
    ranks = [host for host, count in counts.items() for _ in range(count)]
    text = encode(counts, found)
    assert [decode(text, rank) for rank in range(len(ranks))] == [found.get(host) for host in ranks]


def test_a_slot_that_is_not_visible_is_refused() -> None:
    message = "CUDA_VISIBLE_DEVICES=2,3: lists 2 of the devices, and the job uses slot 3 of localhost, counted from 0"
    with pytest.raises(UserError, match=message):
        visible_devices(select({HERE: 4}, include="localhost:2,3"), HERE, {"CUDA_VISIBLE_DEVICES": "2,3"})


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpich", "impi", "slurm"])
def test_every_launcher_passes_them_on(launcher: str, tmp_path: Path) -> None:
    job = Job(str(tmp_path), {"node1": 2, "node2": 2}, launcher, ("10.0.0.1", 1), 5.0, 60.0)
    start = LaunchSettings("run.yaml", [], "/train.py", launcher, devices={"node2": "2,3", "spare": "1,2"})
    command = command_of(job, start, Rendezvous("10.0.0.1", 29500, "10.0.0.1"))
    passed = f"{devices.VARIABLE}=2-3:2+3"
    assert passed in command.env_text or command.environment.get(devices.VARIABLE) == "2-3:2+3"


def test_a_rank_sets_them_before_it_uses_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher has set the host's first devices."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name, value in {"CUDA_VISIBLE_DEVICES": "0,1", devices.VARIABLE: "0-1:2+3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    seen: list[str] = []

    def stop_here() -> bool:
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        raise InterruptedError

    monkeypatch.setattr(world, "on_cuda", stop_here)
    with pytest.raises(InterruptedError):
        world.join(world.RankInfo(0, 1, 0))
    assert seen == ["2,3"]
