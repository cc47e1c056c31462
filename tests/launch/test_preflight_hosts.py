"""The preflight on real hosts: a problem of one host is reported for that host alone, and a spare replaces it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llama_ds.launch.hostfile import parse_hostfile
from llama_ds.launch.preflight import PreflightSettings, Report, examine, promote
from tests.hosts import Hosts, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
ROOT = Path(__file__).resolve().parents[2]
BAD, SPARE = "node2", "node4"


def link(mbit: int) -> str:
    """Return the shell command that limits a host's link; without it, other work on this machine sets its speed."""
    return f"tc qdisc replace dev eth0 root tbf rate {mbit}mbit burst 64kb limit 4mb"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(4, tmp_path_factory.mktemp("hosts"), subnet=95, before=link(200)) as those:
        yield those


@pytest.fixture
def settings(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreflightSettings:
    for name, value in hosts.environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "runs").mkdir()
    needed = tmp_path / "tokenizer.model"
    needed.write_text("a tokenizer")
    return PreflightSettings(output_dir=str(tmp_path / "runs"), files=[str(needed)], min_free_gib=0.5, timeout_s=90)


def look(hosts: Hosts, settings: PreflightSettings) -> Report:
    return examine(dict.fromkeys(hosts.names, 1), settings)


def assert_only_bad(report: Report, *problems: tuple[str, str]) -> None:
    """The bad host alone is named with its problems, as check and text, and the spare replaces it."""
    errors = [f for f in report.findings if f.severity == "error"]
    assert {f.host for f in errors} == {BAD}, errors
    for check, text in problems:
        assert any(f.check == check and text in f.text for f in errors), errors
    chosen = promote(dict.fromkeys(["node1", BAD, "node3"], 1), report.good, {SPARE: 1})
    assert list(chosen or {}) == ["node1", SPARE, "node3"]


def test_good_hosts_are_good(hosts: Hosts, settings: PreflightSettings) -> None:
    said: list[str] = []
    report = examine(dict.fromkeys(hosts.names, 1), settings, said.append)
    assert report.good == hosts.names, report.findings
    assert "4 of 4 hosts have answered" in said


@pytest.mark.parametrize(
    ("before", "problems"),
    [
        (
            "mount -t tmpfs -o size=8m none {runs}; mount --bind {older} {metadata}; mount --bind {older} {code}",
            [
                ("disk", "GiB free"),
                ("packages", "pyyaml 0.0.1 (here"),
                ("code", "another version of llama_ds"),
            ],
        ),
        ("mount -t tmpfs -o size=1g none {runs}", [("shared folder", "does not see files written")]),
        (
            "mount -o bind,ro {runs} {runs} && mount -o remount,ro,bind {runs}",
            [("disk", "cannot be written: Read-only")],
        ),
        ("mount -t tmpfs none {bin}", [("answer", "exit code 127")]),
        ("mount --bind {garbage} {python}", [("answer", "instead of what it was asked")]),
        ("mount --bind /dev/null {files} && mount -t tmpfs none {parent}", [("file", "does not exist")]),
    ],
    ids=["full disk, packages, code", "not shared", "read-only", "no Python", "garbage", "file"],
)
def test_what_is_wrong_with_a_host_is_named(
    before: str, problems: list[tuple[str, str]], hosts: Hosts, settings: PreflightSettings, tmp_path: Path
) -> None:
    programs = {
        "garbage": "#!/bin/sh\nhead -c 5000000 /dev/urandom\n",
        "older": "Metadata-Version: 2.1\nName: PyYAML\nVersion: 0.0.1\n",
    }
    paths: dict[str, object] = {"runs": settings.output_dir, "bin": Path(sys.executable).parent, "parent": tmp_path}
    for name, content in programs.items():
        path = hosts.folder / name
        path.write_text(content)
        path.chmod(0o755)
        paths[name] = path
    import yaml

    site = Path(yaml.__file__).parents[1]
    paths |= {"metadata": next(site.glob("[pP]y[yY][aA][mM][lL]-*.dist-info")) / "METADATA", "files": settings.files[0]}
    paths |= {"code": ROOT / "llama_ds" / "log.py", "python": os.path.realpath(sys.executable)}
    hosts.restart(BAD, before.format_map(paths))
    try:
        report = look(hosts, settings)
    finally:
        hosts.restart(BAD)
    assert_only_bad(report, *problems)


def test_a_host_that_hangs_is_named(hosts: Hosts, settings: PreflightSettings) -> None:
    """Its Python never answers; the others have more time than they need on a busy machine."""
    hangs = hosts.folder / "hangs"
    hangs.write_text("#!/bin/sh\nexec sleep 1000\n")
    hangs.chmod(0o755)
    hosts.restart(BAD, f"mount --bind {hangs} {os.path.realpath(sys.executable)}")
    try:
        report = look(hosts, replace(settings, timeout_s=20))
    finally:
        hosts.restart(BAD)
    assert_only_bad(report, ("answer", "no answer within 20 s"))


def test_refused_wrong_key_and_cut_off(hosts: Hosts, settings: PreflightSettings) -> None:
    hosts.unplug(BAD)
    assert_only_bad(look(hosts, settings), ("answer", "Connection timed out"))
    hosts.power_off(BAD)
    try:
        assert_only_bad(look(hosts, settings), ("answer", "Connection refused"))
        key = hosts.folder / "authorized_keys"
        other = hosts.folder / "other_keys"
        other.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA nobody\n")
        hosts.start(BAD, f"mount --bind {other} {key}")
        hosts.wait_for(BAD)
        assert_only_bad(look(hosts, settings), ("answer", "Permission denied"))
    finally:
        hosts.restart(BAD)


def test_a_slow_link_is_found_by_its_pairings(hosts: Hosts, settings: PreflightSettings) -> None:
    """A host with a tenth of the others' bandwidth is slow with both neighbours; the neighbours are not slow."""
    hosts.restart(BAD, link(20))
    try:
        report = look(hosts, replace(settings, measure=True, burn_s=0.2, slow="error"))
    finally:
        hosts.restart(BAD)
    assert_only_bad(report, ("slow link", "GB/s"))
    for slots in report.speeds.values():
        assert slots[0]["tflops"] > 0
        assert set(slots[0]["groups"]) == {"pair", "other pair"}
        assert all(speed > 0 for speed in slots[0]["groups"].values())


def test_the_tool_writes_the_hostfile_with_the_spare(hosts: Hosts, settings: PreflightSettings, tmp_path: Path) -> None:
    import subprocess

    names = ["node1", BAD, "node3"]
    hostfile = hosts.write_hostfile(tmp_path / "hosts", 1, names)
    spares = hosts.write_hostfile(tmp_path / "spares", 1, [SPARE])
    out = tmp_path / "good"
    hosts.unplug(BAD)
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / "preflight.py"), "--hostfile", str(hostfile), "--spares", str(spares),
             "--out", str(out), "--no-measure"],
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    finally:
        hosts.plug(BAD)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{BAD}  error    answer: ssh:" in done.stdout
    assert "3 of 4 hosts are good" in done.stdout
    assert list(parse_hostfile(str(out))) == ["node1", SPARE, "node3"]
