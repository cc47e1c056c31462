"""Train on two hosts with MPICH's or Intel MPI's mpirun. Usage: in_mpi.py FOLDER mpich|impi

FOLDER is for files. By tools/launch.py and by plain mpirun, the losses equal those of one host to the bit; on SIGTERM
to the launcher the ranks save and end.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

from cluster import start
from launching import TRAIN, forked, succeed
from tiny_run import build_corpus, write_run

from tests.hosts import Hosts, missing

LAYOUT = {"parallel.pp": 2, "training.steps": 12, "checkpoint.interval": 5}
ENDLESS = {"parallel.pp": 2, "training.steps": 10**6}
NAMES = ["node1", "node2"]
SUBNET = 87
# Among namespaces of one machine, the shared memory that both MPIs would choose does not connect.
TRANSPORT = {"mpich": {"UCX_TLS": "tcp,self"}, "impi": {"FI_PROVIDER": "tcp"}}
EXTRA_SSH = {"mpich": "HYDRA_LAUNCHER_EXTRA_ARGS", "impi": "I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS"}


def main(folder: Path, kind: str) -> None:
    """Run all checks."""
    if reason := missing():
        sys.exit(f"error: {reason}")
    folder = folder.with_name(f"{folder.name}-{kind}")
    folder.mkdir()
    os.environ.update(TRANSPORT[kind])
    exports = [word for name, value in TRANSPORT[kind].items() for word in ("--export", f"{name}={value}")]
    corpus = build_corpus(folder)
    alone = write_run(folder, "alone", corpus, LAYOUT)
    succeed(forked(4, TRAIN, alone.file), alone.log)
    with Hosts(2, folder / "hosts", subnet=SUBNET, before=f"mount --bind {_names(folder)} /etc/hosts") as hosts:
        launched = write_run(folder, "launched", corpus, LAYOUT)
        job = start(launched, hosts, NAMES, 2, "--launcher", kind, *exports)
        assert job.finish() == 0, job.output[-4000:]
        assert launched.losses == alone.losses

        plain = write_run(folder, "plain", corpus, LAYOUT)
        os.environ[EXTRA_SSH[kind]] = f"-F {hosts.ssh_config}"
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in an activated environment
        succeed([*mpirun(kind, hosts), sys.executable, TRAIN, str(plain.file)], plain.log)
        assert plain.losses == alone.losses

        saved = write_run(folder, "saved", corpus, ENDLESS)
        job = start(saved, hosts, NAMES, 2, "--launcher", kind, *exports)
        try:
            job.wait_for_steps(3)
            job.process.send_signal(signal.SIGTERM)
            assert job.finish() == 0, job.output[-4000:]
        finally:
            job.kill()
        assert saved.newest.is_dir()
        assert not job.left_running()
    print(f"{kind}: two hosts by tools/launch.py and by mpirun equal one host, and save on SIGTERM")


def mpirun(kind: str, hosts: Hosts) -> list[str]:
    """Return the command of plain mpirun for two ranks on each host."""
    own = ["-localhost", hosts.machine] if kind == "mpich" else []
    return ["mpirun", *own, "-ppn", "2", "-n", "4", "-hosts", ",".join(NAMES)]


def _names(folder: Path) -> Path:
    """Write the hosts' /etc/hosts: Intel MPI gives them the name of this machine."""
    addresses = {socket.gethostname(): f"10.{SUBNET}.0.254"} | {
        n: f"10.{SUBNET}.0.{i + 1}" for i, n in enumerate(NAMES)
    }
    path = folder / "names"
    path.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items()))
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
