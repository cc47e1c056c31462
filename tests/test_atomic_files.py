"""Files appear whole or not at all: whoever fails, is killed or lacks room leaves what was there before."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from file_limit import files_of_at_most

from llama_ds.atomic_files import TEMPORARY, atomic_file, overwrite, temporary_name, write_atomically
from llama_ds.command_line import Answer, add_results, new_parser, run
from llama_ds.config.run_file import load_run
from llama_ds.config.text import save_text
from llama_ds.data.building.build_folder import remove_temporary
from llama_ds.data.text.inputs import BACKUP
from llama_ds.errors import UserError
from llama_ds.launch.hostfile import write_hostfile
from llama_ds.perf.plan.write import write
from llama_ds.training.boards.files import CsvFile
from llama_ds.training.boards.services import ServiceRun
from llama_ds.training.run_log import drop_steps_after

LARGE = 200_000  # characters that do not fit
ROOM = LARGE // 2
KILLED = """
import os, signal
from llama_ds.atomic_files import atomic_file
with atomic_file({path!r}, temporary={temporary!r}) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
NOBODY = 65534


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def write_results(path: str) -> None:
    """Write the results of a tool, whose error is a line and an exit code."""
    parser = new_parser(lambda args: Answer("x" * LARGE, ""), None, "")
    add_results(parser)
    if run(parser, ["--out", path]):
        raise UserError("--out")


def lines(step: int) -> str:
    return "".join(json.dumps({"step": n, "text": "x" * 1000}) + "\n" for n in range(step))


def in_service(path: str) -> None:
    service = ServiceRun(path, 0)
    service.id = "x" * LARGE
    service.write(1)


# What users have had before, and who writes it again.
WRITERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "a page, a picture or a machine": ("<html>", lambda path: save_text(path, "x" * LARGE)),
    "--out": ("{}", write_results),
    "a hostfile": ("a slots=8\n", lambda path: write_hostfile(path, {f"node{n:06}": 8 for n in range(LARGE // 10)})),
    "metrics of a run": (lines(LARGE // 1000), lambda path: drop_steps_after(path, LARGE // 1000)),
    "a board's table": ("step,name,value\r\n" + "1,loss,1.5\r\n" * (LARGE // 10), lambda path: CsvFile(path, 9)),
    "a board's service": ("{}", in_service),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, write = WRITERS[kind]
    path = tmp_path / "file"
    path.write_text(before, newline="")
    with files_of_at_most(ROOM), pytest.raises((UserError, OSError)):
        write(str(path))
    assert path.read_bytes() == before.encode() and names(tmp_path) == ["file"]
    write(str(path))
    assert path.stat().st_size > ROOM and names(tmp_path) == ["file"]


def test_an_error_while_a_file_is_made_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(str(path)) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(str(tmp_path / "folder"), "new")
    assert path.read_text() == "old" and names(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("own", [False, True], ids=["any writer", "the only writer"])
def test_a_kill_leaves_the_old_file(tmp_path: Path, own: bool) -> None:
    """What a kill leaves is known as such: to the clean-up of a build, to the inputs of a build, to the next writer."""
    path = tmp_path / "code.jsonl"
    temporary = f"{path}.tmp" if own else temporary_name(str(path))
    path.write_text("old")
    program = KILLED.format(path=str(path), temporary=temporary)
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == -signal.SIGKILL and path.read_text() == "old"
    (left,) = set(names(tmp_path)) - {path.name}
    assert TEMPORARY.fullmatch(left) and BACKUP.fullmatch(left)
    write_atomically(str(path), "new", temporary="" if own else temporary_name(str(path)))
    assert path.read_text() == "new" and names(tmp_path) == ([path.name] if own else sorted([path.name, left]))


def test_a_build_removes_what_killed_processes_of_any_version_left(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    left = ("manifest.json.tmp", "train-000000.tar.tmp-node7-4711", "manifest.json.0a1b2c3d.tmp", "index/a.tmp-b-1")
    for name in ("manifest.json", *left):
        (tmp_path / name).touch()
    remove_temporary(str(tmp_path))
    assert names(tmp_path) == ["index", "manifest.json"] and names(tmp_path / "index") == []


def test_two_writers_at_once_leave_the_file_of_one(tmp_path: Path) -> None:
    """They are threads here: two processes share even less."""
    path, errors = tmp_path / "file", list[BaseException]()
    contents = [letter * LARGE for letter in "ab"]

    def write(content: str) -> None:
        try:
            for _ in range(100):
                write_atomically(str(path), content, temporary=temporary_name(str(path)))
        except BaseException as error:
            errors.append(error)

    write_atomically(str(path), contents[0])
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_text() in contents
    assert errors == [] and path.read_text() in contents and names(tmp_path) == ["file"]


def test_permissions_stay(tmp_path: Path) -> None:
    """A private file must not become readable by all, nor a shared one of other users private."""
    path = tmp_path / "file"
    overwrite(str(path), "new")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    for mode in (0o600, 0o664, 0o755):
        path.chmod(mode)
        if not os.geteuid():
            os.chown(path, NOBODY, NOBODY)
        before = path.stat()
        overwrite(str(path), "newer")
        after = path.stat()
        assert before[stat.ST_INO] != after[stat.ST_INO]
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_full_disk_leaves_no_half_of_a_plan(tmp_path: Path) -> None:
    """Otherwise the same command would refuse to replace what it has left itself."""
    run = load_run("7b")
    longer, _ = write(run, tmp_path / "planned")
    folder = tmp_path / "full"
    with files_of_at_most(longer.stat().st_size - 1), pytest.raises(UserError, match="File too large"):
        write(run, folder)
    assert names(folder) == []
    write(run, folder)
    assert names(folder) == names(tmp_path / "planned")


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """Return a folder that belongs to a user without special rights."""
    with tempfile.TemporaryDirectory() as name:
        if not os.geteuid():
            os.chown(name, NOBODY, NOBODY)
        yield Path(name)


def error_of_user(path: Path, content: str, owner: int = NOBODY) -> str:
    """Let a user without special rights write a file of that user, or of `owner`; return the error."""
    if not os.geteuid():
        os.chown(path, owner, owner)
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        try:
            if not os.geteuid():
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            overwrite(str(path), content)
        except BaseException as error:
            os.write(theirs, type(error).__name__.encode())
        os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    with os.fdopen(ours) as answer:
        return answer.read()


def test_a_file_made_read_only_is_not_replaced(shared_folder: Path) -> None:
    path = shared_folder / "file"
    path.write_text("old")
    path.chmod(0o444)
    assert error_of_user(path, "new") == "PermissionError"
    assert path.read_text() == "old" and names(shared_folder) == ["file"]


def test_a_file_in_a_read_only_folder_is_still_written(shared_folder: Path) -> None:
    path = shared_folder / "file"
    path.write_text("old")
    shared_folder.chmod(0o555)
    assert error_of_user(path, "new") == ""
    shared_folder.chmod(0o755)
    assert path.read_text() == "new" and names(shared_folder) == ["file"]


def test_a_file_that_is_mounted_alone_is_still_written(tmp_path: Path) -> None:
    """A container may be given one file of its host, which no other file can replace."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as given:
        path = tmp_path / "file"
        path.touch()
        if os.geteuid() or subprocess.run(["mount", "--bind", given.name, str(path)], capture_output=True).returncode:
            pytest.skip("only root can mount a file")
        try:
            overwrite(str(path), "new")
            assert given.read() == b"new" and names(tmp_path) == ["file"]
        finally:
            subprocess.run(["umount", str(path)], check=True)


def test_a_file_of_several_names_or_of_another_user_stays_the_same_file(shared_folder: Path) -> None:
    first, second = shared_folder / "first", shared_folder / "second"
    first.write_text("old")
    os.link(first, second)
    overwrite(str(first), "new")
    assert second.read_text() == "new" and names(shared_folder) == ["first", "second"]
    if not os.geteuid():
        theirs = shared_folder / "theirs"
        theirs.write_text("old")
        theirs.chmod(0o666)
        before = theirs.stat()
        assert error_of_user(theirs, "new", owner=0) == ""
        assert theirs.read_text() == "new" and theirs.stat()[: stat.ST_SIZE] == before[: stat.ST_SIZE]


def test_a_log_that_is_stdout_keeps_what_others_write(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = "from llama_ds.atomic_files import overwrite; overwrite('/dev/stdout', 'results\\n')"
    command = f'(echo first; {sys.executable} -c "{program}"; echo last) >> {log}'
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert log.read_text().endswith("results\nlast\n") and names(tmp_path) == ["log"]


def test_a_long_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    for content in ("made", "replaced"):
        overwrite(str(path), content)
        assert path.read_text() == content


def test_a_link_stays(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    target.parent.mkdir()
    link.symlink_to("folder/target")
    for content in ("made", "replaced"):  # the link leads nowhere at first
        overwrite(str(link), content)
        assert link.is_symlink() and target.read_text() == content
    assert names(tmp_path) == ["folder", "link"] and names(target.parent) == ["target"]


def test_devices_and_pipes_are_written(tmp_path: Path) -> None:
    """A tool may be given /dev/null, a terminal, /dev/stdout or a shell's >(program)."""
    terminal, device = os.openpty()
    reader, writer = os.pipe()
    (tmp_path / "terminal").symlink_to(os.ttyname(device))
    for path, end in ((str(tmp_path / "terminal"), terminal), (f"/dev/fd/{writer}", reader)):
        overwrite(path, "new")
        assert os.read(end, 10) == b"new"
    for file in (terminal, device, reader, writer):
        os.close(file)
