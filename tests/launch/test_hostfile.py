"""The hostfile's grammar, and the lookup of the hostfile that the launcher was given, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ds.errors import UserError
from llama_ds.launch.hostfile import launcher_hostfile, parse_hostfile

REPO = Path(__file__).resolve().parents[2]
CHECK = f"""\
import sys
sys.path.insert(0, {str(REPO)!r})
from llama_ds.errors import UserError
from llama_ds.launch.hostfile import check_launcher_hostfile, launcher_hostfile
try:
    check_launcher_hostfile()
except UserError as error:
    sys.exit(f"error: {{error}}")
print("hostfile:", launcher_hostfile())
"""
# Stands where DeepSpeed's runner stands: same script name, same way to find its options, starts the training script.
RUNNER = """\
import subprocess, sys
script = next(word for word in sys.argv[1:] if word.endswith(".py"))
sys.exit(subprocess.run([sys.executable, script]).returncode)
"""


def test_hosts_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# rack 1\n\nnode2 slots=8\n  node1\tslots=4  # half of it\n")
    assert list(parse_hostfile(str(path)).items()) == [("node2", 8), ("node1", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=8\nb\n", ":2: 'b' is not a host; write HOST slots=N, as in node001 slots=8"),
        ("a slots=8 max=9\n", ":1: 'a slots=8 max=9' is not a host; write HOST slots=N, as in node001 slots=8"),
        ("a slots=eight\n", ":1: 'a slots=eight' is not a host; write HOST slots=N, as in node001 slots=8"),
        ("a slots=8\na slots=8\n", ":2: host a is listed twice; keep one line with all of its slots"),
        ("a slots=0\n", ":1: host a has slots=0; give its number of devices or take it out"),
        ("", ": lists no host; write one HOST slots=N per line, as in node001 slots=8"),
        ("# nothing\n\n", ": lists no host; write one HOST slots=N per line, as in node001 slots=8"),
    ],
)
def test_bad_hostfile_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse_hostfile(str(path))
    assert str(error.value) == f"{path}{message}"


def test_missing_hostfile_is_told() -> None:
    with pytest.raises(UserError, match=r"^gone: the hostfile cannot be read: No such file or directory"):
        parse_hostfile("gone")


def test_no_launcher_no_hostfile() -> None:
    assert launcher_hostfile() is None


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--hostfile", "hosts"], "hosts"),
        (["--hostfile=hosts"], "hosts"),
        (["-H", "hosts"], "hosts"),
        (["-Hhosts"], "hosts"),
        (["--hostf", "hosts"], "hosts"),
        (["--num_gpus", "2", "-H", "gone", "-H", "hosts"], "hosts"),
        ([], None),
    ],
)
def test_runners_hostfile_is_found(tmp_path: Path, options: list[str], found: str | None) -> None:
    tmp_path.joinpath("hosts").write_text("localhost slots=2\n")
    done = start_as_runner(tmp_path, *options, "check.py", "--hostfile", "not_the_runners")
    assert done.stdout.strip() == f"hostfile: {tmp_path / found if found else None}", done.stderr


def test_missing_hostfile_of_the_runner_ends_the_ranks(tmp_path: Path) -> None:
    done = start_as_runner(tmp_path, "--hostfile", "gone", "check.py")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"error: {tmp_path / 'gone'}: the hostfile cannot be read: No such file or directory; correct --hostfile"
    )


def test_deepspeeds_own_runner_is_recognised(tmp_path: Path) -> None:
    """The real launcher warns about the missing file and goes on with local resources; the rank does not."""
    tmp_path.joinpath("check.py").write_text(CHECK)
    command = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", "gone", "--num_accelerators", "1"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, "check.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"error: {tmp_path / 'gone'}: the hostfile cannot be read" in done.stderr


def start_as_runner(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Start check.py in `folder` below a script called `deepspeed` that was given `arguments`."""
    folder.joinpath("bin").mkdir()
    runner = folder / "bin" / "deepspeed"
    runner.write_text(RUNNER)
    folder.joinpath("check.py").write_text(CHECK)
    return subprocess.run([sys.executable, runner, *arguments], cwd=folder, capture_output=True, text=True)
