"""Ranks find rank 0 by what launchers tell them, are told what is missing, and say who is waited for."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pytest

from llama_ds.errors import NotJoined, UserError
from llama_ds.launch.supervise import attempt
from llama_ds.machine import free_port
from llama_ds.parallel import first_rank, joining, world
from llama_ds.parallel.first_rank import find_first_rank, hosts_of_step, on_one_host

MINUTE = timedelta(minutes=1)
PREFIXES = ("SLURM_", "PMI", "OMPI_", "MPI_", "LOCAL_", "RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
# The environments in which Slurm 22.05 and later start a task, and a batch script; only what is read here.
JOB = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {
    **JOB,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[08-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_DISTRIBUTION": "block",
}


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment without a launcher, in which every host name has an address."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(PREFIXES):
            del os.environ[name]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [])
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


def found(by: str = "SLURM_PROCID", rank: int = 3, size: int = 4) -> tuple[str, str]:
    find_first_rank(rank, size, by)
    return os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]


def test_srun_on_two_hosts_needs_no_address() -> None:
    """It ended in 127.0.0.1 on both hosts, and a hang of 30 minutes."""
    os.environ.update(STEP)
    info = world.find_rank_info()
    assert (info.rank, info.world, info.local_rank) == (3, 4, 1)
    assert hosts_of_step() == ["n08", "n08", "n09", "n09"]
    address, port = found()
    assert address == "n08" and 20000 <= int(port) < 30000
    del os.environ["MASTER_PORT"]
    os.environ["SLURM_STEP_ID"] = "1"
    assert found() != (address, port), "another step of the job on the same hosts"


@pytest.mark.parametrize("by", ["PMI_RANK", "PMIX_RANK"])
def test_sruns_process_managers_are_slurm(by: str) -> None:
    os.environ.update(STEP | {by: "3"})
    assert found(by)[0] == "n08"


def test_a_cyclic_distribution_has_task_0_on_the_first_host() -> None:
    os.environ.update(STEP | {"SLURM_DISTRIBUTION": "cyclic"})
    assert found()[0] == "n08" and hosts_of_step() == []


def test_one_host_is_the_loopback_address() -> None:
    os.environ.update(STEP | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "n08"})
    assert found()[0] == "127.0.0.1" and world.interface("", 4) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (JOB, "SLURM_NTASKS = 4, but srun did not start this process, so it is the only one; start all ranks with"),
        # What sbatch inherits from the step in which it was called.
        (JOB | {"SLURM_STEP_NUM_TASKS": "1"}, "srun did not start this process"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "LOCAL_RANK not set but other launcher variables are"),
    ],
    ids=["batch script", "batch script from a step", "half set"],
)
def test_what_would_wait_for_ever_is_refused(environment: dict[str, str], message: str) -> None:
    os.environ.update(environment)
    with pytest.raises(UserError, match=re.escape(message)):
        world.find_rank_info()


def test_a_slurm_job_of_one_task_and_a_launcher_in_a_script_train() -> None:
    os.environ.update(JOB | {"SLURM_NTASKS": "1"})
    assert world.find_rank_info() == world.RankInfo(0, 1, 0)
    os.environ.update(JOB | {"RANK": "2", "WORLD_SIZE": "8", "LOCAL_RANK": "2"})  # torchrun
    assert world.find_rank_info() == world.RankInfo(2, 8, 2)


@pytest.mark.parametrize(
    ("environment", "by", "message"),
    [
        (
            {"RANK": "1"},
            "RANK",
            "RANK and WORLD_SIZE = 4 are set, but not MASTER_ADDR and MASTER_PORT; set MASTER_ADDR",
        ),
        ({"RANK": "1", "MASTER_ADDR": "n1"}, "RANK", "but not MASTER_PORT; set"),
        (STEP | {"SLURM_DISTRIBUTION": "arbitrary"}, "SLURM_PROCID", "does not tell the host of task 0 .*arbitrary"),
        (STEP | {"MASTER_ADDR": "localhost"}, "SLURM_PROCID", "MASTER_ADDR = localhost is every host itself"),
        (
            {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "RANK",
            "the ranks are on several hosts; set it to the name or address of rank 0's host",
        ),
    ],
    ids=["by hand", "without a port", "arbitrary", "srun at localhost", "torchrun at loopback"],
)
def test_an_address_that_is_missing_or_wrong_is_named(environment: dict[str, str], by: str, message: str) -> None:
    os.environ.update(environment)
    with pytest.raises(UserError, match=message):
        found(by)


def test_a_name_without_an_address_is_refused_at_once(environ: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(-2, "Name or service not known")

    environ.setattr("socket.getaddrinfo", fails)
    for environment in (STEP, STEP | {"SLURM_STEP_NUM_NODES": "1", "MASTER_ADDR": "n08", "MASTER_PORT": "1"}):
        os.environ.update(environment)
        with pytest.raises(UserError, match=r"MASTER_ADDR = n08, the host of rank 0, has no address on .* not known"):
            found()


def test_a_loopback_name_of_rank_0_does_not_become_its_interface(environ: pytest.MonkeyPatch) -> None:
    """Debian's /etc/hosts gives a host's own name 127.0.1.1: gloo would offer that to the other hosts."""
    os.environ.update(STEP | {"MASTER_ADDR": "n08"})
    routes = {"n08": "lo", "n09": "eth1"}
    environ.setattr(first_rank, "interface_towards", routes.get)
    assert world.interface("", 4) == "eth1" and world.interface("ib0", 4) == "ib0"


def test_mpi_ranks_on_one_host_ask_nobody() -> None:
    os.environ.update({"MPI_LOCALNRANKS": "4", "PMI_RANK": "3"})
    assert on_one_host(4) and not on_one_host(8)
    assert found("PMI_RANK")[0] == "127.0.0.1"


def test_rank_0_without_routes_and_names_has_its_only_address_or_says_what_is_missing(
    environ: pytest.MonkeyPatch,
) -> None:
    """Of mpirun on several hosts whose network knows no names: it was a traceback on rank 0."""

    def fails(*_: object) -> None:
        raise OSError(-3, "Temporary failure in name resolution")

    def addresses(*own: str) -> dict[str, list[SimpleNamespace]]:
        every = ("127.0.0.1", *own)
        return {address: [SimpleNamespace(family=socket.AF_INET, address=address)] for address in every}

    environ.setattr("socket.socket.connect", fails)
    environ.setattr("socket.gethostbyname", fails)
    environ.setattr("psutil.net_if_addrs", lambda: addresses("10.0.0.1"))
    assert first_rank._own_address(["other"]) == "10.0.0.1"
    environ.setattr("psutil.net_if_addrs", lambda: addresses("10.0.0.1", "10.0.1.1"))
    said = first_rank._own_address_and_port(["other"])
    assert isinstance(said, str) and said.endswith(
        "has neither a route to the others nor an address of its own name (Temporary failure in name resolution); "
        "set MASTER_ADDR to an address that all hosts reach"
    )


def test_rank_0_says_who_is_waited_for_and_then_gives_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "SAY_S", 0.0)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with caplog.at_level(logging.WARNING, "llama_ds"), pytest.raises(UserError) as late:
        joining.open_store(0, 3, 0, timedelta(seconds=0.5), ["a", "b", "b"])
    place = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    assert caplog.messages[0].startswith(f"waiting for 2 of 3 ranks (1 and 2 on b) at {place}, for ")
    assert str(late.value).startswith(
        f"2 of 3 ranks (1 and 2 on b) did not connect to rank 0 at {place} within 0:00:00"
    )


def test_a_port_that_was_taken_meanwhile_is_no_mistake() -> None:
    """A supervisor ends a job for good after a mistake; with another port the job goes on."""
    with socket.socket() as other:
        other.bind(("", free_port()))
        other.listen()
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(other.getsockname()[1]))
        with pytest.raises(
            NotJoined, match=r"cannot listen at MASTER_ADDR:MASTER_PORT = .* address already in use"
        ) as no:
            joining.open_store(0, 2, 0, MINUTE)
    assert no.value.kind == attempt.FAILURE != attempt.MISTAKE


def test_a_rank_without_an_answer_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "SAY_S", 0.005)
    heard = ""
    with joining.saying(lambda seconds: f"no answer for {seconds:.0f} s"):
        while not heard:
            heard = capsys.readouterr().err
    assert heard.startswith("no answer for ")


def test_ranks_that_all_come_do_not_wait() -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    threads = [threading.Thread(target=joining.open_store, args=(rank, 3, rank, MINUTE)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    store = joining.open_store(0, 3, 0, MINUTE)
    for thread in threads:
        thread.join()
    assert store.check(["all", "host/2"])
