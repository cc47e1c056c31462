"""The launcher's command, tested with DeepSpeed's own runner and real shells.

The golden files hold, for each launcher at 256 hosts with 8 slots, our argv and the command that DeepSpeed's runner
started, recorded by programs that replace pdsh, mpirun and srun. After an intended change:
`GOLDEN_UPDATE=1 .venv/bin/python -m pytest tests/launch/test_command.py -k golden`, and read the diff.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import pytest
from deepspeed.launcher import multinode_runner, runner
from deepspeed.utils import logger
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_ds.errors import UserError
from llama_ds.launch.command import FORWARDED, LAUNCHERS, MAX_COMMAND, MAX_WORD, Command, build, inherited
from llama_ds.launch.command import runner_command as displayed
from llama_ds.launch.hostfile import parse_hostfile

REPO = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden")
HOSTFILE = str(REPO / "hostfiles" / "256x8")
HOSTS = parse_hostfile(HOSTFILE)
EXPORTS = {"LLAMA_DS_JOB": "/job/17", "OMP_NUM_THREADS": "4", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_DEBUG": "WARN"}
ARGUMENTS = {
    "launcher": "pdsh",
    "hostfile": HOSTFILE,
    "hosts": HOSTS,
    "script": str(REPO / "llama_ds" / "train.py"),
    "arguments_file": "/job/17/arguments",
    "master_addr": "10.0.0.1",
    "master_port": 29500,
    "exports": EXPORTS,
    "env_file": "/job/17/environment",
    "python": sys.executable,
    "working_folder": str(REPO),
}
# Replaces pdsh, mpirun and srun, and records its argv and its environment.
RECORDER = """\
#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" > "$RECORD"
env -0 > "$RECORD.env"
"""


def command(**changes: object) -> Command:
    return build(**{**ARGUMENTS, **changes})  # type: ignore[arg-type]


@dataclass
class Started:
    """The command that DeepSpeed's runner started."""

    argv: list[str]
    environment: dict[str, str]

    @property
    def bytes(self) -> int:
        """The bytes of argv that count against ARG_MAX."""
        return sum(len(word) + 1 + 8 for word in self.argv)


class Runner:
    """DeepSpeed's runner in this process, with recording programs instead of the launchers'."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        for name in ("pdsh", "mpirun", "srun", "sinfo", "ompi_info"):
            (folder / name).write_text(RECORDER)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("RECORD", str(folder / "record"))
        for name in os.environ:
            if name.startswith(FORWARDED):
                monkeypatch.delenv(name)

    def start(self, command: Command) -> Started:
        env_file = self.folder / "environment"
        env_file.write_text(command.env_text)
        for name, value in command.environment.items():
            self.monkeypatch.setenv(name, value)
        self.monkeypatch.setattr(runner, "DEEPSPEED_ENVIRONMENT_NAME", str(env_file))  # read once, from DS_ENV_FILE
        self.monkeypatch.chdir(command.working_folder)
        runner.main(command.argv[3:])
        record = self.folder / "record"
        lines = Path(f"{record}.env").read_text().split("\0")[:-1]
        return Started(record.read_text().split("\0")[:-1], dict(line.split("=", 1) for line in lines))


@pytest.fixture
def deepspeed_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """Restore the runner's changes to its process: two signal handlers and its log level."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    level = logger.level
    yield Runner(tmp_path, monkeypatch)
    logger.setLevel(level)
    for number, handler in before.items():
        signal.signal(number, handler)


# --- golden files -----------------------------------------------------------------------------------------------------


def portable(word: str) -> str:
    """A word with placeholders for this machine's paths."""
    placeholders = {
        sys.executable: "<PYTHON>",
        str(REPO): "<REPO>",
        str(Path(deepspeed.__file__).parent): "<DEEPSPEED>",
    }
    for path in sorted(placeholders, key=len, reverse=True):
        word = word.replace(path, placeholders[path])
    return word


def short(word: str) -> str:
    """A portable word, without its middle if it is long."""
    word = portable(word)
    if len(word) < 1000:
        return word or "''"
    digest = hashlib.sha256(word.encode()).hexdigest()[:16]
    return f"{word[:70]} ... {word[-50:]} ({len(word)} characters, sha256 {digest})"


def listed(words: list[str]) -> str:
    """Words, one per line, without the middle of a long list."""
    lines = [short(word) for word in words]
    if len(lines) > 200:
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        lines = [*lines[:100], f"... {len(lines) - 130} words (all: sha256 {digest}) ...", *lines[-30:]]
    return "".join(f"    {line}\n" for line in lines)


def described(ours: Command, theirs: Started) -> str:
    pairs = [f"{name}={value}" for name, value in ours.environment.items()]
    started = Started([portable(word) for word in theirs.argv], {})
    longest = max(len(word) for word in started.argv)
    sizes = f"{len(started.argv)} words, {started.bytes} bytes, longest word {longest}"
    return (
        f"Our argv:\n{listed(ours.argv)}"
        f"Added to its environment:\n{listed(pairs)}"
        f"The environment's file:\n{listed(ours.env_text.splitlines())}"
        f"DeepSpeed starts ({sizes}):\n{listed(theirs.argv)}"
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_golden_commands_at_256_x_8(launcher: str, deepspeed_runner: Runner) -> None:
    ours = command(launcher=launcher, nic="ib0", ssh_port=2222, ssh_args="-F /job/17/ssh_config")
    theirs = deepspeed_runner.start(ours)
    assert all(len(word) < MAX_WORD for word in theirs.argv)
    assert theirs.bytes < MAX_COMMAND // 2
    text = described(ours, theirs)
    golden = GOLDEN / f"{launcher}_256x8.txt"
    if os.environ.get("GOLDEN_UPDATE"):
        golden.write_text(text)
    assert text == golden.read_text()


# --- what the ranks get -----------------------------------------------------------------------------------------------


def exports_of(launcher: str, started: Started) -> dict[str, str]:
    """The variables that the launcher gives to the ranks, read as the launcher reads them."""
    argv = started.argv
    if launcher == "openmpi":
        return dict(argv[i + 1].split("=", 1) for i, word in enumerate(argv) if word == "-x")
    if launcher == "slurm":  # srun cuts at every comma
        (word,) = [word for word in argv if word.startswith("--export=")]
        assert word.startswith("--export=ALL,")
        return {**started.environment, **dict(pair.split("=", 1) for pair in word.split(",")[1:])}
    pairs = [argv[i + 1 : i + 3] for i, word in enumerate(argv) if word == "-genv"]
    return dict(name.split("=", 1) if "=" in name else (name, value) for name, value in pairs)  # type: ignore[misc]


@pytest.mark.parametrize("launcher", ["openmpi", "mpich", "slurm", "impi"])
def test_ranks_get_their_variables_and_the_master(launcher: str, deepspeed_runner: Runner) -> None:
    wanted = {**EXPORTS, "EMPTY": "", "SIGNS": "a=b:c/d@e%f+g-h.i"}
    theirs = deepspeed_runner.start(command(launcher=launcher, exports=wanted, nic="eth1"))
    got = exports_of(launcher, theirs)
    wanted |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    wanted |= {"NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1"}
    assert {name: got.get(name) for name in wanted} == wanted
    assert theirs.argv[-2:] == [ARGUMENTS["script"], f"@{ARGUMENTS['arguments_file']}"]


def test_lists_of_interfaces_reach_slurm_ranks_where_deepspeed_does_not_forward_them() -> None:
    gloo = command(launcher="slurm", exports={"GLOO_SOCKET_IFNAME": "ib0,ib1"})
    assert gloo.environment["GLOO_SOCKET_IFNAME"] == "ib0,ib1"
    with pytest.raises(UserError, match=r"^exports: srun would cut the value of NCCL_SOCKET_IFNAME at a comma"):
        command(launcher="slurm", nic="ib0,ib1")


def test_slurm_tasks_are_laid_out_in_the_order_of_the_hostfile(deepspeed_runner: Runner) -> None:
    theirs = deepspeed_runner.start(command(launcher="slurm", hosts={"z1": 2, "a9": 2}, hostfile=hostfile("z1", "a9")))
    assert theirs.argv[:7] == [
        *("srun", "-n", "4", "--nodelist=z1,z1,a9,a9", "--distribution=arbitrary"),
        *("--kill-on-bad-exit=1", "--cpu-bind=none"),
    ]


_FOLDERS: list[Path] = []


@pytest.fixture(autouse=True)
def _hostfiles(tmp_path: Path) -> Iterator[None]:
    _FOLDERS.append(tmp_path)
    yield
    _FOLDERS.pop()


def hostfile(*hosts: str, slots: int = 2) -> str:
    path = _FOLDERS[-1] / "hosts"
    path.write_text("".join(f"{host} slots={slots}\n" for host in hosts))
    return str(path)


def test_a_host_alone_is_reached_through_the_launcher_asked_for(deepspeed_runner: Runner) -> None:
    alone = {"hosts": {"node7": 2}, "hostfile": hostfile("node7")}
    for launcher, program in (("pdsh", "pdsh"), ("openmpi", "mpirun"), ("slurm", "srun")):
        theirs = deepspeed_runner.start(command(launcher=launcher, force_multi=launcher == "pdsh", **alone))
        assert theirs.argv[0] == program


def test_open_mpi_chooses_where_no_interface_is_given(deepspeed_runner: Runner) -> None:
    """DeepSpeed's default is eth0, which many hosts do not have."""
    argv = deepspeed_runner.start(command(launcher="openmpi")).argv
    assert "eth0" not in argv and argv[argv.index("btl_tcp_if_include") + 1] == ""


def test_the_users_binding_takes_the_place_of_ours(deepspeed_runner: Runner) -> None:
    given = ["--bind-to", "core", "--mca", "pml", "^ucx"]
    argv = deepspeed_runner.start(command(launcher="openmpi", launcher_args=given)).argv
    assert argv.count("--bind-to") == 1 and argv[argv.index("slot") + 1 :][:5] == given


def test_mpirun_may_run_as_root_if_it_was_exported() -> None:
    given = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    assert given.items() <= command(launcher="openmpi", exports=given).environment.items()
    assert not given.keys() & command(launcher="openmpi").environment.keys()


def test_ssh_arguments_reach_every_launcher_that_starts_ssh() -> None:
    variables = {
        "pdsh": ("PDSH_SSH_ARGS_APPEND", "-F /c"),  # DeepSpeed appends the port
        "openmpi": ("PRTE_MCA_plm_ssh_args", "-F /c -p 2222"),
        "mpich": ("HYDRA_LAUNCHER_EXTRA_ARGS", "-F /c -p 2222"),
        "impi": ("I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS", "-F /c -p 2222"),
    }
    for launcher, (name, value) in variables.items():
        assert command(launcher=launcher, ssh_args="-F /c", ssh_port=2222).environment[name] == value
        assert name not in command(launcher=launcher).environment


def test_what_is_displayed_does_the_same(tmp_path: Path) -> None:
    """A shell that runs the lines writes the file and starts the same argv, environment and folder."""
    python = tmp_path / "python"
    python.write_text(RECORDER.replace("env -0", f'pwd > "{tmp_path}/folder"; env -0'))
    python.chmod(0o755)
    ours = command(
        python=str(python), env_file=str(tmp_path / "environment"), exports={"A": "it's", "B": ""}, ssh_args="-F /c"
    )
    environment = {"PATH": os.environ["PATH"], "RECORD": str(tmp_path / "record")}
    subprocess.run(["sh", "-c", displayed(ours)], check=True, env=environment)
    assert (tmp_path / "record").read_text().split("\0")[1:-1] == ours.argv[1:]
    assert (tmp_path / "environment").read_text() == ours.env_text == "A=it's\nB=\n"
    assert (tmp_path / "folder").read_text() == f"{REPO}\n"
    lines = (tmp_path / "record.env").read_text().split("\0")
    assert {f"{name}={value}" for name, value in ours.environment.items()} <= set(lines)


# --- refused ----------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"launcher": "pdhs"}, "--launcher: 'pdhs' is unknown (did you mean 'pdsh'?); give one of pdsh, openmpi"),
    ({"launcher": "ssh"}, "--launcher: 'ssh' is unknown"),
    ({"hosts": {}}, "lists no host"),
    ({"hosts": {"a;b": 8}}, "'a;b' is not a host name"),
    ({"hosts": {"-oProxyCommand=x": 8}}, "'-oProxyCommand=x' is not a host name"),
    ({"hosts": {"exec:a": 8}}, "'exec:a' is not a host name"),
    ({"hosts": {"a": 0}}, "host a has slots=0"),
    ({"launcher": "impi", "hosts": {"a": 8, "b": 4, "c": 8, "d": 2}}, "a has 8, b has 4, d has 2; make them equal"),
    ({"master_addr": "$(id)"}, "master address: '$(id)' is refused"),
    ({"master_port": 0}, "--master_port: 0 is not a port; give one of 1 to 65535"),
    ({"ssh_port": 70000}, "--ssh_port: 70000 is not a port"),
    ({"script": "train.py"}, "the script: 'train.py' is not an absolute path"),
    ({"script": "/a b/train.py"}, "the script: '/a b/train.py' has ' '"),
    ({"working_folder": "/a:b"}, "the working folder: '/a:b' has ':'"),
    ({"working_folder": "/a/../b"}, "the working folder: '/a/../b' is not an absolute path"),
    ({"python": "/a%n/python"}, "python: '/a%n/python' has '%'"),
    ({"nic": "eth0;id"}, "--nic: 'eth0;id' is refused"),
    ({"exports": {"A B": "1"}}, "exports: 'A B' is refused"),
    ({"exports": {"A": "$(id)"}}, "exports: the value of A has '$'"),
    ({"exports": {"A": "x\nB=1"}}, "exports: the value of A has '\\n'"),
    ({"exports": {"A": " x"}}, "exports: the value of A begins or ends with a space"),
    ({"launcher": "openmpi", "exports": {"A": "a b"}}, "exports: the value of A has ' '"),
    ({"exports": {"HTTPS_PROXY": "http://me:pw@proxy"}}, "exports: the URL in HTTPS_PROXY holds a password"),
    ({"ssh_args": "-o 'ProxyCommand=nc a'"}, "ssh's arguments: 'ProxyCommand=nc a' has ' '"),
    ({"ssh_args": "-F '"}, "ssh's arguments: \"-F '\": No closing quotation; close the quotes"),
    ({"launcher_args": ["-R", "exec"]}, "--launcher_args: '-R' is not an option to give to pdsh"),
    ({"launcher_args": ["touch"]}, "--launcher_args: 'touch' is not an option to give to pdsh"),
    ({"launcher_args": ["-t"]}, "--launcher_args: -t of pdsh needs 1 value(s)"),
    ({"launcher": "openmpi", "launcher_args": ["--oversubscribe", "id"]}, "'id' is not an option to give to openmpi"),
    ({"launcher": "openmpi", "launcher_args": ["--mca", "btl", "self"]}, "--mca btl cannot be given twice"),
    ({"launcher": "openmpi", "launcher_args": ["-x", "HF_TOKEN=abc"]}, "HF_TOKEN looks like a secret"),
    ({"launcher": "mpich", "launcher_args": ["-genv", "HF_TOKEN", "abc"]}, "HF_TOKEN looks like a secret"),
    ({"launcher": "mpich", "launcher_args": ["-hosts", "a"]}, "'-hosts' is not an option to give to mpich"),
    ({"launcher": "slurm", "launcher_args": ["id"]}, "--launcher_args: srun may take 'id' for the program"),
    ({"launcher": "slurm", "launcher_args": ["-n4"]}, "--launcher_args: srun may take '-n4' for the program"),
    ({"launcher": "slurm", "launcher_args": ["--nodel=a"]}, "'--nodel=a': hosts and ranks come from the hostfile"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused_with_value_and_fix(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        command(**changes)
    assert message in str(error.value) and "\n" not in str(error.value) and ";" in str(error.value)


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "PGPASSWORD", "my_secret_2"]
)
def test_secret_is_refused_without_its_value(name: str) -> None:
    with pytest.raises(UserError) as error:
        command(exports={name: "hunter2"})
    assert name in str(error.value) and "hunter2" not in str(error.value)


def test_what_only_sounds_like_a_secret_is_taken() -> None:
    names = [
        *("TOKENIZERS_PARALLELISM", "WANDB_API_KEY_FILE", "AWS_SHARED_CREDENTIALS_FILE", "MONKEYS"),
        *("GOOGLE_APPLICATION_CREDENTIALS", "NCCL_SOCKET_IFNAME"),
    ]
    assert command(exports=dict.fromkeys(names, "/a")).env_text == "".join(f"{name}=/a\n" for name in names)


def test_secrets_in_the_environment_do_not_reach_argv(deepspeed_runner: Runner) -> None:
    """DeepSpeed forwards variables of MLFLOW, PYTHON, UCX and NCCL: the runner gets none of the secrets among them."""
    environ = {"MLFLOW_TRACKING_TOKEN": "hunter2", "HF_TOKEN": "hunter3", "MLFLOW_RUN": "a", "NCCL_IB_HCA": "^mlx5_0"}
    for launcher in LAUNCHERS:
        kept = inherited(environ, launcher)
        assert kept == {"HF_TOKEN": "hunter3", "MLFLOW_RUN": "a"}  # variables that are not forwarded stay
        for name, value in kept.items():
            deepspeed_runner.monkeypatch.setenv(name, value)
        theirs = deepspeed_runner.start(command(launcher=launcher))
        assert "hunter" not in " ".join(theirs.argv) and "MLFLOW_RUN=a" in " ".join(theirs.argv).replace(" a", "=a")


def test_environment_that_would_arrive_changed_is_refused() -> None:
    assert inherited({"PYTHONPATH": "/a b"}, "pdsh") == {"PYTHONPATH": "/a b"}  # DeepSpeed quotes it, a shell unquotes
    for launcher in ("openmpi", "mpich", "impi", "slurm"):
        with pytest.raises(UserError, match=r"^environment variable PYTHONPATH: the value of PYTHONPATH has ' '"):
            inherited({"PYTHONPATH": "/a b"}, launcher)
    with pytest.raises(UserError, match=r"^environment variable PYTHONPATH: the value of PYTHONPATH has '\$'"):
        inherited({"PYTHONPATH": "$(id)"}, "pdsh")
    with pytest.raises(UserError, match=r"srun would cut the value of PYTHONPATH at a comma"):
        inherited({"PYTHONPATH": "/a,b"}, "slurm")


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_command_that_linux_would_not_start_is_refused() -> None:
    long = "/" + "/".join(["a" * 100] * 4)
    with pytest.raises(UserError, match=r"^--launcher impi: 2048 ranks on 256 hosts make a command of [0-9]{7} bytes"):
        command(launcher="impi", script=f"{long}/train.py", arguments_file=f"{long}/arguments", python=f"{long}/python")
    many = {f"node{i:04}.a-long-name.of-a-cluster.example.org": 8 for i in range(1600)}
    for launcher in ("pdsh", "slurm"):
        with pytest.raises(UserError, match=rf"^--launcher {launcher}: 12800 ranks .* more than Linux starts"):
            command(launcher=launcher, hosts=many)


@pytest.mark.parametrize("launcher", ["pdsh", "impi"])
def test_the_size_is_not_underestimated(
    launcher: str, deepspeed_runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the estimate accepts a command, the command that DeepSpeed starts fits."""
    theirs = deepspeed_runner.start(command(launcher=launcher))
    remote = len(" ".join(theirs.argv[6:]))
    with monkeypatch.context() as limits:
        if launcher == "pdsh":
            limits.setattr("llama_ds.launch.command.MAX_WORD", remote)
        else:
            limits.setattr("llama_ds.launch.command.MAX_COMMAND", theirs.bytes * 4 // 3)
        with pytest.raises(UserError, match="more than Linux starts"):
            command(launcher=launcher)


# --- only the intended command is executed ----------------------------------------------------------------------------

ATTACKS = ["; id", "$(id)", "`id`", "| id", "&& id", "> /tmp/x", "a b", "'", '"', '"; id; "', "\n id", "\\", "%n", "%h"]
ATTACKS += [
    "~",
    "*",
    "{a,b}",
    "!!",
    "#",
    "",
    "-e",
    "--",
    "=",
    "a=b",
    "\0",
    "é",
    "ﬀ",
    "\u2028",
    "\r",
    "\t",
    "..",
    "^",
    "[a]",
]
PLACES = ["python", "folder", "script", "file", "host", "nic", "master", "name", "value", "args"]
SIGNS = " ;&|$`\"'\\\n*?[]{}()<>!#~%^=-.,/:@+_"
SOUP = st.text(alphabet=SIGNS + "aZ09é", max_size=8)
WORD = st.from_regex(r"[A-Za-z0-9_@+=.-]{1,8}", fullmatch=True)
TEXT = st.one_of(WORD, st.sampled_from(ATTACKS), SOUP)


@pytest.fixture(scope="module")
def host_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host: an empty PATH, and a python that appends its argv and its environment to `record`."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "recorder").write_text(
        f'#!/bin/sh\n{{ printf \'%s\\0\' "$#" "$@"; {shutil.which("env")} -0; }} >> {folder}/record\n'
    )
    (folder / "recorder").chmod(0o755)
    return folder


def pdsh_expanded(word: str, host: str) -> str:
    """A word as pdsh passes it to ssh for the first host."""
    return re.sub("%([hnu%])", lambda m: {"h": host, "n": "0", "u": "root", "%": "%"}[m[1]], word)


def remote_command(ours: Command, python: str) -> str:
    """The line that a shell of the first host parses, built by DeepSpeed's PDSHRunner as in the runner's main()."""
    args = runner.parse_args(ours.argv[3:])
    hosts = {host: list(range(slots)) for host, slots in runner.fetch_hostfile(args.hostfile).items()}
    pdsh = multinode_runner.PDSHRunner(args, runner.encode_world_info(hosts))
    for line in ours.env_text.splitlines(keepends=True):
        pdsh.add_export(*line.split("=", maxsplit=1))
    before, there = sys.executable, os.getcwd()
    try:
        sys.executable = python
        os.chdir(ours.working_folder)
        argv, _, _ = pdsh.get_cmd({}, hosts)
    finally:
        sys.executable = before
        os.chdir(there)
    options = 6 + len(shlex.split(args.launcher_args))
    return " ".join(pdsh_expanded(word, next(iter(hosts))) for word in argv[options:])


def run_as_host(folder: Path, line: str) -> tuple[list[str], dict[str, str]]:
    """Run a line in a shell as sshd does; return argv and environment of the only python that it started."""
    record = folder / "record"
    record.unlink(missing_ok=True)
    done = subprocess.run(["/bin/sh", "-c", line], env={"PATH": "/nowhere"}, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    count, *words = record.read_bytes().decode().split("\0")[:-1]
    argv, lines = words[: int(count)], words[int(count) :]
    environment = dict(line.split("=", 1) for line in lines)
    assert len(environment) == len(lines)  # one record
    return argv, environment


def check_on_host(host_folder: Path, place: str, text: str, value: str) -> None:
    """Build a command with `text` in one argument; if it is not refused, run it as a host would."""

    def there(name: str, usual: str) -> str:
        return text if place == name else usual

    python, folder = f"{host_folder}/p{there('python', '')}/python", f"{host_folder}/f{there('folder', '')}"
    hosts = {there("host", "node1"): 1, "node2": 1}
    hostfile = host_folder / "hosts"
    exports = {"V" + there("name", ""): there("value", value)}
    changes: dict[str, object] = {
        **{"python": python, "working_folder": folder, "hostfile": str(hostfile), "hosts": hosts, "exports": exports},
        **{"script": f"/s{there('script', '')}", "arguments_file": f"/a{there('file', '')}"},
        **{"nic": there("nic", "eth0"), "master_addr": there("master", "10.0.0.1")},
        "launcher_args": ["-t", "5", *([text] if place == "args" else [])],
    }
    try:
        ours = command(**changes)
    except UserError as error:
        assert "\n" not in str(error)
        return
    hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts))
    for made in (os.path.dirname(python), folder):
        os.makedirs(made, exist_ok=True)
    if not os.path.lexists(python):
        os.symlink(host_folder / "recorder", python)
    argv, environment = run_as_host(host_folder, remote_command(ours, python))
    info = base64.urlsafe_b64encode(json.dumps({host: [0] for host in hosts}).encode()).decode()
    assert argv == [
        *("-u", "-m", "deepspeed.launcher.launch", f"--world_info={info}", "--node_rank=0"),
        *(f"--master_addr={changes['master_addr']}", "--master_port=29500", "--no_local_rank"),
        "--enable_each_rank_log=None",
        *(changes["script"], f"@{changes['arguments_file']}"),
    ]
    nic = changes["nic"]
    wanted = {**({"NCCL_SOCKET_IFNAME": nic, "GLOO_SOCKET_IFNAME": nic} if nic else {}), **exports, "PATH": "/nowhere"}
    assert {k: v for k, v in environment.items() if k not in ("PWD", "OLDPWD", "SHLVL", "_")} == wanted
    assert environment["PWD"] == folder


@pytest.mark.parametrize("place", PLACES)
def test_no_character_in_any_place_means_something_to_a_shell(host_folder: Path, place: str) -> None:
    for sign in [*string.punctuation, *string.whitespace, "\0", "é", "%n", "%h"]:
        check_on_host(host_folder, place, f"a{sign}b", "v")
        check_on_host(host_folder, place, sign, "v")


@settings(max_examples=400, deadline=None)
@given(place=st.sampled_from(PLACES), text=TEXT, value=TEXT)
@example(place="value", text="it's {a,b} ~ * & | ; # <x> ^lo", value="a")
@example(place="value", text='"; id; "', value="a")
@example(place="python", text="a; id #", value="a")
@example(place="folder", text="$(id)", value="a")
def test_fuzzed_pdsh_command_does_what_was_meant_and_nothing_else(
    host_folder: Path, place: str, text: str, value: str
) -> None:
    check_on_host(host_folder, place, text, value)


BACKENDS = {
    "openmpi": multinode_runner.OpenMPIRunner,
    "mpich": multinode_runner.MPICHRunner,
    "impi": multinode_runner.IMPIRunner,
    "slurm": multinode_runner.SlurmRunner,
}


@settings(max_examples=400, deadline=None)
@given(launcher=st.sampled_from(sorted(BACKENDS)), name=TEXT, value=TEXT, words=st.lists(TEXT, max_size=3), nic=TEXT)
@example(launcher="openmpi", name="A", value="b", words=["--mca", "pml", "^ucx"], nic="eth0")
@example(launcher="slurm", name="A", value="a b,c", words=["--partition=gpu"], nic="")
@example(launcher="impi", name="A", value="%h", words=["-genv", "B", "c"], nic="eth0")
def test_fuzzed_mpi_and_slurm_commands_keep_their_words(
    launcher: str, name: str, value: str, words: list[str], nic: str
) -> None:
    """No shell parses these: every word arrives unchanged, and python starts with the script in all cases."""
    exports = {"V" + name: value}
    try:
        ours = command(launcher=launcher, hosts={"b": 1, "a": 1}, exports=exports, nic=nic, launcher_args=words)
    except UserError as error:
        assert "\n" not in str(error)
        return
    args = runner.parse_args(ours.argv[3:])
    backend = BACKENDS[launcher](args, "info", {"b": 1, "a": 1})
    for line in ours.env_text.splitlines(keepends=True):
        backend.add_export(*line.split("=", maxsplit=1))
    argv = backend.get_cmd({}, {"b": [0], "a": [0]})
    program = argv.index(sys.executable)
    last = [word for word in words if word in argv]
    assert last == words and program > max([argv.index(word) for word in words], default=0)
    assert argv[-2:] == [ARGUMENTS["script"], f"@{ARGUMENTS['arguments_file']}"]
    if launcher == "slurm":
        assert exports.items() <= ours.environment.items()
    else:
        assert exports.items() <= exports_of(launcher, Started(argv, {})).items()


# --- the real launchers -----------------------------------------------------------------------------------------------

SSH = """\
#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
printf '%s' "$*" > "$RECORD.$host"
"""


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="not installed: pdsh")
def test_pdsh_gives_every_host_its_place_in_the_hostfile(deepspeed_runner: Runner, tmp_path: Path) -> None:
    """The real pdsh at 256 hosts, with a recording program instead of ssh; the hosts are not in the names' order."""
    names = [f"node{n:03}" for n in range(256, 0, -1)]
    ours = command(hosts=dict.fromkeys(names, 8), hostfile=hostfile(*names, slots=8))
    argv = deepspeed_runner.start(ours).argv
    (tmp_path / "pdsh").unlink()
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    pdsh = shutil.which("pdsh")
    assert pdsh
    subprocess.run([pdsh, *argv[1:]], check=True, env={**os.environ, "PDSH_RCMD_TYPE": "ssh"})
    lines = {path.name.removeprefix("record."): path.read_text() for path in tmp_path.glob("record.node*")}
    assert {host: re.findall(r"--node_rank=(\S+)", line) for host, line in lines.items()} == {
        name: [str(rank)] for rank, name in enumerate(names)
    }
    assert len({re.sub("--node_rank=[0-9]+", "", line) for line in lines.values()}) == 1


@pytest.mark.skipif(shutil.which("mpirun", path=os.path.dirname(sys.executable)) is None, reason="no Open MPI")
def test_open_mpi_places_ranks_by_the_hostfile(deepspeed_runner: Runner, tmp_path: Path) -> None:
    """The real mpirun's own map at 256 x 8, with hosts in reverse order and this machine among them."""
    names = [f"node{n:03}" for n in range(256, 0, -1)]
    names[100] = os.uname().nodename
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ours = command(
        launcher="openmpi", hosts=dict.fromkeys(names, 8), hostfile=hostfile(*names, slots=8), exports=EXPORTS | root
    )
    argv = deepspeed_runner.start(ours).argv
    mpirun = f"{os.path.dirname(sys.executable)}/mpirun"
    at = argv.index("-x")
    done = subprocess.run(
        [mpirun, *argv[1:at], "--display", "map", "--do-not-launch", *argv[at:]],
        env={**os.environ, **ours.environment},
        capture_output=True,
        text=True,
    )
    placed: dict[int, str] = {}
    host = ""
    for line in done.stdout.splitlines():
        if found := re.search(r"Data for node: (\S+)", line):
            host = found[1]
        if found := re.search(r"Data for proc: \[.*,([0-9]+)\]", line):
            placed[int(found[1])] = host
    assert placed == {rank: names[rank // 8] for rank in range(2048)}, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_ranks_on_this_machine_get_all_of_it(launcher: str, tmp_path: Path) -> None:
    """DeepSpeed's runner as a process of its own: launch.py without a shell for pdsh, mpirun for openmpi."""
    script = tmp_path / "script.py"
    names = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "JOB", "SIGNS", "OMPI_COMM_WORLD_RANK")
    script.write_text(
        "import json, os, sys\n"
        f"text = json.dumps([sys.argv[1:], {{n: os.environ.get(n) for n in {names}}}])\n"
        f"open(f'{tmp_path}/rank{{os.getpid()}}', 'w').write(text)\n"
    )
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    exports = {"JOB": "/job/1", "SIGNS": "a=b:c/d@e%f+g", "DS_ACCELERATOR": "cpu", **root}
    ours = command(
        **{"launcher": launcher, "hosts": {"localhost": 2}, "hostfile": hostfile("localhost"), "script": str(script)},
        **{"exports": exports, "env_file": str(tmp_path / "environment"), "working_folder": str(tmp_path.resolve())},
        **{"master_addr": "127.0.0.1", "launcher_args": ["--oversubscribe"] if launcher == "openmpi" else []},
    )
    (tmp_path / ".deepspeed_env").write_text("SIGNS=$(id)\n\n")  # the user's own file has no effect and causes no crash
    environ = {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(["sh", "-c", displayed(ours)], env=environ, capture_output=True, text=True)
    ranks = [json.loads(path.read_text()) for path in tmp_path.glob("rank*")]
    assert len(ranks) == 2, done.stderr
    for arguments, environment in ranks:
        assert arguments == ["@/job/17/arguments"]
        wanted = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "JOB": "/job/1", "SIGNS": exports["SIGNS"]}
        assert wanted.items() <= environment.items()
        assert (environment["LOCAL_RANK"] is None) == (launcher == "openmpi")


def test_every_launcher_of_ours_is_one_of_deepspeeds() -> None:
    assert set(LAUNCHERS) <= set(runner.LAUNCHER_CLASSES)
