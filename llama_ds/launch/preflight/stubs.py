"""Hundreds of hosts on one machine, to see what asking them all costs: one sshd, with an address of loopback for each.

Such a host is reached as a real one is: its own connection, handshake and processes. What it answers was recorded: of
the probe, run on this machine; its name, the time and what stands in the shared file are put in when it is asked. Needs
root, as sshd does.
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
    """A context in which `names` are hosts for whoever has `environment`."""

    def __init__(self, count: int, folder: Path, settings: PreflightSettings) -> None:
        """Record an answer to what `settings` ask; files go to `folder`."""
        self.names = [f"127.0.{1 + i // 250}.{1 + i % 250}" for i in range(count)]
        self.folder = folder
        text = json.dumps(_recorded(settings)).replace(f'"{TIME}"', TIME)  # a number
        (folder / "answer").write_text(f"\n<preflight>{text}</preflight>\n")
        self.spoil()
        (folder / "host").write_text(_ANSWERING.format(folder=folder))
        (folder / "host").chmod(0o755)

    def spoil(self, hangs: str = "", garbage: str = "") -> None:
        """Have one host hang and one answer garbage from now on, and all others answer well."""
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
        # Not a ListenAddress for each: sshd takes 16. All addresses hear, and only loopback's are let in.
        (self.folder / "sshd_config").write_text(
            f"ListenAddress 0.0.0.0:{port}\nAllowUsers *@127.0.0.0/8\nHostKey {self.folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {self.folder}/key.pub\nForceCommand {self.folder}/host\nUsePAM no\nStrictModes no\n"
            "PasswordAuthentication no\nPermitRootLogin yes\nMaxStartups 4096\n"
            f"SetEnv HOME={self.folder}\n"  # of no start files of a shell, which may take longer than all the rest
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
        """What makes ssh reach the hosts."""
        return {"PDSH_SSH_ARGS_APPEND": f"-F {self.folder}/ssh_config"}

    @property
    def daemon(self) -> psutil.Process:
        """The sshd that is all hosts."""
        return psutil.Process(self._daemon.pid)

    def _end(self) -> None:
        """End sshd, and what hosts still do: what hangs outlives its connection."""
        processes = [*self.daemon.children(recursive=True), self.daemon]
        with suppress(OSError):
            for pid in (self.folder / "hanging").read_text().split():
                with suppress(psutil.Error):
                    if (left := psutil.Process(int(pid))).cmdline() == ["sleep", "300"]:  # not another with its number
                        processes.append(left)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._daemon.wait()


def _recorded(settings: PreflightSettings) -> dict[str, object]:
    """Return what this machine answers, with marks where hosts and questions differ."""
    said = remote.on_hosts(["localhost"], [sys.executable, "-I", "-"], question(settings, []))["localhost"]
    value = answer.read(said.out, "preflight", answer.ANSWER)
    if value is None:
        raise UserError(f"stub hosts: this machine's own answer is none: {said.problem or said.out[:200]!r}")
    return value | {"hostname": HOST, "address": HOST, "shared": {PATH: NONCE}, "time": TIME}
