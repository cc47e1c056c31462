"""The mpirun of a job: machines often have several, and DeepSpeed starts the first on PATH."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping

from llama_ds.errors import UserError

# What `mpirun --version` says; an MVAPICH is an MPICH in this respect.
KINDS = {"openmpi": ("Open MPI", "(Open MPI)"), "impi": ("Intel MPI", "Intel(R) MPI"), "mpich": ("MPICH", "HYDRA")}
TIMEOUT_S = 20.0


def find_mpirun(launcher: str, given: str, environ: Mapping[str, str]) -> str:
    """Return the path of the mpirun to start: `given`, or the first beside the interpreter and on PATH; "" without MPI.

    Raises:
        UserError: there is none, or it belongs to another MPI than the launcher.
    """
    if launcher not in KINDS:
        if given:
            raise UserError(f"--mpirun {given}: --launcher {launcher} starts no mpirun; leave it out")
        return ""
    path = f"{os.path.dirname(sys.executable)}:{environ.get('PATH', os.defpath)}"
    found = shutil.which(os.path.abspath(given) if given else "mpirun", path=path)
    name = KINDS[launcher][0]
    if not found or os.path.basename(found) != "mpirun":
        where = (
            f"--mpirun {given}: is no program called mpirun" if given else f"--launcher {launcher}: no mpirun on PATH"
        )
        raise UserError(f"{where}; load the module of your {name}, or give --mpirun FOLDER/mpirun")
    kind, version = kind_of(found, environ)
    if kind != launcher:
        right = f" or use --launcher {kind}," if kind else ""
        raise UserError(
            f"{found}: is not {name}'s, as --launcher {launcher} needs ({version}); give --mpirun FOLDER/mpirun of "
            f"{name},{right} or load another module"
        )
    return found


def kind_of(mpirun: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the launcher that an mpirun belongs to ("" if unknown), and its version."""
    path = f"{os.path.dirname(mpirun)}:{environ.get('PATH', os.defpath)}"  # Intel MPI's is a script that calls others
    try:
        done = subprocess.run(
            [mpirun, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S, env={**environ, "PATH": path}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"`{mpirun} --version`: {error}"
    text = done.stdout + done.stderr
    kind = next((launcher for launcher, (_, mark) in KINDS.items() if mark in text), "")
    version = next((line.strip() for line in text.splitlines() if re.search("[0-9]", line)), "no version")
    return kind, version
