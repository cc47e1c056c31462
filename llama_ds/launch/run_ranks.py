"""Runs a script on all slots of some hosts by DeepSpeed's launcher, without supervision: for measurements."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_ds.child_processes import run_child
from llama_ds.job.devices import visible_devices
from llama_ds.launch.command import build, devices_export, runner_environment
from llama_ds.launch.deepspeed_env import read_deepspeed_env
from llama_ds.launch.hostfile import write_hostfile
from llama_ds.launch.remote import local_host
from llama_ds.launch.rendezvous import arrange


def run_ranks(
    script: str,
    arguments: Sequence[str],
    hosts: Mapping[str, int],
    folder: Path,
    *,
    launcher: str = "pdsh",
    exports: Mapping[str, str] | None = None,
    nic: str = "",
    ssh_port: int | None = None,
) -> int:
    """Run `script` with `arguments`, passed in a file with one per line, and return the launcher's exit code.

    The ranks' output goes to stderr. All hosts must see `folder`. Variables of .deepspeed_env reach the ranks as in
    tools/launch.py, without those that may be secret: measurements need none.

    Raises:
        UserError: the first host does not answer, .deepspeed_env cannot be read, or a word would not arrive unchanged.
    """
    from_files = read_deepspeed_env(os.environ)
    if remark := from_files.remark("without {}, which may be secret"):
        print(remark, file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: str((folder / name).resolve()) for name in ("hostfile", "arguments", "environment")}
    write_hostfile(paths["hostfile"], dict(hosts))
    Path(paths["arguments"]).write_text("".join(f"{line}\n" for line in arguments), encoding="utf-8")
    chosen = visible_devices({host: range(slots) for host, slots in hosts.items()}, local_host(hosts), os.environ)
    rendezvous = arrange(list(hosts), nic, ssh_port=ssh_port)
    command = build(
        launcher=launcher,
        hostfile=paths["hostfile"],
        hosts=hosts,
        script=script,
        arguments_file=paths["arguments"],
        master_addr=rendezvous.master,
        master_port=rendezvous.port,
        exports={**(exports or {}), **from_files.exports, **devices_export(hosts, chosen)},
        env_file=paths["environment"],
        python=sys.executable,
        working_folder=os.path.realpath(os.getcwd()),
        nic=nic,
        ssh_port=ssh_port,
        own_address=rendezvous.listen,
    )
    Path(paths["environment"]).write_text(command.env_text, encoding="utf-8")
    environment = runner_environment(command, os.environ, launcher)
    done = run_child(
        command.argv, env=environment, cwd=command.working_folder, stdin=subprocess.DEVNULL, stdout=sys.stderr
    )
    return done.returncode
