"""The host lists of batch systems: expansion, rejected lists, and compression."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_ds.errors import UserError
from llama_ds.layout.nodelist import MAX_HOSTS, check_host, compress, expand, from_lsf, from_scheduler, from_slurm

HOST_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
# Typical names of cluster nodes; many of them differ in one number only.
NAMES = st.builds(
    "{}{:0{}d}{}{:0{}d}{}".format,
    st.sampled_from(["n", "rack", "10.0.", "_", "1a"]),
    st.sampled_from([0, 1, 2, 9, 10, 11, 99, 100]),
    st.integers(0, 3),
    st.sampled_from(["", "-ib", ".x", "."]),
    st.sampled_from([0, 1, 2, 9, 10]),
    st.integers(0, 20),
    st.sampled_from(["", ".example.com"]),
)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a,b[1-3,7]", ["a", "b1", "b2", "b3", "b7"]),
        (" b , a\n", ["b", "a"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[001,7]", ["n001", "n7"]),
        ("c[01-02]-ib[0-1].x", ["c01-ib0.x", "c01-ib1.x", "c02-ib0.x", "c02-ib1.x"]),
        ("[1-2]", ["1", "2"]),
        ("10.0.0.[1-2]", ["10.0.0.1", "10.0.0.2"]),
    ],
)
def test_a_nodelist_expands_as_in_slurm(text: str, hosts: list[str]) -> None:
    assert expand(text) == hosts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'', position 1: a host name is missing"),
        ("a,,b", "'a,,b', position 3: a host name is missing"),
        ("a,", "'a,', position 3: a host name is missing"),
        ("a b", "'a b', position 3: 'b' is in no host list"),
        ("a;reboot", "'a;reboot', position 2: ';' is in no host list"),
        ("n]", "'n]', position 2: ']' is in no host list"),
        ("n[1-3", "'n[1-3', position 2: the bracket is not closed"),
        ("n[]", "'n[]', position 3: '' is not a number or a range"),
        ("n[1,x]", "'n[1,x]', position 5: 'x' is not a number or a range"),
        ("n[٣]", "position 3: '٣' is not a number or a range"),
        ("n[3-1]", "position 3: the range 3-1 runs backwards; write 1-3"),
        ("n[1-010]", "position 3: the range 1-010 pads its ends differently"),
        ("b,-a", "position 3: '-a' is not a host name"),
        ("a,b,a", "host a is listed twice"),
        ("n[1-3],n2", "host n2 is listed twice"),
    ],
)
def test_nonsense_is_told_with_its_position(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        expand(text, "--hosts")
    assert str(error.value).startswith("--hosts: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["n[1-9999999999]", "n[1-300]-[1-300]", "a[1-65536],b", "[1-9]" * 5000])
def test_a_range_without_end_costs_no_memory(text: str) -> None:
    with pytest.raises(UserError, match=f"more than {MAX_HOSTS} hosts"):
        expand(text)


def test_as_many_hosts_as_are_allowed() -> None:
    assert len(expand(f"n[1-{MAX_HOSTS}]")) == MAX_HOSTS


@settings(deadline=None)
@given(st.text("ab0129[]-,. \n;@٣$", max_size=30) | st.text(max_size=30))
def test_any_text_is_hosts_or_one_message(text: str) -> None:
    try:
        hosts = expand(text)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert hosts and all(set(host) <= HOST_CHARACTERS and host[0] not in "-." for host in hosts)


@settings(deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=40, unique=True))
@example(["n1a1", "n1a2", "n2a2"])
def test_a_compressed_list_expands_to_the_same_hosts_in_the_same_order(hosts: list[str]) -> None:
    assert expand(compress(hosts)) == hosts


@pytest.mark.parametrize(
    "text",
    ["node[001-256]", "a,b[1-3,7],c[01-12]-ib[0-1]", "n[8-11]", "n[3,1-2]", "r[1-2]n[01-32]s[0-1].x", "n1a1,n2a2"],
)
def test_a_list_is_compressed_as_slurm_writes_it(text: str) -> None:
    assert compress(expand(text)) == text


def test_compressing_leaves_very_long_numbers_alone() -> None:
    hosts = [f"n{10**30 + i}" for i in range(2)]
    assert expand(compress(hosts)) == hosts
    assert compress([]) == ""


@pytest.mark.parametrize(
    "name", ["", "-oProxyCommand=x", ".a", "a b", "a@b", "a:0", "a$b", "a;b", "a,b", "é", "a" * 254]
)
def test_what_a_shell_or_ssh_may_take_for_more_is_no_host(name: str) -> None:
    with pytest.raises(UserError, match=r"^here: .* is not a host name; use letters, digits"):
        check_host(name, "here")


def test_slurm_counts_tasks() -> None:
    assert from_slurm("n[1-5]", "8(x4),4") == {"n1": 8, "n2": 8, "n3": 8, "n4": 8, "n5": 4}
    assert from_slurm("b,a", "2,1") == {"b": 2, "a": 1}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("8", "counts the tasks of 1 hosts, SLURM_JOB_NODELIST names 2"),
        ("8(x3)", "counts the tasks of more than 2 hosts"),
        ("8(x999999)," * 999, "counts the tasks of more than 2 hosts"),
        ("8(x", "'8(x' is not a number of tasks"),
        ("0(x2)", "'0(x2)' is not a number of tasks"),
        ("", "'' is not a number of tasks"),
    ],
)
def test_slurm_counts_that_do_not_fit_are_told(tasks: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        from_slurm("n[1-2]", tasks)
    assert str(error.value).startswith("SLURM_TASKS_PER_NODE: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("h1 8 h2 4", {"h1": 8, "h2": 4}),
        ("h2 8 h1 8 h2 2", {"h2": 10, "h1": 8}),
        ("h1 h1 h2 h2 h1", {"h1": 3, "h2": 2}),
        ("h1\nh1\nh2\n", {"h1": 2, "h2": 1}),
    ],
)
def test_lsf_lists_hosts_with_counts_or_once_for_each_slot(text: str, slots: dict[str, int]) -> None:
    found = from_lsf(text)
    assert list(found.items()) == list(slots.items())


@pytest.mark.parametrize("text", ["", "h1 0", "h1 -o", "h1 $(reboot)"])
def test_other_lists_of_lsf_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^LSB_HOSTS: "):
        from_lsf(text)


def test_a_job_says_its_hosts_in_the_environment(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("a\na\nb\n")
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "4(x2)"}
    assert from_scheduler("slurm", "", None, slurm) == {"n1": 4, "n2": 4}
    assert from_scheduler("slurm", "", 8, slurm) == {"n1": 8, "n2": 8}
    assert from_scheduler("slurm", "m[1-2]", 8, slurm) == {"m1": 8, "m2": 8}
    assert from_scheduler("pbs", "", None, {"PBS_NODEFILE": str(nodes)}) == {"a": 2, "b": 1}
    assert from_scheduler("pbs", str(nodes), 8, {}) == {"a": 8, "b": 8}
    lsf = {"LSB_MCPU_HOSTS": "x 1 y 2", "LSB_HOSTS": "z", "LSB_DJOB_HOSTFILE": str(nodes)}
    assert from_scheduler("lsf", "", None, lsf) == {"x": 1, "y": 2}
    assert from_scheduler("lsf", "", None, {"LSB_DJOB_HOSTFILE": str(nodes)}) == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("system", "given", "environment", "message"),
    [
        ("slurm", "", {}, "environment: SLURM_JOB_NODELIST is not set"),
        ("slurm", "", {"SLURM_JOB_NODELIST": "a"}, "environment: SLURM_TASKS_PER_NODE is not set"),
        ("slurm", "a", {}, "command line: --slurm 'a' does not say how many slots"),
        ("lsf", "", {}, "environment: LSB_DJOB_HOSTFILE is not set"),
        ("pbs", "", {}, "environment: PBS_NODEFILE is not set"),
        ("pbs", "", {"PBS_NODEFILE": "gone"}, "gone: the host list cannot be read: No such file or directory"),
    ],
)
def test_a_job_that_does_not_say_is_told_what_to_give(
    system: str, given: str, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        from_scheduler(system, given, None, environment)
    assert str(error.value).startswith(message)
