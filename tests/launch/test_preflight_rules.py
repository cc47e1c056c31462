"""The preflight's findings from the answers of hosts: GPUs, clocks, relative speeds, garbage.

Only nvidia-smi is simulated: a program on PATH prints the output of a host with eight A100s, in the requested columns.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llama_ds.launch import remote
from llama_ds.launch.preflight import HostFinding, PreflightSettings, answer, devices, examine, measure, probe
from llama_ds.launch.preflight.checks import MAX_SKEW_S, LaunchingMachine, clock, judge, unlike
from llama_ds.launch.preflight.examine import question

A100, DRIVER = "NVIDIA A100-SXM4-80GB", "535.129.03"
Edit = Callable[[list[list[str]]], None]
Run = Callable[..., None]

OLD_FIELD = 'Field "clocks_event_reasons.active" is not a valid field to query.\n'
LOST = (
    "Unable to determine the device handle for GPU 0000:CA:00.0: GPU is lost.  Reboot the system to recover this GPU\n"
)
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running.\n"
)
FALLEN = "NVRM: Xid (PCI:0000:07:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
FAULT = "NVRM: Xid (PCI:0000:07:00): 31, pid=4242, name=python, Ch 00000008, MMU Fault: ENGINE GRAPHICS"
REMAPPED = "NVRM: Xid (PCI:0000:0f:00): 63, pid=77, name=python, Row Remapper: New row marked for remapping, reset gpu"


def rows() -> list[list[str]]:
    """The fields of eight idle A100s, as GPU_FIELDS has them."""
    return [
        [
            str(i),
            A100,
            DRIVER,
            "81920",
            str(30 + i),
            "0",
            "0x0000000000000001",
            f"GPU-0000000{i}-5a1f-4c2e-9d3b-0a1b2c3d4e5f",
        ]
        for i in range(8)
    ]


def column(name: str) -> int:
    return probe.GPU_FIELDS.index(name)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Put programs first on the path: nvidia-smi, which knows `field` of both names, and dmesg."""

    def install(
        edit: Edit = lambda found: None, tail: str = "", code: int = 0, field: str = probe.SLOWDOWN[0], dmesg: str = ""
    ) -> None:
        found = rows()
        edit(found)
        (tmp_path / "rows").write_text("".join(", ".join(row) + "\n" for row in found) + tail)
        (tmp_path / "log").write_text(dmesg)
        fields = ",".join(field if name == "slowdown" else name for name in probe.GPU_FIELDS)
        asked = f'"$*" = "--query-gpu={fields} --format=csv,noheader,nounits"'
        smi = f"if [ {asked} ]; then cat {tmp_path}/rows; exit {code}; fi\necho '{OLD_FIELD.strip()}'; exit 2"
        for name, text in {"nvidia-smi": smi, "dmesg": f"cat {tmp_path}/log"}.items():
            path = tmp_path / name
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install


def problems(slots: int = 8) -> list[devices.Problem]:
    return devices.problems(probe.gpus(5.0), probe.xids(5.0), slots)


def put(row: int, name: str, value: str) -> Edit:
    def edit(found: list[list[str]]) -> None:
        found[row][column(name)] = value

    return edit


def everywhere(name: str, value: str) -> Edit:
    def edit(found: list[list[str]]) -> None:
        for row in found:
            row[column(name)] = value

    return edit


def test_healthy_gpus_are_healthy(install: Run) -> None:
    install()
    told = probe.gpus(5.0)
    assert told and len(told["devices"]) == 8
    assert problems() == []
    assert devices.models(told) == f"{A100}, 81920 MiB"
    assert devices.drivers(told) == DRIVER


def test_a_driver_from_before_535_is_asked_by_the_old_name(install: Run) -> None:
    install(put(2, "slowdown", "0x0000000000000080"), field="clocks_throttle_reasons.active")
    assert [problem[0] for problem in problems()] == ["slowed down"]


@pytest.mark.parametrize("absent", ["[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]", "Disabled"])
@pytest.mark.parametrize("name", ["ecc.errors.uncorrected.volatile.total", "temperature.gpu", "slowdown"])
def test_what_a_gpu_does_not_tell_is_not_held_against_it(install: Run, name: str, absent: str) -> None:
    install(everywhere(name, absent))
    assert problems() == []


@pytest.mark.parametrize("reasons", ["0x0000000000000000", "0x0000000000000004", "0x0000000000000002", "Not Active"])
def test_idleness_and_power_caps_are_no_trouble(install: Run, reasons: str) -> None:
    install(everywhere("slowdown", reasons))
    assert problems() == []


@pytest.mark.parametrize(
    ("name", "value", "check", "severity", "words"),
    [
        ("ecc.errors.uncorrected.volatile.total", "12", "ecc", "error", ["12 uncorrected", "0 are allowed", "reset"]),
        ("temperature.gpu", "88", "temperature", "warning", ["88 C", "the limit is 85", "fans"]),
        ("temperature.gpu", "85", "temperature", "warning", ["85 C"]),
        ("slowdown", "0x0000000000000080", "slowed down", "error", ["power supply", "0x0000000000000080", "look at"]),
        ("slowdown", "0x0000000000000048", "slowed down", "error", ["for its heat", "0x0000000000000048"]),
        ("slowdown", "0x0000000000000020", "slowed down", "warning", ["by the driver, for its heat"]),
        ("slowdown", "0x0000000000000060", "slowed down", "error", ["by the driver", "by its hardware"]),
        ("temperature.gpu", "[Unknown Error]", "gpu", "error", ["'[Unknown Error]' for its temperature.gpu", "reset"]),
        ("memory.total", "[GPU is lost]", "gpu", "error", ["'[GPU is lost]' for its memory.total"]),
        ("slowdown", "[GPU requires reset]", "gpu", "error", ["'[GPU requires reset]' for its slowdown"]),
    ],
)
def test_a_gpu_in_trouble_is_named(
    install: Run, name: str, value: str, check: str, severity: str, words: list[str]
) -> None:
    install(put(3, name, value))
    ((found, how, text),) = problems()
    assert (found, how) == (check, severity)
    assert text.startswith("GPU 3 (GPU-00000003-")
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"edit": lambda found: found.pop(5)}, ["lists 7 GPUs, the hostfile has 8 slots", "fewer slots"]),
        ({"edit": lambda found: found.pop(5), "tail": LOST, "code": 255}, [repr(LOST.strip()), "reset the GPU"]),
        (
            {"edit": lambda found: found.clear(), "tail": NO_DRIVER, "code": 9},
            ["couldn't communicate", "repair its driver"],
        ),
        (
            {"edit": lambda found: found.clear(), "tail": "No devices were found\n", "code": 6},
            ["No devices were found"],
        ),
        ({"tail": "0, what is this\n"}, ["'0, what is this'"]),
        ({"edit": lambda found: found.clear(), "code": 1}, ["exit code 1"]),
        ({"field": "neither"}, ["not a valid field"]),
    ],
    ids=["missing", "lost", "no driver", "no devices", "garbage", "says nothing", "unknown field"],
)
def test_missing_gpus_and_a_failing_nvidia_smi_are_named(
    install: Run, arguments: dict[str, Any], words: list[str]
) -> None:
    install(**arguments)
    ((check, severity, text),) = problems()
    assert (check, severity) == ("gpu", "error")
    assert all(word in text for word in words), text


def test_an_nvidia_smi_that_hangs_is_named_before_the_host_is_late(install: Run, tmp_path: Path) -> None:
    install()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    assert probe.gpus(0.3) == {"problem": "no answer within 0 s"}
    assert probe.SMI_SHARE + probe.DMESG_SHARE < 1


def kernel_log(*texts: str) -> str:
    """A kernel log of the last seconds: its stamps count from the host's start, which may be days ago."""
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return "".join(f"[{max(0.0, uptime - len(texts) + i):12.6f}] {text}\n" for i, text in enumerate(texts))


def test_xids_of_hardware_are_errors_while_they_are_new(install: Run) -> None:
    install(dmesg=kernel_log("x", FAULT, FALLEN, REMAPPED))
    fallen, remapped = problems()
    assert fallen[:2] == ("xid", "error") and fallen[2].startswith(FALLEN)
    assert "0.0 hours ago; reset that GPU" in fallen[2]
    assert remapped[:2] == ("xid", "warning") and "Row Remapper" in remapped[2]


def test_old_xids_are_warnings_and_each_is_said_once() -> None:
    day = devices.RECENT_S
    assert devices.problems(None, [{"age_s": day + 60, "text": FALLEN}], 8)[0][1] == "warning"
    assert devices.problems(None, [{"age_s": None, "text": FALLEN}], 8)[0][1] == "error"  # a log without times
    both = [{"age_s": day + 60, "text": FALLEN}, {"age_s": 7200.0, "text": FALLEN}]
    ((_, severity, text),) = devices.problems(None, both, 8)
    assert severity == "error" and "2.0 hours ago" in text
    other = FALLEN.replace("0000:07", "0000:0f")
    assert len(devices.problems(None, [{"age_s": 60.0, "text": line} for line in (FALLEN, other)], 8)) == 2


def test_a_host_with_a_bad_gpu_is_named_by_the_whole_preflight(install: Run, tmp_path: Path) -> None:
    install(put(6, "ecc.errors.uncorrected.volatile.total", "2"), dmesg=kernel_log(FALLEN))
    report = examine({"localhost": 9}, PreflightSettings(output_dir=str(tmp_path), min_free_gib=0.0))
    found = [f for f in report.findings if f.check in ("ecc", "xid", "gpu")]
    assert [(f.host, f.check, f.severity) for f in found] == [
        ("localhost", "xid", "error"),
        ("localhost", "gpu", "error"),
        ("localhost", "ecc", "error"),
    ]
    assert report.good == []


def host(model: str = A100, driver: str = DRIVER, count: int = 8, cores: int = 64) -> dict[str, Any]:
    """A host's answer that only the hardware rules evaluate."""
    found: list[list[str]] = [[r[0], model, driver, *r[3:]] for r in rows()[:count]]
    listed = [dict(zip(probe.GPU_FIELDS, row, strict=True)) for row in found]
    return {"gpus": {"devices": listed} if count else None, "cores": cores, "xids": []}


def named(answers: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    return [(f.host, f.check, f.severity) for f in unlike(answers)]


@pytest.mark.parametrize(("model", "named"), [(A100, True), ("NVIDIA H100 80GB HBM3", False), ("Unknown X1", False)])
def test_a_gpu_without_float8_is_named_where_the_run_needs_it(model: str, named: bool) -> None:
    found = list(devices.without_fp8(host(model=model)["gpus"]))
    text = f"{model} has no products in float8; set compute.fp8=off, or use Hopper or newer"
    assert found == ([("fp8", "error", text)] if named else [])
    assert list(devices.without_fp8(None)) == []


def test_other_hardware_than_most_is_named() -> None:
    usual = {f"node{i}": host() for i in range(254)}
    found = unlike({**usual, "older": host(driver="470.57.02"), "other": host(model="NVIDIA A100-PCIE-40GB")})
    driver, model = sorted(found, key=lambda f: f.host)
    assert (driver.host, driver.check, driver.severity) == ("older", "gpu driver", "warning")
    assert driver.text == f"has 470.57.02, 255 of 256 hosts have {DRIVER}; install the same version"
    assert (model.host, model.check, model.severity) == ("other", "gpu model", "warning")
    assert model.text.startswith(f"has NVIDIA A100-PCIE-40GB, 81920 MiB, 255 of 256 hosts have {A100}, 81920 MiB; ")
    assert named({**usual, "without": host(count=0)}) == [("without", "gpu model", "error")]
    assert named({**usual, "fewer": host(count=7)}) == []  # the check against its slots covers this


def test_of_two_hosts_the_first_is_the_measure_but_one_without_gpus_never_is() -> None:
    assert named({"a": host()}) == []
    assert named({"a": host(), "b": host(driver="470.57.02")}) == [("b", "gpu driver", "warning")]
    assert named({"a": host(count=0), "b": host()}) == [("a", "gpu model", "error")]
    assert named({"a": host(count=0), "b": host(count=0, cores=32)}) == [("b", "cores", "warning")]
    assert named({}) == []
    broken = {"gpus": {"problem": "GPU is lost"}, "cores": 64, "xids": []}
    assert named({"a": host(), "b": host(), "c": broken}) == []  # another check reports c


# Clocks.


@pytest.mark.parametrize("skew", [0.0, 1.9, -1.9, MAX_SKEW_S + 0.5, -MAX_SKEW_S - 0.5])
def test_a_clock_within_the_bound_is_right(skew: float) -> None:
    assert clock(skew, bound_s=0.5) == []


@pytest.mark.parametrize("skew", [2.6, -2.6, 3600.0, -1e9, math.nan, math.inf])
def test_a_clock_beyond_the_bound_is_named(skew: float) -> None:
    ((check, severity, text),) = clock(skew, bound_s=0.5)
    assert (check, severity) == ("clock", "error")
    assert f"{skew:+.1f} s from this machine's" in text and "2 s are allowed" in text and "chrony" in text


def test_each_clock_is_judged_alone(tmp_path: Path) -> None:
    """Only this machine's clock is the reference: neither one host, nor half of them, nor all can outvote it."""
    good = examine_answer(tmp_path)
    own = LaunchingMachine(good["python"], good["packages"], good["code"], {})
    for skews in ([5.0], [0.0, 5.0], [0.0, 0.0], [5.0, 5.0, 5.0], [0.0, 0.0, 5.0, 5.0], [math.nan, 0.0]):
        answers = {f"node{i}": good | {"skew_s": skew, "skew_bound_s": 0.5} for i, skew in enumerate(skews)}
        slots = dict.fromkeys(answers, 1)
        found = [f for f in judge(answers, own, slots, PreflightSettings(min_free_gib=0.0)) if f.check == "clock"]
        assert [f.host for f in found] == [f"node{i}" for i, skew in enumerate(skews) if skew != 0]


def examine_answer(folder: Path) -> dict[str, Any]:
    """The answer of this machine."""
    settings = PreflightSettings(output_dir=str(folder))
    said = remote.on_hosts(["localhost"], [sys.executable, "-I", "-"], question(settings, []))["localhost"]
    value = answer.read(said.out, "preflight", answer.ANSWER)
    assert value is not None, said
    return value


# Garbage.


def test_an_answer_of_another_shape_is_none(tmp_path: Path) -> None:
    good = examine_answer(tmp_path)

    def read(value: Any) -> Any:
        return answer.read(f"motd\n<preflight>{json.dumps(value)}</preflight>\n", "preflight", answer.ANSWER)

    assert read(good) == good
    for name in answer.ANSWER:
        assert read({key: value for key, value in good.items() if key != name}) is None
    wrong = [True, math.nan, math.inf, 1e300, [], {}, "text", [1], {"a": []}, None, 10**400]
    for name, value in itertools.product(answer.ANSWER, wrong):
        changed = good | {name: value}
        if not answer.fits(value, answer.ANSWER[name]):
            assert read(changed) is None, (name, value)
        else:
            unjudged = read(changed) | {"skew_s": 0.0, "skew_bound_s": 0.0}
            judge(
                {"x": unjudged}, LaunchingMachine("", {}, "", {}), {"x": 1}, PreflightSettings(nic="eth0")
            )  # no exception
    for name in ("time", "cores"):
        assert read(good | {name: math.nan}) is None and read(good | {name: True}) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<preflight>",
        "<preflight></preflight>",
        "<preflight>[]</preflight>",
        "<preflight>{}</preflight>",
        "<preflight>" + "[" * 100_000 + "</preflight>",
        "<preflight>{" * 100_000,
        "<preflight>" + "9" * 5000 + "</preflight>",
        "\x00\ufffd" * 1000,
    ],
)
def test_garbage_is_none(text: str) -> None:
    assert answer.read(text, "preflight", answer.ANSWER) is None


# Speeds.


Speeds = dict[str, list[dict[str, Any]]]


def speeds(*hosts: list[float]) -> Speeds:
    return {f"node{i}": [{"tflops": value, "groups": {}} for value in found] for i, found in enumerate(hosts)}


def slow_devices(*hosts: list[float]) -> list[tuple[str, str]]:
    found = measure.slow(speeds(*hosts), "error")
    assert {f.check for f in found} <= {"slow device"} and {f.severity for f in found} <= {"error"}
    return [(f.host, f.text.split(" multiplies")[0]) for f in found]


def test_a_device_far_below_the_others_is_slow() -> None:
    assert slow_devices([250.0, 251.0, 249.0, 180.0]) == [("node0", "device 3")]  # all on one host
    assert slow_devices(*[[250.0 + i % 3] * 8 for i in range(255)], [250.0] * 7 + [200.0]) == [("node255", "device 7")]
    (found,) = measure.slow(speeds([250.0], [250.0], [100.0]), "warning")
    assert found == HostFinding("node2", "slow device", "warning", found.text)
    assert "100 TFLOP/s, the median is 250, the minimum 225; look at" in found.text


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [[]],
        [[250.0]],
        [[250.0], [1.0]],  # two values have no majority
        [[250.0]] * 5,
        [[0.0]] * 3,
        [[250.0], [250.0], [226.0]],  # less than a tenth below
        [[250.0], [250.0], [125.0], [125.0]],  # half of them: it is unclear which half
        [[250.0], [290.0], [210.0], [260.0], [190.0]],  # 25 percent below the median is within the noise
    ],
    ids=["none", "no device", "one", "two", "equal", "zero", "near", "half", "noise"],
)
def test_where_no_device_stands_out_none_is_slow(hosts: list[list[float]]) -> None:
    assert slow_devices(*hosts) == []


def test_as_long_as_fewer_than_half_are_slow_they_are_found() -> None:
    for slow in range(1, 4):
        hosts = [[250.0 + 0.1 * i] for i in range(8 - slow)] + [[125.0]] * slow
        assert [name for name, _ in slow_devices(*hosts)] == [f"node{i}" for i in range(8 - slow, 8)]


def test_a_speed_that_is_no_number_is_slow_and_moves_no_median() -> None:
    assert slow_devices([250.0], [math.nan], [250.0], [250.0]) == [("node1", "device 0")]
    assert slow_devices([math.nan]) == [("node0", "device 0")]
    assert not answer.fits([{"tflops": math.nan, "groups": {}}], answer.SPEEDS)  # a host's NaN is rejected earlier


@pytest.mark.parametrize("count", range(1, 10))
def test_every_host_is_paired_with_the_one_before_and_the_one_after_it(count: int) -> None:
    names = [f"node{i}" for i in range(count)]
    groups = measure.plan(dict.fromkeys(names, 2), {name: f"address of {name}" for name in names}, 20000)
    partners: dict[str, set[str]] = {name: set() for name in names}
    for name in names:
        kinds = Counter(one["name"] for one in groups[name])
        assert set(kinds.values()) == {1} and "within" in kinds
        assert [one["port"] for one in groups[name]] == sorted({one["port"] for one in groups[name]})
        for one in groups[name]:
            members = [
                (other["first"], there)
                for there in names
                for other in groups[there]
                if (other["name"], other["master"]) == (one["name"], one["master"])
            ]
            assert one["size"] == 2 * len(members)
            assert sorted(first for first, _ in members) == [2 * i for i in range(len(members))]
            partners[name] |= {there for _, there in members} - {name}
    for i, name in enumerate(names):
        around = {names[i - 1], names[(i + 1) % count]} - {name}
        assert partners[name] == around


def paired(rate: Callable[[int, int], float | None], count: int = 0, order: Sequence[str] = ()) -> Speeds:
    """The measurements of hosts with one slot if the pair (i, j) all-reduces at rate(i, j)."""
    names = list(order) or [str(i) for i in range(count)]
    groups = measure.plan(dict.fromkeys(names, 1), {name: name for name in names}, 20000)
    found: dict[str, list[dict[str, Any]]] = {name: [{"tflops": 1.0, "groups": {}}] for name in names}
    for name in names:
        for one in groups[name]:
            other = next(
                n
                for n in names
                for o in groups[n]
                if n != name and (o["name"], o["master"]) == (one["name"], one["master"])
            )
            value = rate(int(name), int(other))
            found[name][0]["groups"][one["name"]] = value
            if value is None:
                found[name][0]["problem"] = f"{one['name']}: timed out"
    return found


@pytest.mark.parametrize("count", [3, 4, 5, 8, 255, 256])
def test_only_the_slow_host_of_a_pair_has_a_slow_link(count: int) -> None:
    for bad in {0, 1, count // 2, count - 1}:
        found = measure.slow(paired(lambda i, j, bad=bad: 5.0 if bad in (i, j) else 20.0, count), "error")
        assert [(f.host, f.check, f.severity) for f in found] == [(str(bad), "slow link", "error")]
        assert "at 5 GB/s, the median is 20, the minimum 14; look at" in found[0].text


def test_links_that_are_alike_or_only_two_are_not_slow() -> None:
    assert measure.slow(paired(lambda i, j: 20.0, 6), "error") == []
    assert measure.slow(paired(lambda i, j: 1.0, 2), "error") == []
    assert measure.slow(paired(lambda i, j: 15.0 if 3 in (i, j) else 20.0, 6), "error") == []  # three quarters


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_a_failed_all_reduce_is_held_against_the_host_that_has_no_other(count: int) -> None:
    slots = paired(lambda i, j: None if 1 in (i, j) else 20.0, count)
    (found,) = measure.failed(slots)
    assert (found.host, found.check, found.severity) == ("1", "all-reduce", "error")
    assert "timed out" in found.text and "check its network" in found.text
    assert measure.slow(slots, "error") == []


def accused(slots: Speeds) -> set[str]:
    return {found.host for found in measure.failed(slots) + measure.slow(slots, "error")}


@pytest.mark.parametrize("wrong", [5.0, None], ids=["slow", "fails"])
@pytest.mark.parametrize("bad", [{3}, {2, 4}, {0, 6}], ids=str)
def test_a_healthy_host_beside_bad_ones_is_not_named_after_the_second_look(bad: set[int], wrong: float | None) -> None:
    """The host stands between two bad hosts, or beside one and was busy when paired with the other."""
    first = paired(lambda i, j: wrong if {i, j} & bad else 8.0 if {i, j} == {1, 2} else 20.0, 8)
    seen = accused(first)
    assert seen > {str(i) for i in bad}, "the second look has something to do"
    order = measure.second_look(first, seen)
    assert seen < set(order) and len(order) == 2 * len(seen)
    assert not any({a, b} <= seen for a, b in itertools.pairwise(order))
    measure.better(first, paired(lambda i, j: wrong if {i, j} & bad else 25.0, order=order), seen)
    assert accused(first) == {str(i) for i in bad}


def test_the_second_look_is_the_better_of_two_and_forgives_nothing_within_a_host() -> None:
    first = {"a": [{"tflops": 1.0, "groups": {"within": None, "pair": 20.0}}], "b": [{"tflops": 2.0, "groups": {}}]}
    again = {"a": [{"tflops": 3.0, "groups": {"within": 30.0, "pair": 10.0}}], "b": [{"tflops": 9.0, "groups": {}}]}
    measure.better(first, again, {"a"})
    assert first["a"] == [{"tflops": 3.0, "groups": {"within": None, "pair": 20.0}}]
    assert first["b"][0]["tflops"] == 2.0  # the first of the hosts that are not accused
    assert measure.second_look(paired(lambda i, j: None, 4), {"0", "1", "2", "3"}) == []  # no other host to pair with


def test_an_all_reduce_within_a_host_that_fails_is_its_own() -> None:
    one = {"tflops": 1.0, "groups": {"within": None, "pair": 20.0}, "problem": "within: no memory"}
    (found,) = measure.failed({"a": [one, one], "b": [{"tflops": 1.0, "groups": {"within": 30.0, "pair": 20.0}}]})
    assert found.host == "a" and "no memory" in found.text
