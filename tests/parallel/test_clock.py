"""Clocks of hosts are compared: times of all ranks can be put onto rank 0's."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from tests import time_namespaces

WORKER = str(Path(__file__).with_name("clock_worker.py"))


@pytest.mark.slow
@pytest.mark.skipif(time_namespaces.missing() is not None, reason=str(time_namespaces.missing()))
def test_offsets_are_those_of_the_time_namespaces(tmp_path: Path) -> None:
    """Rank 0 is 40 s ahead of this machine; ranks 1 and 2 share a host 5000 s ahead, 3 has one 123456 s ahead."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    environment |= {"WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}
    ranks = [["env", f"RANK={r}", f"LOCAL_RANK={int(r == 2)}", sys.executable, WORKER, str(tmp_path)] for r in range(4)]
    time_namespaces.run_hosts({40: ranks[:1], 5000: ranks[1:3], 123456: ranks[3:]}, environment, 300)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert found[0][1:] == [0, 0]
    assert found[1] == found[2], "a host's clock is compared once"
    for rank, seconds in ((1, 40 - 5000), (3, 40 - 123456)):
        _, offset, error = found[rank]
        assert 0 < error < 1e5
        assert abs(offset - seconds * 1e6) <= error
