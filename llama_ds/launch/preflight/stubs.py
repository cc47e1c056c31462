"""Hundreds of simulated hosts on one machine, to measure the preflight's cost: one sshd, a loopback address per host.

Each stub host has a real connection, handshake and processes. Its answer is a recording of the probe on this machine,
with the host's name, the time and the content of the shared file inserted. Needs root, as sshd does.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from llama_ds.errors import UserError
from llama_ds.launch import remote
from llama_ds.launch.preflight import answer
from llama_ds.launch.preflight.examine import PreflightSettings, question

HOST, NONCE, PATH, TIME = "@HOST@", "@NONCE@", "@PATH@", "@TIME@"
_ANSWERING = """#!/bin/sh
set -- $SSH_CONNECTION
case " $(cat {folder}/hangs) " in *" $3 "*) echo $$ >>{folder}/hanging; exec sleep 300 ;; esac
case " $(cat {folder}/garbage) " in *" $3 "*) exec head -c 5000000 /dev/urandom ;; esac
path=$(sed -n 's/^REQUEST = .*"shared": \\["\\([^"]*\\)"\\].*/\\1/p')
exec sed "s|@HOST@|$3|g; s|@PATH@|$path|; s|@NONCE@|$(cat "$path")|; s|@TIME@|$(date +%s.%N)|" {folder}/answer
"""


class StubHosts:
    """A context in which ssh with `environment` reaches the hosts `names`."""

    def __init__(self, count: int, folder: Path, settings: PreflightSettings) -> None:
        """Record the answer to a preflight with `settings`; files go to `folder`."""
        self.names = [f"127.0.{1 + i // 250}.{1 + i % 250}" for i in range(count)]
        self.folder = folder
        text = json.dumps(_recorded(settings)).replace(f'"{TIME}"', TIME)  # a number
        (folder / "answer").write_text(f"\n<preflight>{text}</preflight>\n")
        self.spoil()
        (folder / "host").write_text(_ANSWERING.format(folder=folder))
        (folder / "host").chmod(0o755)

    def spoil(self, hangs: str = "", garbage: str = "") -> None:
        """From now on, let the hosts `hangs` hang and `garbage` answer garbage; all others answer correctly."""
        (self.folder / "hangs").write_text(hangs)
        (self.folder / "garbage").write_text(garbage)

    def __enter__(self) -> StubHosts:
        sshd = shutil.which("sshd", path=f"/usr/sbin:/sbin:{os.environ.get('PATH', os.defpath)}")
        if os.geteuid() or not sshd:
            raise UserError("stub hosts: root and the package openssh-server are needed")
        os.makedirs("/run/sshd", exist_ok=True)
        for key in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        # sshd supports only 16 ListenAddress lines, so it listens on all addresses and accepts users from loopback.
        (self.folder / "sshd_config").write_text(
            f"ListenAddress 0.0.0.0:{port}\nAllowUsers *@127.0.0.0/8\nHostKey {self.folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {self.folder}/key.pub\nForceCommand {self.folder}/host\nUsePAM no\nStrictModes no\n"
            "PasswordAuthentication no\nPermitRootLogin yes\nMaxStartups 4096\n"
            f"SetEnv HOME={self.folder}\n"  # skips the user's shell startup files, which may be slow
        )
        (self.folder / "ssh_config").write_text(
            f"Host 127.0.*\n  Port {port}\n  IdentityFile {self.folder}/key\n  IdentitiesOnly yes\n  LogLevel ERROR\n"
            "  UserKnownHostsFile /dev/null\n  StrictHostKeyChecking no\n"
        )
        with open(self.folder / "sshd.log", "ab") as log:
            self._daemon = subprocess.Popen(
                [sshd, "-D", "-e", "-f", self.folder / "sshd_config"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection((self.names[0], port), 1).close()
                return self
            except OSError:
                if time.monotonic() > deadline or self._daemon.poll() is not None:
                    self._end()
                    raise UserError(f"stub hosts: {(self.folder / 'sshd.log').read_text().strip()}") from None
                time.sleep(0.05)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which ssh reaches the hosts."""
        return {"PDSH_SSH_ARGS_APPEND": f"-F {self.folder}/ssh_config"}

    @property
    def daemon(self) -> psutil.Process:
        """The sshd that serves all hosts."""
        return psutil.Process(self._daemon.pid)

    def _end(self) -> None:
        """Kill sshd and the hosts' remaining processes: a hanging process outlives its connection."""
        processes = [*self.daemon.children(recursive=True), self.daemon]
        with suppress(OSError):
            for pid in (self.folder / "hanging").read_text().split():
                with suppress(psutil.Error):
                    if (left := psutil.Process(int(pid))).cmdline() == ["sleep", "300"]:  # the pid may have been reused
                        processes.append(left)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._daemon.wait()


def _recorded(settings: PreflightSettings) -> dict[str, object]:
    """Return this machine's answer, with placeholders for the values that differ by host and question."""
    reply = remote.on_hosts(["localhost"], [sys.executable, "-I", "-"], question(settings, []))["localhost"]
    value = answer.read(reply.out, "preflight", answer.ANSWER)
    if value is None:
        raise UserError(f"stub hosts: this machine's own answer is invalid: {reply.problem or reply.out[:200]!r}")
    return value | {"hostname": HOST, "address": HOST, "shared": {PATH: NONCE}, "time": TIME}
