"""The preflight checks hundreds of hosts in parallel, and reports exactly those that hang or answer garbage.

The test uses fewer hosts and the code with which `tools/cluster_scale.py --preflight` measured 256 (docs/measurements).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ds import shipped
from llama_ds.launch import remote
from llama_ds.launch.preflight import PreflightSettings
from llama_ds.launch.preflight.examine import question
from llama_ds.launch.preflight.stubs import StubHosts
from llama_ds.launch.scale import fan_out
from tests.hosts import missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
HOSTS, SLOTS, TIMEOUT_S = 10, 8, 7.0


def test_only_the_host_that_hangs_and_the_one_with_garbage_are_named() -> None:
    found = fan_out(shipped.command("preflight"), HOSTS, SLOTS, TIMEOUT_S)
    well, spoilt = found["all well"], found["one hangs, one answers garbage"]
    assert (well["good"], well["exit_code"], well["named"]) == (HOSTS, 0, 0)
    assert well["peak_processes"] > 1 and well["peak_processes_of_hosts"] > 1  # the stub hosts were really used
    assert (spoilt["good"], spoilt["exit_code"], spoilt["named"]) == (HOSTS - 2, 2, 2)
    hangs, garbage = spoilt["first_named"]
    assert hangs.startswith(f"127.0.1.{HOSTS // 2 + 1}: error: answer: no answer within {TIMEOUT_S:.0f} s;")
    assert garbage.startswith(f"127.0.1.{HOSTS}: error: answer: answers ") and "instead of what it was asked" in garbage
    assert (found["all hang"]["good"], found["all hang"]["named"]) == (0, HOSTS)


def test_hosts_that_hang_keep_no_other_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More hosts hang than are waited for at once: the others are asked before the hanging ones time out."""
    monkeypatch.setattr(remote, "AT_ONCE", 2)
    settings = PreflightSettings(output_dir=str(tmp_path))
    with StubHosts(6, tmp_path, settings) as hosts:
        hanging, well = hosts.names[:4], hosts.names[4:]
        hosts.spoil(hangs=" ".join(hanging))
        for name, value in hosts.environment.items():
            monkeypatch.setenv(name, value)
        came: list[str] = []
        answers = remote.on_hosts(
            hosts.names, ["python"], question(settings, [str(tmp_path / "hangs")]), timeout_s=5.0, hold_s=0.5,
            done=lambda said: came.append(said.host),
        )  # fmt: skip
    assert [answers[host].code for host in hosts.names] == [None] * 4 + [0] * 2
    assert set(came[:2]) == set(well)  # before any hanging host timed out
