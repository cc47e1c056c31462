"""Hosts on one Linux machine: namespaces for network, processes, mounts and host name, each with its own sshd.

They share the machine's files, as a cluster shares its file system. Needs root, iproute2 and openssh-server.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
}
TIMEOUT_S = 120.0  # for the start of a host on a busy machine


def missing() -> str | None:
    """Return the reason why this machine cannot create such hosts, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "root on Linux is needed to make hosts of network namespaces"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)]
    return f"not installed: {', '.join(absent)}" if absent else None


class Hosts:
    """A context in which hosts `node1`, `node2`, ... exist, reachable by ssh with `environment` only."""

    def __init__(self, count: int, folder: Path, subnet: int = 98, before: str = "") -> None:
        """Files go to `folder`; hosts have the addresses from 10.`subnet`.0.1, this machine 10.`subnet`.0.254.

        `before` are shell commands that each host runs first, when it is started or restarted.
        """
        self.names = [f"node{i + 1}" for i in range(count)]
        self.folder, self.subnet, self._before = folder, subnet, before
        self._tag = f"{os.getpid() % 10**6}"
        self._bridge = f"lb{self._tag}"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True, exist_ok=True)
        os.makedirs("/run/sshd", exist_ok=True)
        for key in ("host_key", "key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        (self.folder / "authorized_keys").write_bytes((self.folder / "key.pub").read_bytes())
        try:
            _run("ip", "link", "add", self._bridge, "type", "bridge")
            _run("ip", "address", "add", f"{self.machine}/24", "dev", self._bridge)
            _run("ip", "link", "set", self._bridge, "up")
            for name in self.names:
                self._wire(name)
                self.start(name)
            self._write_ssh_config()
            for name in self.names:
                self.wait_for(name)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    @property
    def machine(self) -> str:
        """The address by which hosts see this machine."""
        return f"10.{self.subnet}.0.254"

    @property
    def ssh_config(self) -> Path:
        """The ssh configuration for the hosts."""
        return self.folder / "ssh_config"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which ssh and pdsh reach the hosts."""
        return {"PDSH_SSH_ARGS_APPEND": f"-F {self.ssh_config}"}

    def address(self, name: str) -> str:
        """Return a host's address."""
        return f"10.{self.subnet}.0.{self.names.index(name) + 1}"

    def start(self, name: str, before: str = "") -> None:
        """Start a host, after the shell commands `before` in its namespaces, such as private mounts."""
        config = self.folder / f"{name}.sshd"
        config.write_text(
            f"ListenAddress {self.address(name)}\nHostKey {self.folder / 'host_key'}\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {self.folder / 'authorized_keys'}\nStrictModes no\nPasswordAuthentication no\n"
            "MaxStartups 200\nMaxSessions 200\nPermitRootLogin yes\n"
            f"SetEnv HOME={self.folder}\n"  # skips the user's shell startup files, which may be slow
        )
        sshd = shutil.which("sshd", path="/usr/sbin:/sbin:" + os.environ["PATH"])
        script = f"hostname {name}; {self._before}\n{before}\nexec {sshd} -D -e -f {config}"
        isolate = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
        with open(self.folder / f"{name}.log", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["ip", "netns", "exec", self._namespace(name), *isolate],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def restart(self, name: str, before: str = "") -> None:
        """Power a host off and start it again."""
        self.power_off(name)
        self.start(name, before)
        self.wait_for(name)

    def wait_for(self, name: str) -> None:
        """Wait until the sshd of a started host takes connections."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            with suppress(OSError), socket.create_connection((self.address(name), 22), 5):
                return
            assert time.monotonic() < deadline, (self.folder / f"{name}.log").read_text()
            time.sleep(0.05)

    def power_off(self, name: str) -> None:
        """Kill all of a host's processes at once; its sockets send no FIN, because its link is cut first."""
        self.unplug(name)
        if daemon := self._daemons.pop(name, None):
            processes = psutil.Process(daemon.pid).children(recursive=True)
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
            psutil.wait_procs(processes, 60)  # the kernel ends them after their init, and closes their sockets then
        self.plug(name)

    def unplug(self, name: str) -> None:
        """Cut a host's link: the host keeps running but is unreachable."""
        _run("ip", "link", "set", self._cable(name), "down")

    def plug(self, name: str) -> None:
        """Restore a host's link."""
        _run("ip", "link", "set", self._cable(name), "up")

    def run(self, name: str, command: str) -> None:
        """Run a command in a host's network."""
        _run("ip", "netns", "exec", self._namespace(name), *command.split())

    def processes(self, name: str, word: str) -> list[psutil.Process]:
        """Return the living processes of a host with `word` in their command line."""
        found = []
        space = _namespace_of(self._init(name))
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and word in " ".join(process.cmdline()) and _namespace_of(process.pid) == space:
                    found.append(process)
        return found

    def write_hostfile(self, path: Path, slots: int, names: Sequence[str] | None = None) -> Path:
        """Write a hostfile of these hosts."""
        path.write_text("".join(f"{name} slots={slots}\n" for name in names or self.names))
        return path

    def _init(self, name: str) -> int:
        """Return the pid of the host's sshd, which runs in the host's namespaces."""
        daemon = psutil.Process(self._daemons[name].pid)
        return next(child.pid for child in daemon.children(recursive=True))

    def _namespace(self, name: str) -> str:
        return f"llama{self._tag}-{name}"

    def _cable(self, name: str) -> str:
        return f"lv{self._tag}-{self.names.index(name) + 1}"

    def _wire(self, name: str) -> None:
        space, outside = self._namespace(name), self._cable(name)
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "link", "set", outside, "master", self._bridge, "up")
        _run("ip", "-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")
        _run("ip", "-n", space, "link", "set", "lo", "up")

    def _write_ssh_config(self) -> None:
        lines = [f"Host {name}\n  HostName {self.address(name)}\n" for name in self.names]
        common = {
            "IdentityFile": str(self.folder / "key"),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "no",
            "LogLevel": "ERROR",
            "ServerAliveInterval": "3",
            "ServerAliveCountMax": "2",
        }
        lines += ["Host *\n", *(f"  {key} {value}\n" for key, value in common.items())]
        self.ssh_config.write_text("".join(lines))

    def _remove(self) -> None:
        for daemon in self._daemons.values():
            with suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
        for name in self.names:  # delete the cable first: with its namespace the kernel would remove it with a delay
            subprocess.run(["ip", "link", "del", self._cable(name)], capture_output=True)
            subprocess.run(["ip", "netns", "del", self._namespace(name)], capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)


def _namespace_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid_for_children")


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr.strip()}"
