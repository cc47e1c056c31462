"""Micro-batches arrive on the device intact, copied on a separate stream by the read-ahead thread."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llama_ds.data.read_ahead import ReadAhead
from llama_ds.training.device_batches import InFlightBatch, on_device


def batches() -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 60000, (4, 257)).astype(np.int32) for i in range(20)]


def test_a_cpu_gets_the_arrays_themselves() -> None:
    given = batches()
    assert all(a is b for a, b in zip(given, on_device(iter(given), torch.device("cpu")), strict=True))


@pytest.mark.gpu
def test_a_gpu_gets_them_while_it_computes() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ahead = ReadAhead(on_device(iter(batches()), device), depth=4)
    busy = torch.randn(4096, 4096, device=device)
    for wanted in batches():
        for _ in range(4):  # keeps the current stream busy, so that a missing wait for the copy would show
            busy = busy @ busy / 4096
        in_flight = next(ahead)
        assert isinstance(in_flight, InFlightBatch)
        rows = in_flight.take()
        assert rows.dtype == torch.int64 and rows.device == device
        assert torch.equal(rows.cpu(), torch.from_numpy(wanted).long())
    ahead.close()
