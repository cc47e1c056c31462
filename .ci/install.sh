#!/usr/bin/env bash
# Creates .venv and installs the pinned dependencies into it. `make` calls it when setup.py, constraints.txt or this
# file changed. PYTHON names the interpreter; TORCH_CPU_INDEX a mirror of PyTorch's index of CPU wheels.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
torch_cpu_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
torch=$(grep '^torch==' constraints.txt)

die() {
    echo "error: $*" >&2
    exit 2
}

create_venv() {
    command -v "$python" >/dev/null || die "PYTHON = $python is not on this machine; name a Python >= 3.10: make PYTHON=python3.11"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || die "$python is $("$python" --version 2>&1), llama_ds needs >= 3.10; name a newer one: make PYTHON=python3.11"
    "$python" -c 'import venv, ensurepip' 2>/dev/null \
        || die "$python has no venv or ensurepip; install them (Debian, Ubuntu: apt install python3-venv) or name another: make PYTHON=python3.11"
    echo "Creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
}

pip_install() {
    .venv/bin/python -m pip --disable-pip-version-check install "$@"
}

# The CPU build carries the local version +cpu, which no CUDA build matches: without it nothing is installed, rather
# than the CUDA build and its gigabytes. It may come from the user's own pip configuration (a mirror, find-links).
# Its own pin is left out of the constraints here: pip would tell of a conflict where it means "not found".
install_cpu_torch() {
    local others first_try
    others=$(mktemp)
    first_try=$(mktemp)
    grep -v '^torch==' constraints.txt >"$others"
    echo "Installing $torch+cpu (no NVIDIA GPU here)"
    if ! pip_install -c "$others" "$torch+cpu" 2>"$first_try"; then
        echo "pip's own configuration gives no $torch+cpu; trying $torch_cpu_index"
        if ! pip_install -c "$others" --extra-index-url "$torch_cpu_index" "$torch+cpu"; then
            cat "$first_try" >&2
            die "no $torch+cpu by pip's own configuration nor at $torch_cpu_index; set PIP_FIND_LINKS or TORCH_CPU_INDEX"
        fi
    fi
    rm "$others" "$first_try"
}

# A .venv cut short by an interrupt has no working pip: it is made anew.
.venv/bin/python -m pip --version >/dev/null 2>&1 || create_venv

requirement=$torch # PyPI's build: CUDA on Linux, CPU on macOS
if [ "$(uname)" = Linux ] && [[ $(nvidia-smi -L 2>/dev/null) != GPU\ * ]]; then
    requirement=$torch+cpu
    install_cpu_torch
fi

# DeepSpeed compiles its operators when they are first used. --use-pep517 builds its sdist in an environment of its own
# with setuptools alone: no torch is imported by the build, and none is downloaded for it.
export DS_BUILD_OPS=0
pip_install -c constraints.txt --use-pep517 "$requirement" --editable ".[dev]"
touch .venv/.installed
