"""Variables of launchers that are no numbers end a rank with one line, before torch and DeepSpeed read them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from llama_ds.errors import UserError
from llama_ds.parallel import world
from llama_ds.parallel.environment import MOST_RANKS
from llama_ds.shipped import TRAIN

NUMBERS = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
FIX = "; correct it, or unset it"
HOST = socket.gethostname()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a rank that torchrun started."""
    for name, value in NUMBERS.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "value", "least", "most"),
    [
        ("RANK", "abc", 0, MOST_RANKS),
        ("RANK", "-1", 0, MOST_RANKS),
        ("WORLD_SIZE", "", 1, MOST_RANKS),
        ("WORLD_SIZE", "0", 1, MOST_RANKS),
        ("LOCAL_RANK", "1.0", 0, MOST_RANKS),
        ("LOCAL_WORLD_SIZE", "2x", 1, MOST_RANKS),
        ("MASTER_PORT", "99999", 0, 65535),
        ("DEEPSPEED_TIMEOUT", "ten", 1, 10**6),
    ],
)
def test_a_number_that_is_none(launched: pytest.MonkeyPatch, name: str, value: str, least: int, most: int) -> None:
    assert world.find_rank_info() == world.RankInfo(1, 4, 1)
    launched.setenv(name, value)
    with pytest.raises(UserError) as error:
        world.find_rank_info()
    assert str(error.value) == f"environment: {name} = '{value}' is not a whole number from {least} to {most}{FIX}"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "4", "rank 4 is not below the 4 ranks of the world; ranks count from 0"),
        ("MASTER_ADDR", "", "MASTER_ADDR is empty; set it to the address of rank 0's host, or unset it"),
        (
            "GLOO_SOCKET_IFNAME",
            "lo,ib9",
            f"GLOO_SOCKET_IFNAME = 'ib9' is no network interface of {HOST}, which has eth0, lo{FIX}",
        ),
        ("DS_ACCELERATOR", "gpu", "DS_ACCELERATOR = 'gpu' is not cuda or cpu; unset it to use what is there"),
        (
            *("LLAMA_DS_BACKEND", "nccl"),
            "LLAMA_DS_BACKEND = 'nccl' is not gloo, which lets ranks share a GPU; unset it for one rank on each",
        ),
    ],
)
def test_other_mistakes(launched: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    launched.setenv(name, value)
    launched.setattr(psutil, "net_if_addrs", lambda: {"lo": [], "eth0": []})  # tests of hosts add and remove some
    with pytest.raises(UserError) as error:
        world.find_rank_info()
    assert str(error.value) == f"environment: {message}"


def test_a_dry_run_reads_the_same_numbers(launched: pytest.MonkeyPatch) -> None:
    """It shares the host's memory among the ranks on it, and looks up no rank."""
    launched.setenv("LOCAL_WORLD_SIZE", "two")
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE = 'two' is not a whole number"):
        world.device_memory(torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "why"),
    [("TORCH_DISTRIBUTED_DEBUG", "must be OFF, INFO, or DETAIL"), ("TORCH_LOGS", "Invalid log settings")],
)
def test_what_torch_refuses_while_it_is_imported_is_one_line(name: str, why: str) -> None:
    command = [sys.executable, TRAIN, "ds_configs/quickstart.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {name: "x"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: environment: torch refuses a TORCH_* variable (") and why in line
