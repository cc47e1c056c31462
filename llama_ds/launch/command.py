"""The command that starts DeepSpeed's runner, which starts the ranks on all hosts.

`build` is a pure function of its arguments. The runner executes, by launcher:

    pdsh            ssh to each host: `export K=V; cd FOLDER; python -u -m deepspeed.launcher.launch .. SCRIPT @FILE`
    local           the same launch.py on this machine, without a shell, in the runner's own environment
    openmpi         mpirun -hostfile F -x K=V .. python -u SCRIPT @FILE; sets no MASTER_ADDR
    mpich, impi     mpirun -ppn S -genv K=V -hosts H,.. python -u [helper] SCRIPT @FILE
    slurm           srun -n N --export=ALL,.. python -u SCRIPT @FILE; sets no MASTER_ADDR, takes no list of hosts

With every launcher, rank r runs on host r // slots, in the order of the hostfile.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llama_ds.errors import UserError, did_you_mean
from llama_ds.job import devices
from llama_ds.launch import words

LAUNCHERS = ("pdsh", "openmpi", "mpich", "slurm", "impi")
MAX_WORD = 128 * 1024  # Linux: MAX_ARG_STRLEN
MAX_COMMAND = 2 * 1024 * 1024  # Linux: ARG_MAX, a quarter of the usual 8 MiB of stack, argv and environment together

# DeepSpeed exports every variable of the runner's environment with these prefixes; NCCL only if it finds CUDA.
FORWARDED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
_EXPORTED = ("NCCL_", "GLOO_", "TORCH_", "UCX_", "OMPI_ALLOW_", "HF_HUB_OFFLINE", "CUDA_DEVICE_MAX_CONNECTIONS")
_EXPORTED_NAMES = ("DS_ACCELERATOR", devices.BACKEND, "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
_EQUAL_SLOTS = ("mpich", "impi", "slurm")
_NEEDS_MASTER = ("openmpi", "slurm")  # DeepSpeed does not pass --master_addr to the ranks of these
_SSH_ARGUMENTS = {  # the environment variable from which a launcher reads its ssh arguments
    "pdsh": "PDSH_SSH_ARGS_APPEND",
    "openmpi": "PRTE_MCA_plm_ssh_args",
    "mpich": "HYDRA_LAUNCHER_EXTRA_ARGS",
    "impi": "I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS",
}


@dataclass(frozen=True)
class Command:
    """A command with its environment, its environment file and its working folder."""

    argv: list[str]  # command line of DeepSpeed's runner
    environment: dict[str, str]  # variables added to the runner's environment
    env_file: str  # path of the file with env_text, to be written before the start
    env_text: str  # lines KEY=VALUE that the runner exports to the ranks; any other line, even a blank one, crashes it
    working_folder: str
    programs: str = ""  # folder in which the runner looks for mpirun first; "": the interpreter's
    exports: dict[str, str] = field(default_factory=dict)  # the variables that reach the ranks
    master_addr: str = ""
    master_port: int = 0


def build(
    *,
    launcher: str,
    hostfile: str,
    hosts: Mapping[str, int],
    script: str,
    arguments_file: str,
    master_addr: str,
    master_port: int,
    exports: Mapping[str, str],
    env_file: str,
    python: str,
    working_folder: str,
    nic: str = "",
    ssh_port: int | None = None,
    ssh_args: str = "",
    launcher_args: Sequence[str] = (),
    force_multi: bool = False,
    mpirun: str = "",
    own_address: str = "",
) -> Command:
    """Return the command that runs `script @arguments_file` on all slots of the `hosts` of `hostfile`.

    `python` is the interpreter of this machine and, at the same path, of all hosts: the runner uses its own.
    `working_folder` is a real path (os.path.realpath), because the runner uses os.getcwd(). `exports` reach the ranks
    and the programs that start them. `ssh_args` are additional ssh arguments, such as "-F /path/config"; pdsh inherits
    PDSH_SSH_ARGS_APPEND and slurm uses no ssh. `force_multi` uses pdsh for a single host, if it is not this machine.
    `mpirun` is the path of the mpirun to use; without it, the one beside `python` comes before those on PATH.
    `own_address` is this machine's for the hosts; MPICH else gives them its name, which may not resolve there.

    Raises:
        UserError: a value would not arrive unchanged, is a secret, slots differ where they must be equal, or the
            command exceeds a limit of Linux.
    """
    way = _checked_launcher(launcher, hosts, force_multi)
    _check_hosts(way, hostfile, hosts)
    words.address("master address", master_addr)
    for option, port in (("--master_port", master_port), ("--ssh_port", ssh_port)):
        if port is not None and not 0 < port < 65536:
            raise UserError(f"{option}: {port} is not a port; give one of 1 to 65535")
    paths = {"the hostfile": hostfile, "the script": script, "the arguments' file": arguments_file}
    paths |= {"the environment's file": env_file, "python": python, "the working folder": working_folder}
    for name, value in paths.items():
        words.path(name, value, way)
    exported = _exported(way, exports, nic, master_addr, master_port)
    own_args = _launcher_args(way, hosts, nic, words.launcher_arguments(launcher_args, launcher))
    if way == "mpich" and own_address:
        own_args = ["-localhost", words.address("this machine's address", own_address), *own_args]

    argv = [python, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}", f"--launcher={launcher}"]
    argv += [f"--master_addr={master_addr}", f"--master_port={master_port}"]
    argv += ["--no_ssh_check", "--no_local_rank", "--log_level=warning"]
    argv += [] if way == "local" else ["--force_multi"]
    argv += [f"--ssh_port={ssh_port}"] if way == "pdsh" and ssh_port else []
    argv += [f"--launcher_args={shlex.join(own_args)}"] if own_args else []
    argv += [script, f"@{arguments_file}"]

    by_inheritance = way in ("local", "slurm")  # launch.py on this machine; srun --export=ALL
    environment = dict(exported) if by_inheritance else {}
    environment["DS_ENV_FILE"] = env_file  # always set: otherwise the runner would read the user's ~/.deepspeed_env
    environment |= _ssh_environment(way, ssh_args, ssh_port)
    # mpirun itself needs these, and -x passes them only to the ranks
    environment |= {k: v for k, v in exported.items() if way == "openmpi" and k.startswith("OMPI_ALLOW_RUN_AS_ROOT")}
    text = "" if by_inheritance else "".join(f"{k}={v}\n" for k, v in exported.items())
    programs = os.path.dirname(mpirun)
    command = Command(argv, environment, env_file, text, working_folder, programs, exported, master_addr, master_port)
    _check_size(way, command, hosts)
    return command


def inherited(environ: Mapping[str, str], launcher: str) -> dict[str, str]:
    """Return the environment for the runner: `environ` without the variables that must not appear in an argv.

    DeepSpeed forwards some variables on its own (`FORWARDED`). Secrets among them, such as MLFLOW_TRACKING_TOKEN, are
    removed. Variables of NCCL and UCX are removed too: they are passed as `exports` or not at all, whether or not this
    machine has CUDA.

    Raises:
        UserError: a forwarded variable would not arrive unchanged.
    """
    kept = {}
    for name, value in environ.items():
        forwarded = name.startswith(FORWARDED)
        if forwarded and (words.is_secret(name) or name.startswith(("NCCL", "UCX"))):
            continue
        if forwarded and launcher != "local":
            words.value_of(f"environment variable {name}", name, value, "openmpi" if launcher == "slurm" else launcher)
            _check_commas(launcher, name, value)
        kept[name] = value
    return kept


def exported_to_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `environ` to export to the ranks on all hosts."""
    return {k: v for k, v in environ.items() if k.startswith(_EXPORTED) or k in _EXPORTED_NAMES}


def exported_by_runner(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that DeepSpeed's runner, started here by pdsh, exports to the ranks on its own."""
    found = {name: value for name, value in inherited(environ, "pdsh").items() if name.startswith(FORWARDED)}
    folders = (os.path.realpath(os.getcwd()), *filter(None, [environ.get("PYTHONPATH")]))
    return found | {"PYTHONPATH": ":".join(folders)}


def devices_export(hosts: Mapping[str, int], chosen: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that passes the hosts' CUDA devices to the ranks, if any of `hosts` has its own."""
    text = devices.encode(hosts, chosen)
    return {devices.VARIABLE: text} if text else {}


def runner_environment(command: Command, environ: Mapping[str, str], launcher: str) -> dict[str, str]:
    """Return the complete environment for `command`, started from a process with `environ`.

    DeepSpeed searches PATH for mpirun; the one of an MPI wheel is in the interpreter's folder.
    """
    environment = inherited(environ, launcher) | command.environment
    first = command.programs or os.path.dirname(command.argv[0])
    environment["PATH"] = f"{first}:{environment.get('PATH', os.defpath)}"
    return environment


def runner_command(command: Command) -> str:
    """Return a shell script that is equivalent to starting `command`."""
    lines = shlex.join(command.env_text.splitlines())
    write = f"printf '%s\\n' {lines}" if lines else ":"
    variables = [f"{name}={value}" for name, value in command.environment.items()]
    return (
        f"{write} > {shlex.quote(command.env_file)}\n"
        f"cd {shlex.quote(command.working_folder)}\n"
        f"{shlex.join(['env', *variables, *command.argv])}\n"
    )


def _checked_launcher(launcher: str, hosts: Mapping[str, int], force_multi: bool) -> str:
    """Return the launcher, or "local" for a single host under pdsh that is this machine.

    The runner would start a single host locally with every launcher; for srun and mpirun it is forced not to, because
    the host in the hostfile may be another machine.
    """
    if launcher not in LAUNCHERS:
        known = ", ".join(LAUNCHERS)
        raise UserError(f"--launcher: {launcher!r} is unknown{did_you_mean(launcher, LAUNCHERS)}; give one of {known}")
    return "local" if launcher == "pdsh" and len(hosts) == 1 and not force_multi else launcher


def _check_hosts(way: str, hostfile: str, hosts: Mapping[str, int]) -> None:
    if not hosts:
        raise UserError(f"{hostfile}: lists no host; write one HOST slots=N per line, as in node001 slots=8")
    for host, slots in hosts.items():
        words.host(hostfile, host)
        if slots < 1:
            raise UserError(f"{hostfile}: host {host} has slots={slots}; give its number of devices or take it out")
    first, slots = next(iter(hosts.items()))
    others = [f"{host} has {count}" for host, count in hosts.items() if count != slots]
    if way in _EQUAL_SLOTS and others:
        more = f" and {len(others) - 3} more hosts differ" if len(others) > 3 else ""
        raise UserError(
            f"{hostfile}: {way} needs the same slots on every host, and {first} has {slots},"
            f" {', '.join(others[:3])}{more}; make them equal or use --launcher pdsh or openmpi"
        )


def _exported(way: str, exports: Mapping[str, str], nic: str, master_addr: str, master_port: int) -> dict[str, str]:
    """Return the variables to export to the ranks, in the given order."""
    exported = dict(exports)
    if nic:
        words.nic("--nic", nic)
        exported = {"NCCL_SOCKET_IFNAME": nic, "GLOO_SOCKET_IFNAME": nic} | exported
    if way in _NEEDS_MASTER:
        exported |= {"MASTER_ADDR": master_addr, "MASTER_PORT": str(master_port)}
    for name, value in exported.items():
        words.variable("exports", name)
        words.value_of("exports", name, value, way)
        if name.startswith(FORWARDED):
            _check_commas(way, name, value)
    return exported


def _check_commas(way: str, name: str, value: str) -> None:
    """Reject values with commas, which srun's --export=ALL,K=V cannot quote: a comma ends V there."""
    if way == "slurm" and not set(value) <= words.PLAIN - {","}:
        raise UserError(
            f"exports: srun would cut the value of {name} at a comma, and keep quotes in it;"
            " set it in the ranks (the job's own environment file) or give one value"
        )


def _launcher_args(way: str, hosts: Mapping[str, int], nic: str, given: list[str]) -> list[str]:
    """Return the arguments of the launcher itself: ours, then the user's."""
    ours: list[str] = []
    if way == "openmpi":
        # DeepSpeed defaults to eth0; an empty word leaves the choice to Open MPI. The interface of the daemons' own
        # connections is not set: mpirun would fail if the launching machine has no NIC of that name.
        ours += ["--mca", "btl_tcp_if_include", nic, "--map-by", "slot"]
        ours += [] if {"--bind-to", "-bind-to"} & set(given) else ["--bind-to", "none"]
    if way == "slurm":
        # srun sorts the hosts of a list; only `arbitrary` keeps its order and takes one name per task. srun then
        # counts the nodes itself, and rejects --nodes.
        listed = ",".join(host for host, slots in hosts.items() for _ in range(slots))
        ours += [f"--nodelist={listed}", "--distribution=arbitrary", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    return ours + given


def _ssh_environment(way: str, ssh_args: str, ssh_port: int | None) -> dict[str, str]:
    """Return the variables that pass arguments to the launcher's ssh."""
    try:
        given = shlex.split(ssh_args)
    except ValueError as error:
        raise UserError(f"ssh's arguments: {ssh_args!r}: {error}; close the quotes") from None
    for word in given:  # MPI launchers split at spaces, even in quotes, and PRRTE's tree passes them to shells
        words.plain("ssh's arguments", word, "openmpi" if way != "pdsh" else way)
    if ssh_port and way in ("openmpi", "mpich", "impi"):
        given += ["-p", str(ssh_port)]
    variables = {_SSH_ARGUMENTS[way]: " ".join(given)} if given and way in _SSH_ARGUMENTS else {}
    # Without a tree spawn all connections start here, as with pdsh, so that hosts need no ssh to each other.
    return variables | ({"PRTE_MCA_plm_ssh_no_tree_spawn": "1"} if way == "openmpi" else {})


def _check_size(way: str, command: Command, hosts: Mapping[str, int]) -> None:
    """Reject a command that exceeds the kernel's limits, here or on the hosts."""
    world_info = 4 * len(json.dumps({host: list(range(slots)) for host, slots in hosts.items()})) // 3
    longest = max(len(word) for word in command.argv)
    total = sum(len(word) + 9 for word in command.argv)  # 9: the NUL and a pointer
    if way == "pdsh":  # ssh joins the words of the remote command into one
        longest = max(longest, world_info + len(command.env_text) + 8 * command.env_text.count("\n") + total)
    if way == "impi":  # every rank adds `: -n 1 -env RANK r -env LOCAL_RANK l python -u SCRIPT @FILE`
        total += sum(hosts.values()) * (sum(len(word) for word in [command.argv[0], *command.argv[-2:]]) + 15 * 9 + 50)
    if longest >= MAX_WORD or total >= MAX_COMMAND * 3 // 4:  # the rest is reserved for the environment
        raise UserError(
            f"--launcher {way}: {sum(hosts.values())} ranks on {len(hosts)} hosts make a command of {total} bytes with"
            f" a word of {longest}, more than Linux starts; use shorter names and paths, or another launcher"
        )
