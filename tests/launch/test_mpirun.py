"""The mpirun that a job starts belongs to the MPI of its --launcher."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from llama_ds.errors import UserError
from llama_ds.launch.mpirun import find_mpirun

# What the mpirun of the wheels mpich 5.0.2 and impi-rt 2021.18.1 print for --version.
SAY = {
    "mpich": "HYDRA build details:\n    Version:                                 5.0.2",
    "impi": "Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626 (id: b44796a)",
    "openmpi": "mpirun (Open MPI) 5.0.11",
    "other": "something else",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine with the mpirun of several MPIs, and none beside the interpreter; the first on PATH is MPICH's."""
    paths = {}
    for name, text in SAY.items():
        path = tmp_path / name / "mpirun"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        path.chmod(0o755)
        paths[name] = str(path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    folders = [os.path.dirname(path) for path in paths.values()]
    monkeypatch.setenv("PATH", ":".join([*folders, os.path.dirname(shutil.which("cat") or "")]))
    return paths


def test_the_named_mpirun_is_used_or_the_first_on_path(installed: dict[str, str]) -> None:
    assert find_mpirun("mpich", "", os.environ) == installed["mpich"]
    for launcher in ("mpich", "impi", "openmpi"):
        assert find_mpirun(launcher, installed[launcher], os.environ) == installed[launcher]
    assert find_mpirun("pdsh", "", os.environ) == find_mpirun("slurm", "", os.environ) == ""


def test_the_mpirun_of_another_mpi_is_refused(installed: dict[str, str]) -> None:
    def error(launcher: str, given: str) -> str:
        with pytest.raises(UserError) as raised:
            find_mpirun(launcher, given, os.environ)
        return str(raised.value)

    assert error("openmpi", "") == (
        f"{installed['mpich']}: is not Open MPI's, as --launcher openmpi needs (Version:{' ' * 33}5.0.2); "
        "give --mpirun FOLDER/mpirun of Open MPI, or use --launcher mpich, or load another module"
    )
    assert "--launcher impi, or load" in error("mpich", installed["impi"])
    assert error("impi", installed["other"]).endswith("of Intel MPI, or load another module")
    assert error("impi", "/nowhere/mpirun").startswith("--mpirun /nowhere/mpirun: is no program called mpirun; ")
    assert error("pdsh", installed["mpich"]).endswith("--launcher pdsh starts no mpirun; leave it out")
