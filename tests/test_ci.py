"""What `make test` says at its end."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    """The script .ci/test as a module."""
    loader = SourceFileLoader("ci_test", str(REPO / ".ci" / "test"))
    spec = spec_from_loader("ci_test", loader)
    assert spec
    module = module_from_spec(spec)
    write = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # .ci is no package
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = write
    return module


def test_the_last_line_says_what_was_skipped_and_what_to_install(runner: ModuleType, tmp_path: Path) -> None:
    """The lines are those of a real run of pytest with the options that .ci/test gives it."""
    files = {
        "test_hosts.py": "import pytest\n@pytest.mark.skipif(True, reason='not installed: pdsh, iproute2')\n"
        "@pytest.mark.parametrize('n', range(3))\ndef test_a(n): pass\n",
        "test_slurm.py": "import pytest\npytestmark = pytest.mark.skipif(True, reason='not installed: munge')\n"
        "def test_b(): pass\n",
        "test_disk.py": "import pytest\ndef test_c(): pytest.skip('only root can mount')\ndef test_d(): pass\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", *runner.SHOWN, "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert runner.summary_of_skips(done.stdout.splitlines(keepends=True)) == (
        "5 tests skipped: 1 in test_slurm.py (not installed: munge); "
        "3 in test_hosts.py (not installed: pdsh, iproute2); 1 in test_disk.py (only root can mount); "
        "install: apt-get install iproute2 munge pdsh"
    )
    assert runner.summary_of_skips(["tests/test_x.py::test_y PASSED [100%]\n"]) == ""
