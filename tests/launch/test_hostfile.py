"""The hostfile's grammar and filters, and the lookup of the launcher's hostfile in real processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from llama_ds.errors import UserError
from llama_ds.launch.hostfile import launcher_hostfile, parse_hostfile, select, write_hostfile
from llama_ds.layout.nodelist import expand

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
# Replaces DeepSpeed's runner: same script name and options; starts the training script.
RUNNER = """\
import subprocess, sys
script = next(word for word in sys.argv[1:] if word.endswith(".py"))
sys.exit(subprocess.run([sys.executable, script]).returncode)
"""
HOST_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


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
        (
            "\ufeffa slots=8\n",
            ":1: begins with a byte order mark, which DeepSpeed takes for a part of the first host's name; "
            "save it as UTF-8 without one",
        ),
        ("a slots=8\na slots=8\n", ":2: host a is listed twice; keep one line with all of its slots"),
        ("a slots=0\n", ":1: host a has slots=0; give its number of devices or take it out"),
        ("a slots=1000000\n", ":1: host a has slots=1000000; give its number of devices or take it out"),
        ("a slots=٣\n", ":1: 'a slots=٣' is not a host; write HOST slots=N, as in node001 slots=8"),
        ("a slots=8\x0c\n", ":1: 'a slots=8\\x0c' is not a host; write HOST slots=N, as in node001 slots=8"),
        ("a slots=8#x\n", ":1: 'a slots=8#x' is not a host; write HOST slots=N, as in node001 slots=8"),
        ("a\u2028slots=8\n", ":1: 'a\\u2028slots=8' is not a host; write HOST slots=N, as in node001 slots=8"),
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


@pytest.mark.parametrize(
    "name",
    [
        "-oProxyCommand=reboot",
        "root@a",
        "a:0",
        "a;b",
        "a,b",
        "$HOME",
        "`id`",
        "a|b",
        "a&b",
        ".a",
        "a.",
        "a-",
        "fe80::1",
        "[fe80::1]:22",
        "é",
        "\ufeffa",
        "a\x0bb",
    ],
)
def test_a_name_that_ssh_or_a_shell_would_read_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"ok slots=1\n{name} slots=8\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        parse_hostfile(str(path))
    rule = "letters, digits, '.', '_' and '-', at most 253, the first and last a letter, a digit or '_'; "
    bad = f"{name!r} is not a host name; use {rule}" if "\x0b" not in name else f"{name + ' slots=8'!r} is not a host; "
    assert str(error.value).startswith(f"{path}:2: {bad}")


@pytest.mark.parametrize("name", ["10.0.0.1", "_x", "0", "node-1.rack_2.example.com", "a--b..c", "a" * 253])
def test_other_names_pass(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"{name} slots=8\n")
    assert parse_hostfile(str(path)) == {name: 8}


LINES = st.lists(
    st.from_regex(
        r"[ \t]{0,2}[a-c0\-._@:$;,\x0b]{1,3}[ \t\u00a0]{1,2}slots=[0-9٣]{1,2}( ?#.*)?[\r\x0c]?", fullmatch=True
    )
    | st.text(max_size=12),
    max_size=4,
).map("\n".join)


@settings(deadline=None, max_examples=200)
@given(LINES | st.text())
@example("a slots=" + "9" * 5000)
@example("# b\x0ca slots=1\nc slots=2")
@example("a slots=1\rb slots=2\r\n")
def test_any_text_is_hosts_that_deepspeed_reads_too_or_one_message(text: str) -> None:
    """No accepted host can be interpreted as more than a name."""
    assume(not re.search("[\ud800-\udfff]", text))  # not valid in a text file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "hosts")
        path.write_bytes(text.encode())
        try:
            hosts = parse_hostfile(str(path))
        except UserError as error:
            assert "\n" not in str(error)
            return
        assert list(fetch_hostfile(str(path)).items()) == list(hosts.items())
    assert all(set(host) <= HOST_CHARACTERS and host[0] not in "-." for host in hosts)
    assert all(count > 0 for count in hosts.values())


@settings(deadline=None)
@given(st.binary(max_size=30))
def test_any_bytes_are_hosts_or_one_message(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "hosts")
        path.write_bytes(content)
        try:
            parse_hostfile(str(path))
        except UserError as error:
            assert "\n" not in str(error)


HOSTS = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,8}[A-Za-z0-9_])?", fullmatch=True), st.integers(1, 99), min_size=1
)


@settings(deadline=None)
@given(HOSTS, st.text())
@example({"a": 1}, "one\ntwo\r\nb slots=2\x0bc slots=3\u2028d slots=4")
@example({"a": 1}, "\udcff")
def test_what_is_written_is_read_by_us_and_by_deepspeed(hosts: dict[str, int], comment: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "hosts"))
        write_hostfile(path, hosts, comment)
        assert list(parse_hostfile(path).items()) == list(hosts.items())
        assert list(fetch_hostfile(path).items()) == list(hosts.items())
        assert os.listdir(folder) == ["hosts"]


def test_a_hostfile_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    write_hostfile(str(path), {"a": 8}, "rack 1\n\nrack 2")
    assert path.read_text() == "# rack 1\n#\n# rack 2\na slots=8\n"
    link = tmp_path / "link"
    link.symlink_to("hosts")
    write_hostfile(str(link), {"b": 8})
    assert link.is_symlink() and path.read_text() == "b slots=8\n"
    for bad in ({"-b": 8}, {"b": 0}, {}):
        with pytest.raises(UserError):
            write_hostfile(str(path), bad)
    assert path.read_text() == "b slots=8\n"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("gone/hosts", "the hostfile cannot be written: No such file or directory; name another file"),
        (".", "the hostfile cannot be written: Is a directory; name another file"),
    ],
)
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, where: str, message: str) -> None:
    path = str(tmp_path / where)
    with pytest.raises(UserError) as error:
        write_hostfile(path, {"a": 8})
    assert str(error.value) == f"{path}: {message}"
    assert Path("/dev/null").is_char_device()


NODES = st.sampled_from(["a", "b", "n1", "n2", "n03", "x"])
FILTERS = st.lists(
    st.tuples(NODES, st.lists(st.integers(0, 4), max_size=3)).map(
        lambda item: item[0] + (":" if item[1] else "") + ",".join(map(str, item[1]))
    ),
    max_size=4,
).map("@".join)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(NODES, st.integers(1, 4), min_size=1), FILTERS | st.text("ab:@,0 1", max_size=6), st.booleans())
@example({"a": 2, "b": 2}, "a@a:0", True)
@example({"a": 2, "b": 2}, "a:0@a", False)
@example({"a": 2, "b": 2}, "a:1, 0", True)
def test_a_filter_leaves_what_deepspeed_leaves(hosts: dict[str, int], text: str, include: bool) -> None:
    """Filters with which DeepSpeed fails, or leaves no host and fails later, raise an error."""
    both = (text, "") if include else ("", text)
    try:
        theirs = parse_inclusion_exclusion(hosts, *both)
    except ValueError:
        theirs = None
    if theirs:
        assert list(select(hosts, *both).items()) == list(theirs.items())
    else:
        with pytest.raises(UserError) as error:
            select(hosts, *both)
        assert str(error.value).startswith("command line: --") and "\n" not in str(error.value)


RANGES = st.sampled_from(["n[1-2]", "n[2-3]", "n[1,3]", "n[03-04]", "n[1-3]:0,1", "n2:1", "n[03-04]:0"])


@settings(deadline=None)
@given(st.lists(RANGES, min_size=1, max_size=3), st.booleans())
def test_a_range_in_a_filter_means_its_hosts(items: list[str], include: bool) -> None:
    hosts = {"n1": 2, "n2": 2, "n3": 2, "n03": 2, "n04": 2, "z": 1}
    pairs = [item.partition(":") for item in items]
    spelled = "@".join(host + colon + slots for node, colon, slots in pairs for host in expand(node))
    given_, meant = "@".join(items), parse_inclusion_exclusion(hosts, *((spelled, "") if include else ("", spelled)))
    assert select(hosts, *((given_, "") if include else ("", given_))) == meant


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("node1", "node2", "command line: --include and --exclude cannot be given both; keep one"),
        (
            "nod1",
            "",
            "command line: --include 'nod1': host 'nod1' is not in the hostfile (did you mean 'node1'?); write",
        ),
        ("node[1-3]", "", "command line: --include 'node[1-3]': host 'node3' is not in the hostfile (did you mean"),
        ("node[1-", "", "command line: --include: 'node[1-', position 5: the bracket is not closed"),
        ("", "node1:2", "command line: --exclude 'node1:2': host node1 has no slot 2; use 0 to 1"),
        (
            "",
            "node1:-1",
            "command line: --exclude 'node1:-1': '-1' is not a slot; write numbers from 0, as in node001:0,2",
        ),
        ("", "node1:٠", "command line: --exclude 'node1:٠': '٠' is not a slot"),
        ("", "node[1-2]", "command line: --exclude 'node[1-2]' leaves no host; take an item out of it"),
        ("node1,node2", "", "command line: --include 'node1,node2': host 'node1,node2' is not in the hostfile"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_told(include: str, exclude: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        select({"node1": 2, "node2": 2}, include, exclude)
    assert str(error.value).startswith(message)


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


@pytest.mark.slow
def test_deepspeeds_own_runner_is_recognised(tmp_path: Path) -> None:
    """The real launcher warns about the missing file and continues with local resources; the rank exits."""
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
