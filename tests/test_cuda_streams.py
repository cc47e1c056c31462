"""No two streams use the same memory in no certain order: asynchronous copies, collectives, messages.

`fake_groups.py` runs each collective on a stream of its group. `fake_cuda.py` raises a `Race` at the operator that
should have waited, and notices memory that is released while another stream uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llama_ds.checkpoint.snapshot import HostMemory
from llama_ds.config.context_parallel import CpSizes
from llama_ds.config.recompute import POLICIES
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import ModelConfig
from llama_ds.job.requests import Requests
from llama_ds.model.attention import CausalAttention
from llama_ds.model.decoder import LayerContext
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.model.ring_attention import RingAttention
from llama_ds.model.rope import RotaryTables
from llama_ds.parallel import data_parallel, sweep
from llama_ds.parallel.context_parallel import CpGroups, GroupContextParallel
from llama_ds.parallel.early_reads import issued, reading
from llama_ds.parallel.point_to_point import PipelineComm, wait
from llama_ds.parallel.tensor_parallel import GroupTensorParallel
from llama_ds.parallel.trace import Trace
from llama_ds.schedules.communication import Message
from llama_ds.schedules.schedule import Schedule
from llama_ds.training.device_batches import MicroBatch, ids_and_labels, on_device
from llama_ds.training.interruptions import Interruptions
from tests.fake_cuda import DEVICE, FakeCuda, Race, fake_cuda
from tests.fake_groups import fake_ranks

RUN_FILE = "ds_configs/quickstart.yaml"
MODEL = ModelConfig(64, 32, 88, 2, 4, 2, 8)
ROWS, T = 2, 16


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda() as found:
        yield found


@pytest.fixture
def two_ranks(cuda: FakeCuda) -> Iterator[FakeCuda]:
    with fake_ranks(cuda, 2):
        yield cuda


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, device=DEVICE, dtype=dtype)


def test_a_missing_wait_and_an_early_release_are_noticed(cuda: FakeCuda) -> None:
    """What the tests below rely on."""
    stream, weight = torch.cuda.Stream(), on_gpu(3)
    with torch.cuda.stream(stream), pytest.raises(Race):
        weight.add_(1)
    event = torch.cuda.current_stream().record_event()
    stream.wait_event(event)
    with torch.cuda.stream(stream):
        weight.add_(1)
    with pytest.raises(Race):
        weight + 1
    del weight
    assert len(cuda.races) == 1
    cuda.races.clear()
    other = on_gpu(3)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other + 1
    other.record_stream(stream)
    del other
    assert not cuda.races


def batches(count: int = 3) -> Iterator[MicroBatch]:
    return on_device(iter([MicroBatch(np.zeros((ROWS, T + 1), np.int32), 1.0)] * count), DEVICE)


def test_a_batch_is_used_after_its_copy_and_freed_after_its_use(cuda: FakeCuda) -> None:
    found = []
    for batch in batches():
        assert cuda.current.name == "main", "the caller of the iterator would compute on the stream of copies"
        ids, labels = ids_and_labels(batch, DEVICE)
        found.append(ids + labels)
        del batch, ids, labels
    assert len([line for line in cuda.log if line.startswith("main waits for stream 1:")]) == 3


@pytest.mark.parametrize("step", ["wait_event", "record_stream"])
def test_a_batch_without_either_step_is_a_race(step: str, cuda: FakeCuda) -> None:
    target: Any = Tensor if step == "record_stream" else type(cuda.current)
    with mock.patch.object(target, step, lambda *_: None):
        (batch,) = batches(1)
        if step == "wait_event":
            with pytest.raises(Race):
                ids_and_labels(batch, DEVICE)[0] + 1
        else:
            ids_and_labels(batch, DEVICE)[0] + 1
            del batch
            assert cuda.races
    cuda.races.clear()


def test_a_snapshot_is_ready_after_its_copies(cuda: FakeCuda) -> None:
    """The event follows the last copy, on the stream that updates the weights later."""
    weights = [on_gpu(4, 5), on_gpu(6)]
    ready = HostMemory().take([("model", weights)], []).ready
    issued = cuda.current.seen["main"]
    assert ready.recorded == f"main:{issued}"
    weights[0].add_(1)
    ready.synchronize()
    assert cuda.host["main"] == issued


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_gradients_are_used_after_their_reduction(wire: torch.dtype, two_ranks: FakeCuda) -> None:
    whole, group = on_gpu(2, 8), dist.new_group([0, 1])
    own = whole[0]
    whole.add_(1)
    end = data_parallel.start_reduce_scatter(whole, own, group, wire, Trace(DEVICE))
    with pytest.raises(Race):
        own.add_(1)
    end()
    own.add_(1)
    sent = [line.partition(" ")[0] for line in two_ranks.log if " on group" in line]
    assert sent == ["reduce_scatter" if wire == torch.float32 else "all_to_all"]  # NCCL would round partial sums


def test_weights_are_used_after_their_gather(two_ranks: FakeCuda) -> None:
    whole, group = on_gpu(2, 8), dist.new_group([0, 1])
    end = data_parallel.start_all_gather(whole, whole[0], group, Trace(DEVICE))
    with pytest.raises(Race):
        HostMemory().take([("model", [whole])], [])
    end()
    HostMemory().take([("model", [whole])], [])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("deferred", [False, True])
def test_a_layer_and_the_loss_wait_for_their_collectives(policy: str, deferred: bool, two_ranks: FakeCuda) -> None:
    """Sequence parallelism over two ranks, in bf16: two layers, one after the other, and the fused loss.

    Where weight gradients are deferred, layers cut their tokens into chunks.
    """
    tp = GroupTensorParallel(dist.new_group([0, 1]), True, chunks=4 if deferred else 1)
    assert tp.chunks_of(ROWS * T // 2) == (4 if deferred else 1)
    context = LayerContext(MODEL, 7, tp, CausalAttention("sdpa"), RotaryTables(MODEL, T))
    with DEVICE:
        layers = [ManualBackwardLayer(context, i, policy, first=i == 0).to(DEVICE, torch.bfloat16) for i in range(2)]
    for layer in layers:
        layer.lay_weights_together()
    context.weight_gradients.deferred = deferred
    x = on_gpu(ROWS, T // 2, 32, dtype=torch.bfloat16).requires_grad_()
    weight = on_gpu(32, 32, dtype=torch.bfloat16).requires_grad_()
    hidden: Any = x
    for layer in layers:
        hidden = layer(hidden)
    labels = on_gpu(ROWS, T, dtype=torch.int64)
    NextTokenLoss(tp, 1e-2, context.weight_gradients, 64)((hidden, weight), labels).backward()
    if deferred:
        for layer in layers:
            layer.run_deferred_wgrad()
    for tensor in (x, weight, *(p for layer in layers for p in layer.parameters())):
        assert tensor.grad is not None
        tensor.grad + 1
    issued = [line.partition(" ")[0] for line in two_ranks.log if " on group" in line]
    assert {"all_gather", "reduce_scatter", "all_reduce"} <= set(issued)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ring_uses_keys_after_they_have_arrived(ranks: int, cuda: FakeCuda) -> None:
    with fake_ranks(cuda, ranks):
        group, alone = dist.new_group(list(range(ranks))), dist.new_group([0])
        sizes = CpSizes(ring=ranks)
        kernel = RingAttention(GroupContextParallel(CpGroups(group, group, alone), sizes), "sdpa")
        q, k = (on_gpu(ROWS, T, heads, 8, dtype=torch.bfloat16) for heads in (4, 2))
        out, statistics = kernel.forward(q, k, k, None)
        for grad in kernel.backward(q, q, k, k, out, statistics, None):
            grad + 1
        arriving = kernel.cp.start_pass(k)
        with pytest.raises(Race):
            k.add_(1)  # while it is sent
        arriving()
        k.add_(1)


def test_messages_between_stages(two_ranks: FakeCuda) -> None:
    """A buffer is read after its message, and an output is overwritten after it has been sent."""
    comm = PipelineComm([[0, 1]], Schedule("1f1b", 2, 4).placement, DEVICE)
    there, back = Message("activation", 0, 1, 1, 0), Message("grad", 1, 0, 0, 0)
    output, buffer = on_gpu(4), on_gpu(4)
    posted = comm.post(back, [buffer])
    comm.send(there, [output])
    for tensor in (buffer, output):
        with pytest.raises(Race):
            tensor.add_(1)
    (received,) = wait(posted)
    received.add_(1)
    comm.finish()
    output.add_(1)


def test_the_sweep_and_its_contention_end_in_order(two_ranks: FakeCuda) -> None:
    assert 0 < sweep.contention(1 << 20, DEVICE, torch.bfloat16) <= 1


def test_times_are_read_from_events_that_the_device_has_reached(cuda: FakeCuda) -> None:
    """Reading an event that was never recorded, or of the wrong kind, fails on CUDA; so it does here."""
    trace = Trace(DEVICE)
    trace.start()
    begin = trace.now()
    trace.add("F", begin)
    origin, _ = trace._origin or (None, None)
    assert cuda.log.index("event main:0") >= 0 and trace._microseconds(trace.now()) > 0 and origin is not None
    with pytest.raises(AssertionError, match="before it is recorded"):
        torch.cuda.Event(enable_timing=True).synchronize()


def last_of(stream: Any) -> int:
    """Return the number of operators that a stream has been given."""
    return stream.seen.get(stream.name, 0)


def test_an_agreement_is_read_while_the_next_step_runs(two_ranks: FakeCuda) -> None:
    """A read on the stream of the computation would end with the step that was issued last."""
    interruptions = Interruptions(load_run(RUN_FILE, ["output_dir=x"]).checkpoint, DEVICE, Requests())
    weight, main = on_gpu(4), two_ranks.current
    weight.add_(1)
    interruptions.after_step()
    agreed = last_of(main)
    for _ in range(3):  # the next step
        weight.add_(1)
    two_ranks.waits.clear()
    interruptions.after_step()
    assert two_ranks.waits == ["world.py:wait"]
    assert agreed <= two_ranks.host["main"] < last_of(main) - 1
    interruptions.close()


def test_the_result_of_a_step_is_read_while_the_next_one_runs(two_ranks: FakeCuda) -> None:
    main, weight = two_ranks.current, on_gpu(4)
    results = [on_gpu(1).add_(1), on_gpu(1).add_(1)]
    ready = issued(DEVICE)
    own = last_of(main)
    weight.add_(1)
    with reading(DEVICE, ready):
        assert [float(result) for result in results] == [1.0, 1.0]
    assert two_ranks.host["main"] == own == last_of(main) - 1
    with reading(DEVICE), pytest.raises(Race):
        float(weight)
