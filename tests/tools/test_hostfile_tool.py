"""tools/hostfile.py: it reproduces the example hostfiles and the README, and it reports mistakes in one line."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPO = Path(__file__).resolve().parents[2]
README = REPO / "hostfiles" / "README.md"
PROMPT = "    $ tools/hostfile.py "


def hostfile(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "tools" / "hostfile.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, env={**os.environ, **environment})


def shown_commands() -> Iterator[tuple[list[str], str]]:
    """Yield the arguments and the output of each command in the README."""
    lines = README.read_text().splitlines()
    for position, line in enumerate(lines):
        if line.startswith(PROMPT):
            output = []
            for below in lines[position + 1 :]:
                if not below.startswith("    ") or below.startswith("    $"):
                    break
                output.append(f"{below[4:]}\n")
            yield shlex.split(line.removeprefix(PROMPT)), "".join(output)


COMMANDS = list(shown_commands())
MADE = {Path(arguments[-1]).name: arguments for arguments, _ in COMMANDS if arguments[0] == "generate"}


@pytest.mark.parametrize("name", ["local", "2x8", "32x8", "256x8"])
def test_the_example_is_what_its_command_makes(tmp_path: Path, name: str) -> None:
    assert MADE[name][-2:] == ["--out", f"hostfiles/{name}"]
    done = hostfile(*MADE[name][:-1], tmp_path / name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / name).read_bytes() == (REPO / "hostfiles" / name).read_bytes()


@pytest.mark.parametrize("index", [i for i, (arguments, _) in enumerate(COMMANDS) if "--out" not in arguments])
def test_the_readme_shows_what_is_printed(index: int) -> None:
    arguments, output = COMMANDS[index]
    done = hostfile(*arguments)
    assert (done.stdout, done.stderr) == (output, "")
    assert done.returncode == (2 if "\nerror " in output else 0)


def test_the_readme_shows_every_subcommand() -> None:
    assert {arguments[0] for arguments, _ in COMMANDS} == {"generate", "check", "map", "select"}


def test_a_jobs_hosts_come_from_its_environment(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("a\nb\na\n")
    slurm = hostfile("generate", "--slurm", SLURM_JOB_NODELIST="n[08-10]", SLURM_TASKS_PER_NODE="8(x2),4")
    assert slurm.stdout == "n08 slots=8\nn09 slots=8\nn10 slots=4\n", slurm.stderr
    lsf = hostfile("generate", "--lsf", "--comment", "batch", LSB_MCPU_HOSTS="x 8 y 8")
    assert lsf.stdout == "# batch\nx slots=8\ny slots=8\n", lsf.stderr
    assert hostfile("generate", "--pbs", PBS_NODEFILE=str(nodes)).stdout == "a slots=2\nb slots=1\n"
    assert hostfile("generate", "--pbs", nodes, "--slots", 8).stdout == "a slots=8\nb slots=8\n"


def test_a_run_is_checked_with_its_overrides() -> None:
    run = ("--run", "ds_configs/llama_65b.yaml", "parallel.pp=4")
    done = hostfile("check", "hostfiles/256x8", *run, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [finding["severity"] for finding in found] == ["ok"] * 4
    assert found[0]["text"] == "hosts: 256 hosts of 8 slots, 2048 ranks = pp 4 * dp 64 * tp 8"


def test_the_map_is_drawn_and_listed(tmp_path: Path) -> None:
    picture = tmp_path / "ranks.svg"
    done = hostfile("map", "hostfiles/2x8", "--pp", 2, "--tp", 4, "--svg", picture, "--json")
    ranks = json.loads(done.stdout)
    assert [rank["rank"] for rank in ranks] == list(range(16))
    assert ranks[13] == {"rank": 13, "host": "node002", "slot": 5, "pp": 1, "dp": 1, "tp": 1}
    assert "Ranks on hostfiles/2x8" in (ElementTree.parse(picture).getroot()[0].text or "")
    lines = hostfile("map", "hostfiles/32x8", "--tp", 8, "--every-host").stdout.splitlines()
    assert len(lines) == 33 and lines[32].split() == ["node032", "1", "0-7", "248-255", "0", "31", "0-7"]


def test_selected_hosts_are_a_hostfile_or_a_list_of_slots(tmp_path: Path) -> None:
    out = tmp_path / "hosts"
    assert hostfile("select", "hostfiles/32x8", "--exclude", "node[002-032]", "--out", out).returncode == 0
    assert out.read_text() == "node001 slots=8\n"
    done = hostfile("select", "hostfiles/2x8", "--include", "node002:1,3", "--json")
    assert json.loads(done.stdout) == {"node002": [1, 3]}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["generate", "--hosts", "n[1-2]"],
            "command line: --hosts does not say how many slots a host has; add --slots 8",
        ),
        (["generate", "--hosts", "n[1-", "--slots", 8], "--hosts: 'n[1-', position 2: the bracket is not closed"),
        (["generate", "--hosts", "n1", "--slots", 0], "command line: --slots: '0' is not a whole number of 1"),
        (["generate", "--hosts", "n1", "--slots", -8], "command line: --slots: '-8' is not a whole number of 1"),
        (["generate", "--pbs", "gone"], "gone: the host list cannot be read"),
        (["check", "gone"], "gone: the hostfile cannot be read"),
        (["check", "hostfiles/2x8", "--pp", 3], "hostfiles/2x8: 16 slots are not a multiple of pp 3 * tp 1 = 3"),
        (["check", "hostfiles/2x8", "--pp", 0], "--pp: '0' is not a whole number of 1 or more"),
        (["check", "hostfiles/2x8", "--run", "gone.yaml"], "gone.yaml"),
        (["check", "hostfiles/2x8", "--run", "ds_configs/llama_7b.yaml", "training.global_batch=3"], "global_batch"),
        (
            ["map", "hostfiles/2x8", "--run", "ds_configs/llama_7b.yaml", "--tp", 2],
            "command line: --pp and --tp conflict with --run",
        ),
        (["map", "hostfiles/2x8", "--svg", "setup.py/x.svg"], "--svg setup.py/x.svg: cannot be written (File exists)"),
        (
            ["select", "hostfiles/2x8", "--include", "node001:1"],
            "hostfiles/2x8: slots 1 of node001 are not its first 1",
        ),
        (["select", "hostfiles/2x8", "--include", "node3"], "command line: --include 'node3': host 'node3' is not in"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(args: list[object], message: str) -> None:
    done = hostfile(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_it_needs_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['deepspeed'] = None\nfrom tools.hostfile import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "check", "hostfiles/2x8", "--tp", "8"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0 and "tp: all 2 groups" in done.stdout, done.stderr
