"""Variables of ~/.deepspeed_env reach the ranks as under `deepspeed`, and secrets reach them in a private file."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path

import pytest

from llama_ds import shipped
from llama_ds.errors import UserError
from llama_ds.job.folder import Job
from llama_ds.launch import run_ranks
from llama_ds.launch.deepspeed_env import read_deepspeed_env
from llama_ds.launch.job_files import prepare
from llama_ds.launch.rendezvous import Rendezvous
from tools import launch

TEXT = """\
# of the cluster
NCCL_IB_HCA=mlx5

HF_TOKEN = hf_secret
PROXY=http://me:secret@proxy:80
OPTIONS=a=1,b=2
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with the file; the current folder is another one."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text(TEXT)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_both_files_are_read_and_the_current_folder_wins(home: Path) -> None:
    (home / "here" / ".deepspeed_env").write_text("NCCL_IB_HCA=mlx4")
    found = read_deepspeed_env({})
    assert found.exports == {"NCCL_IB_HCA": "mlx4", "OPTIONS": "a=1,b=2"}
    assert found.secrets == {"HF_TOKEN": "hf_secret", "PROXY": "http://me:secret@proxy:80"}
    assert found.remark() == (
        f"variables from {home}/home/.deepspeed_env and {home}/here/.deepspeed_env: NCCL_IB_HCA, OPTIONS; "
        "HF_TOKEN, PROXY (by the job's secrets file)"
    )


def test_another_name_may_be_given(home: Path) -> None:
    (home / "mine").write_text("A=1")
    assert read_deepspeed_env({"DS_ENV_FILE": str(home / "mine")}).exports == {"A": "1"}
    assert read_deepspeed_env({"DS_ENV_FILE": "gone"}).remark() == ""


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("HF_TOKEN hf_secret", "is not NAME=VALUE; write that, or a # before it"),
        ("export A=1", "'export A' is not a variable's name: letters, digits and _"),
        ("=1", "has no name before =; write NAME=VALUE"),
        ("RANK=0", "RANK is set by the launcher; take it out"),
    ],
)
def test_a_line_that_is_none_is_told(home: Path, line: str, problem: str) -> None:
    path = home / "home" / ".deepspeed_env"
    path.write_text(f"A=1\n{line}\n")
    with pytest.raises(UserError) as error:
        read_deepspeed_env({})
    assert str(error.value) == f"{path}:2: {problem}"


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpich", "impi", "slurm"])
def test_the_command_has_the_variables_and_no_secret(
    launcher: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "here" / ".deepspeed_env").write_text("OPTIONS=ab")  # srun cannot pass commas
    (home / "hosts").write_text("node1 slots=4\nnode2 slots=4\n")
    run_file = shipped.folder("ds_configs") / "quickstart.yaml"
    words = ["--hostfile", str(home / "hosts"), "--launcher", launcher, "--master-addr", "10.0.0.1", "--dry-run"]
    assert launch.main([str(run_file), "parallel.micro_batch=1", *words]) == 0
    shown = capsys.readouterr().out
    assert "NCCL_IB_HCA=mlx5" in shown and "OPTIONS=ab" in shown
    assert "secret@" not in shown and "hf_secret" not in shown


def test_ranks_that_measure_have_the_variables_too(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a network is measured with other settings than it trains with. Secrets have no use there."""
    (home / "here" / ".deepspeed_env").write_text("OPTIONS=ab")
    monkeypatch.setattr(run_ranks, "arrange", lambda *_, **__: Rendezvous("10.0.0.1", 29500, ""))
    monkeypatch.setattr(run_ranks, "run_child", lambda *_, **__: subprocess.CompletedProcess([], 0))
    hosts = {"node1": 1, "node2": 1}
    assert run_ranks.run_ranks("/rank.py", [], hosts, home / "job", exports={"OPTIONS": "old", "MINE": "1"}) == 0
    exported = (home / "job" / "environment").read_text().splitlines()
    assert {"NCCL_IB_HCA=mlx5", "OPTIONS=ab", "MINE=1"} <= set(exported)
    assert "secret" not in "".join(exported)
    assert "NCCL_IB_HCA, OPTIONS; without HF_TOKEN, PROXY, which may be secret" in capsys.readouterr().err


def test_secrets_reach_the_ranks_in_a_private_file(tmp_path: Path) -> None:
    job = Job(str(tmp_path / "attempt_01"), {"node1": 1}, "pdsh", ("", 0), 5, 60)
    prepare(job, ["run.yaml"], {"HF_TOKEN": "hf_secret"})
    assert job.secrets() == {"HF_TOKEN": "hf_secret"}
    assert stat.S_IMODE(Path(job.path("secrets")).stat().st_mode) == 0o600
    others = [path for path in Path(job.folder).rglob("*") if path.is_file() and path.name != "secrets"]
    assert not [path for path in others if "hf_secret" in path.read_text()]
    assert json.loads(Path(job.path("job.json")).read_text())["launcher"] == "pdsh"
    none = Job(str(tmp_path / "attempt_02"), {"node1": 1}, "pdsh", ("", 0), 5, 60)
    prepare(none, ["run.yaml"])
    assert none.secrets() == {} and not Path(none.path("secrets")).exists()
