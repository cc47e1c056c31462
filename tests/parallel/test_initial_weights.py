"""All data-parallel ranks begin with the weights of the first, whatever their sizes and dtypes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import groups
from torch import Tensor, nn

from llama_ds.parallel import initial_weights


def model(seed: int) -> nn.ParameterList:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (7,), (300, 4), (1,), (2, 2)]
    found = nn.ParameterList([nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes])
    found[1].data = found[1].data.bfloat16()
    found[4].ds_status = ZeroParamStatus.NOT_AVAILABLE  # a part of a weight under ZeRO-3, which differs by rank
    return found


@pytest.mark.parametrize("bucket_bytes", [1 << 26, 100])
def test_a_rank_takes_all_weights_of_the_first(bucket_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas that begin apart never meet again, and the loss does not show it."""
    sent: list[Tensor] = []
    monkeypatch.setattr(initial_weights, "BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(groups, "_get_broadcast_src_rank", lambda: 0)
    first, second = model(1), model(2)
    own = second[4].detach().clone()
    original = DeepSpeedEngine._broadcast_model
    with initial_weights.broadcast_in_buckets():
        monkeypatch.setattr(dist, "broadcast", lambda flat, source, group: sent.append(flat.clone()))
        DeepSpeedEngine._broadcast_model(SimpleNamespace(module=first, seq_data_parallel_group=None))
        assert len(sent) == (1 if bucket_bytes > 100 else 3)
        monkeypatch.setattr(dist, "broadcast", lambda flat, source, group: flat.copy_(sent.pop(0)))
        DeepSpeedEngine._broadcast_model(SimpleNamespace(module=second, seq_data_parallel_group=None))
    assert DeepSpeedEngine._broadcast_model is original
    assert not sent and all(map(torch.equal, list(first)[:4], list(second)[:4]))
    assert torch.equal(second[4], own)
