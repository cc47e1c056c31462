"""Every place of the program that depends on CUDA runs on a fake CUDA device: shapes, dtypes, operators' schemas.

`cuda_sites.py` lists the places, and a tracer notes which lines run. A new place fails the last test until a case here
runs it, or `NOT_RUN` says why none can.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llama_ds.benchmarks import against_transformers
from llama_ds.benchmarks.layer import LayerContestant
from llama_ds.benchmarks.machine import layouts
from llama_ds.benchmarks.machine import rank as machine_rank
from llama_ds.benchmarks.machine.check import memory_beside_plan
from llama_ds.benchmarks.report import layer_results
from llama_ds.checkpoint.snapshot import HostMemory
from llama_ds.config.context_parallel import ALL_TO_ALL, HIERARCHICAL, RING, cp_sizes
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.evaluation import one_process, scoring
from llama_ds.layout.layout import Layout, resolve_layout
from llama_ds.layout.optimizer_states import MASTER
from llama_ds.model import attention, fp8, graphed_layers
from llama_ds.model.attention import CausalAttention
from llama_ds.model.attention_kernels import attention_kernel, block_kernel
from llama_ds.model.build import build_model
from llama_ds.model.graphs import CudaGraphs
from llama_ds.model.key_value_cache import KeyValueCache
from llama_ds.model.llama import Llama, layer_context
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.model.tensor_parallel import SingleRank
from llama_ds.parallel import burn, deepspeed_check, messages, recording, temporary, world
from llama_ds.parallel.early_reads import issued, reading
from llama_ds.parallel.grid import context_parallel
from llama_ds.parallel.trace import Trace
from llama_ds.training import machines, memory_state
from llama_ds.training.device_batches import MicroBatch, ids_and_labels, on_device, row_share, training_pair
from llama_ds.training.engines import build
from llama_ds.training.meter import Meter, peak_memory
from llama_ds.training.out_of_memory import MemoryExplainer
from llama_ds.training.reading import read_part
from llama_ds.training.reporter import Reporter
from llama_ds.training.self_test import check
from tests.cuda_sites import PACKAGE, sites
from tests.fake_cuda import DEVICE, MEMORY, NAME, FakeCuda, fake_cuda
from tests.fake_groups import fake_ranks

RUN_FILE = str(PACKAGE.parent / "ds_configs" / "quickstart.yaml")
SMALL = [
    *("model.vocab_size=64", "model.hidden_size=32", "model.intermediate_size=88", "model.num_attention_heads=4"),
    *("model.num_key_value_heads=2", "model.num_hidden_layers=2", "model.head_dim=8", "data.seq_len=16"),
    *("parallel.pp=1", "parallel.tp=1", "parallel.sequence_parallel=false", "parallel.micro_batch=2"),
]
ROWS, T = 2, 16
LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")

NOT_RUN = {
    "benchmarks/machine/rank.py:main": "a process of its own; what it does on CUDA follows from world.device",
    "train.py:take_part": "a rank of a job; one on CUDA tells the supervisor that it does not stay",
}


def small_run(*overrides: str) -> RunConfig:
    return load_run(RUN_FILE, [*SMALL, *overrides])


def layout_of(run: RunConfig) -> Layout:
    return resolve_layout(run, 1)


def is_on_device(*tensors: Tensor | None) -> bool:
    return all(tensor is not None and tensor.device == DEVICE for tensor in tensors)


def case_a_step_of_the_model(cuda: FakeCuda, folder: Path) -> None:
    """Forward, backward, fused loss, layers with saved and recomputed activations, packed rows or not."""
    for overrides in ([], ["data.document_mask=true"]):
        run = small_run(*overrides)
        context = layer_context(run, SingleRank(), "cuda", torch.bfloat16)
        with DEVICE:
            model = Llama(context, NextTokenLoss(context.tp), ["none", "full"]).to(DEVICE, torch.bfloat16)
        for layer in model.layers:
            if hasattr(layer, "lay_weights_together"):
                layer.lay_weights_together()
        ids = torch.zeros(ROWS, T, dtype=torch.int64, device=DEVICE)
        model(ids, ids).backward()
        assert is_on_device(*(weight.grad for weight in model.parameters()))
        assert all(weight.grad.dtype == torch.bfloat16 for weight in model.parameters() if weight.grad is not None)
    assert {"_flash_attention_forward", "_flash_attention_backward"} <= cuda.operators


def case_layers_by_graphs(cuda: FakeCuda, folder: Path) -> None:
    """Graphs are captured on a stream of their own and replayed, in order, on that of the step."""
    context = layer_context(small_run(), SingleRank(), "cuda", torch.bfloat16)
    layers = [ManualBackwardLayer(context, i, "selective").to(DEVICE, torch.bfloat16) for i in range(2)]
    graphed_layers.GraphedChunk(layers, context.weight_gradients, CudaGraphs())
    x = torch.zeros(ROWS, T, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def micro_batch() -> int:
        begin = len(cuda.log)
        (y := layers[1](layers[0](x))).backward(torch.zeros_like(y))
        assert is_on_device(x.grad, *(weight.grad for weight in layers[0].parameters()))
        return sum(line.startswith("graph of") for line in cuda.log[begin:])

    with mock.patch.object(graphed_layers, "_same", lambda *_: True):  # there are no values
        micro_batch()
        cuda.operators.clear()
        assert micro_batch() == 4 and "mm" not in cuda.operators, "a layer does nothing else"
    layers[0].weight_grads.of = lambda *_: [float(x.sum())]  # type: ignore[assignment,method-assign,list-item]
    with pytest.raises(UserError, match=r"layer 0 cannot be captured \(operation not permitted when .*\(backward\)"):
        graphed_layers.GraphedChunk(layers[:1], context.weight_gradients, CudaGraphs())
        with mock.patch.object(graphed_layers, "_same", lambda *_: True):
            (y := layers[0](x)).backward(torch.zeros_like(y))


def case_products_in_float8(cuda: FakeCuda, folder: Path) -> None:
    """The operator's own checks for CUDA: multiples of 16, the second factor by columns, the shapes of scales."""
    scaled: list[Any] = []
    multiply = torch._scaled_mm

    def recorded(*factors: Any, **options: Any) -> Tensor:
        scaled.append((factors[0].dtype, factors[1].dtype, factors[2].dim(), options["use_fast_accum"]))
        return multiply(*factors, **options)

    def products(*overrides: str, steps: int = 1) -> list[Any]:
        context = layer_context(
            small_run("model.intermediate_size=64", *overrides), SingleRank(), "cuda", torch.bfloat16
        )
        layer = ManualBackwardLayer(context, 0, "none").to(DEVICE, torch.bfloat16)
        layer.lay_weights_together()
        x = torch.zeros(ROWS, T, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(steps):
            scaled.clear()
            (y := layer(x)).backward(torch.zeros_like(y))
            context.products.end_step()
        assert is_on_device(x.grad, *(weight.grad for weight in layer.parameters()))
        return sorted(map(str, scaled))

    def called(rows: bool, gradients: int) -> list[str]:
        forward = (fp8.FORWARD, fp8.FORWARD, 2 * rows, True)
        return sorted(map(str, [forward] * 4 + [(fp8.GRADIENT, fp8.FORWARD, 2 * rows, False)] * gradients))

    with mock.patch.object(torch, "_scaled_mm", recorded):
        delayed = ("compute.fp8=delayed", "compute.fp8_weight_gradients=true")
        assert products("compute.fp8=current") == products(*delayed) == called(rows=True, gradients=4)
        assert products(*delayed, steps=2) == called(rows=False, gradients=8)
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: (8, 0)),
        mock.patch.object(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB"),
        pytest.raises(UserError, match=r"compute.fp8: NVIDIA A100-SXM4-80GB has compute capability 8.0, .* need 8.9"),
    ):
        products("compute.fp8=current")
    with pytest.raises(UserError, match=r"compute.fp8: products in float8 return bf16 on a GPU, .*bf16.enabled=true"):
        layer_context(small_run("compute.fp8=current", "model.intermediate_size=64"), SingleRank(), "cuda", torch.float)


def case_a_step_of_ranks_that_share_rows(cuda: FakeCuda, folder: Path) -> None:
    """From the copy of a rank's tokens to its gradients, by every method, with document masks and without."""
    for method, masked in ((RING, False), (RING, True), (ALL_TO_ALL, True), (HIERARCHICAL, False)):
        chosen = ["parallel.cp=4", f"parallel.cp_method={method}", f"data.document_mask={str(masked).lower()}"]
        run = small_run(*chosen, "model.num_hidden_layers=1")
        cuda.operators.clear()
        with fake_ranks(cuda, 4, rank=1):
            cp = context_parallel(resolve_layout(run, 4), cp_sizes(run)[0], Trace(DEVICE))
            context = layer_context(run, SingleRank(), "cuda", torch.bfloat16, cp=cp)
            with DEVICE:
                loss = NextTokenLoss(context.tp, cp=cp)
                model = Llama(context, loss, ["selective"]).to(DEVICE, torch.bfloat16)
            given = MicroBatch(np.zeros((ROWS, T + 1), np.int32), ROWS * T)
            for batch in on_device(iter([given]), DEVICE, row_share(context, T)):
                inputs, labels = training_pair(batch, DEVICE, loss, context)
                ids = inputs[0] if isinstance(inputs, tuple) else inputs
                assert is_on_device(ids, labels) and ids.shape == labels.shape == (ROWS, T // 4)
                model(inputs, labels).backward()
        assert is_on_device(*(weight.grad for weight in model.parameters()))
        assert {"_flash_attention_forward", "_flash_attention_backward"} <= cuda.operators


def case_gradients_added_in_float32(cuda: FakeCuda, folder: Path) -> None:
    from llama_ds.model.weight_gradients import add_product

    grad, x = (torch.zeros(6, width, device=DEVICE, dtype=torch.bfloat16) for width in (4, 5))
    add_product(torch.zeros(4, 5, device=DEVICE), grad, x)
    assert "addmm" in cuda.operators


def case_attention_without_flash_kernels(cuda: FakeCuda, folder: Path) -> None:
    q = torch.zeros(ROWS, T, 4, 8, device=DEVICE)
    documents = CausalAttention("sdpa").documents(torch.zeros(ROWS, T, dtype=torch.int32, device=DEVICE))
    out, statistics = (kernel := attention_kernel("sdpa")).forward(q, q, q, documents)
    assert is_on_device(*kernel.backward(q, q, q, q, out, statistics, documents))
    assert block_kernel("sdpa", q, causal=False) is None
    assert block_kernel("sdpa", q.bfloat16(), causal=False) is not None
    assert is_on_device(CausalAttention("sdpa")(q, q, q))
    assert "_scaled_dot_product_efficient_attention_backward" in cuda.operators


def case_the_choice_of_attention(cuda: FakeCuda, folder: Path) -> None:
    package = SimpleNamespace(__name__=attention.FLASH_4, flash_attn_func=None)
    with (
        mock.patch.object(attention.importlib.util, "find_spec", lambda name: object()),
        mock.patch.object(attention.importlib, "import_module", lambda name: package),
    ):
        assert attention.choose_backend("auto", "cuda", torch.bfloat16, 128) == "flash_attn"
    assert attention.choose_backend("auto", "cuda", torch.float32, 128) == "sdpa"


def case_a_cache_of_keys_and_values(cuda: FakeCuda, folder: Path) -> None:
    context = layer_context(small_run(), SingleRank(), "cuda", torch.bfloat16)
    cache, layer = KeyValueCache(ROWS, T), torch.nn.Identity()
    for tokens, counts in ((4, [4, 3]), (1, [1, 1]), (1, [1, 1])):
        cache.begin(tokens, context.rotary, DEVICE, torch.bfloat16)
        assert not cache.single_on_cpu
        q = torch.zeros(ROWS, tokens, 4, 8, device=DEVICE, dtype=torch.bfloat16)
        k = torch.zeros(ROWS, tokens, 2, 8, device=DEVICE, dtype=torch.bfloat16)
        assert cache.attend(layer, q, k, k, "sdpa").shape == q.shape
        cache.end(counts)


def case_a_model_in_python(cuda: FakeCuda, folder: Path) -> None:
    model = build_model(small_run(), device=DEVICE, dtype=torch.bfloat16)
    assert is_on_device(*model.parameters())
    backend = scoring.ModelBackend(model, ROWS)
    assert backend.shape.few_lengths
    with (
        mock.patch.object(one_process, "load_model", lambda files, device, dtype: model),
        mock.patch.object(one_process, "Scorer", lambda backend, tokenizer: backend),
    ):
        assert one_process._scorer(None, None, "bf16", ROWS).model is model  # type: ignore[arg-type,attr-defined]


def case_batches(cuda: FakeCuda, folder: Path) -> None:
    rows = np.zeros((ROWS, T + 1), np.int32)
    for batch in on_device(iter([MicroBatch(rows, 1.0)] * 2), DEVICE):
        ids, labels = ids_and_labels(batch, DEVICE)
        assert is_on_device(ids, labels) and ids.dtype == torch.int64 and ids.shape == labels.shape == (ROWS, T)


def case_a_snapshot(cuda: FakeCuda, folder: Path) -> None:
    memory, weight = HostMemory(), torch.zeros(4, 5, device=DEVICE)
    found = memory.take([("model", {"weight": weight})], [])
    assert found.ready is not None and found.files["model"]["weight"].device.type == "cpu"


def case_a_checkpoint_in_memory(cuda: FakeCuda, folder: Path) -> None:
    master = torch.zeros(5, device=DEVICE)
    fragment = SimpleNamespace(name="layers.1.weight", tensors={MASTER: master}, start=0, numel=5)
    payload = memoryview(bytearray(2 * memory_state.ALIGNED))
    with (
        mock.patch.object(memory_state, "fragments", lambda engine: iter([fragment])),
        mock.patch.object(memory_state, "step_counter", lambda engine: torch.zeros((), device=DEVICE)),
        mock.patch.object(memory_state, "_placed", lambda engine, payload: iter([(master, torch.zeros(5))])),
    ):
        about, ready = memory_state.write(SimpleNamespace(), payload)
    assert about["dtypes"] == ["float32"] and ready.seen == cuda.current.seen, "the event comes after the copies"


def case_reading_of_weights(cuda: FakeCuda, folder: Path) -> None:
    read: list[int] = []
    source: Any = SimpleNamespace(read=lambda buffer, rank, size, start: read.append(len(buffer)))
    read_part(source, torch.zeros(7, device=DEVICE), 0, 1, 0)
    assert read == [7]


def case_what_a_run_says_of_its_device(cuda: FakeCuda, folder: Path) -> None:
    run = small_run()
    layout, feed = layout_of(run), SimpleNamespace(wait_s=0.0, balance=None)
    meter = Meter(run, layout, feed, "bf16", DEVICE, 0)  # type: ignore[arg-type]
    assert meter.peak == pytest.approx(989.4e12, rel=1e-3) and peak_memory(DEVICE) == 3 << 20
    assert machines.machine_of(layout, DEVICE, ["a"], str(folder))["device"] == NAME
    small: Any = SimpleNamespace(run=run, dtype="bf16", marks=SimpleNamespace(begin=1))
    assert check._record(small, layout, DEVICE)["device"] == NAME
    assert world.device_memory(DEVICE) == world.device_size(DEVICE) == MEMORY
    assert world.computes_bf16(DEVICE) and world.device() == DEVICE
    deepspeed_check.check_device("ds.json", {"zero_optimization": {"zero_quantized_weights": True}}, "cuda")


def case_results_are_read_a_step_later(cuda: FakeCuda, folder: Path) -> None:
    run, read = small_run("logging.interval=1"), []

    def loss_of(result: Any) -> tuple[float, float]:
        read.append(result)
        return 1.0, 1.0

    engine: Any = SimpleNamespace(read=loss_of, deepspeed=None)
    feed: Any = SimpleNamespace(wait_s=0.0, balance=None)
    meter = Meter(run, layout_of(run), feed, "bf16", DEVICE, 0)
    progress: Any = SimpleNamespace(tell=lambda **_: None)
    reporter = Reporter(run, engine, meter, None, progress, DEVICE)
    for step in (1, 2, 3):
        reporter.step_done(step, 1e-3, step, last=step == 3)  # type: ignore[arg-type]
        assert read == [[], [1], [1, 2, 3]][step - 1]


def case_results_on_a_stream_of_their_own(cuda: FakeCuda, folder: Path) -> None:
    loss = torch.zeros((), device=DEVICE)
    ready = issued(DEVICE)
    loss_after = loss + 1
    with reading(DEVICE, ready):
        assert cuda.current.name != "main" and float(loss) == 1.0
    assert cuda.current.name == "main" and cuda.host["main"] < cuda.current.seen["main"] and is_on_device(loss_after)


def case_joining(cuda: FakeCuda, folder: Path) -> None:
    asked: dict[str, Any] = {}
    store = dist.HashStore()
    with (
        mock.patch.object(world, "open_store", lambda *_: store),
        mock.patch.object(world, "find_first_rank", lambda *_: None),
        mock.patch.object(dist, "init_process_group", lambda backend, **options: asked.update(options, name=backend)),
        mock.patch.dict("os.environ"),
    ):
        cuda.devices = 8
        world.join(world.RankInfo(3, 8, 3))
        assert asked["name"] == "nccl" and asked["rank"] == 3 and cuda.log[-1] == "device 3"
        with pytest.raises(UserError, match=r"rank 8 of \S+ has no GPU, because there are 8, .* LLAMA_DS_BACKEND=gloo"):
            world.join(world.RankInfo(8, 9, 8))
        cuda.devices = 1  # each process sees its own; that of rank 2 is another rank's
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = "2"
        with pytest.raises(UserError, match=r"several ranks of \S+ have the same GPU \(UUID fake\), .*=gloo"):
            for rank in (1, 2):
                world.join(world.RankInfo(rank, 3, rank))
        assert cuda.log[-1] == "device 0" and {os.environ[name] for name in LOCAL_RANKS} == {"0"}
        os.environ.update(LLAMA_DS_BACKEND="gloo", LOCAL_WORLD_SIZE="3")  # they share it
        for rank in (1, 2):
            world.join(world.RankInfo(rank, 3, rank))
        assert asked["name"] == "gloo" and cuda.log[-1] == "device 0" and world.device_memory(DEVICE) == MEMORY // 3


def case_messages_of_ranks_that_share_a_device(cuda: FakeCuda, folder: Path) -> None:
    """The fake gloo refuses tensors on the device; what is received is written on the stream that waits."""
    x, received = (torch.zeros(2, 3, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    with mock.patch.dict("os.environ", LLAMA_DS_BACKEND="gloo"), fake_ranks(cuda, 2):
        sent, *posted = messages.send(x, 1, None), messages.receive(received, 1, None)
        posted += messages.exchange([(received, 1)], [(x, 1)], None)
        cuda.operators.clear()
        with cuda.on(other := cuda.stream("other")):
            other.wait_stream(cuda.streams[0])
            for handle in (sent, *posted):
                handle.wait()
            received.add_(1)
        cuda.current.wait_stream(other)
        assert "copy_" in cuda.operators
        config = {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        stock = small_run("parallel.pp=2", "parallel.schedule=deepspeed")
        with (
            mock.patch.object(build.deepspeed, "init_distributed", lambda verbose: None),
            mock.patch.object(build, "check_values", lambda *_: None),
            pytest.raises(UserError, match=r"parallel.schedule = deepspeed: .* LLAMA_DS_BACKEND chooses gloo"),
        ):
            build.build_engine(stock, resolve_layout(stock, 2), config, DEVICE)


def case_an_engine_of_a_moment(cuda: FakeCuda, folder: Path) -> None:
    compiler = SimpleNamespace(reset=lambda: cuda.log.append("kernels forgotten"))
    with (
        mock.patch.dict(sys.modules, {"torch._dynamo": compiler}),
        mock.patch.object(torch, "_dynamo", compiler, create=True),
        temporary.engines_undone(),
    ):
        pass
    assert {"kernels forgotten", "cache emptied", "peak reset", "generator restored"} <= set(cuda.log)


def case_building_an_engine(cuda: FakeCuda, folder: Path) -> None:
    """Everything up to DeepSpeed, whose accelerator is chosen once in a process."""
    run, built = small_run(), []
    config = {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    with (
        fake_ranks(cuda, 1),
        mock.patch.object(build.deepspeed, "init_distributed", lambda verbose: None),
        mock.patch.object(build, "check_values", lambda *_: None),
        mock.patch.object(build, "build_single_stage", lambda *given: built.append(given)),
    ):
        build.build_engine(run, layout_of(run), config, DEVICE)
        build.build_engine(small_run("parallel.cuda_graphs=true"), layout_of(run), config, DEVICE)
    parts = built[0][3]
    assert parts.graphs is None and isinstance(built[1][3].graphs, CudaGraphs)
    assert parts.dtype == torch.bfloat16 and parts.context.attention.name == "sdpa" and parts.trace._cuda


def case_a_recording(cuda: FakeCuda, folder: Path) -> None:
    run = small_run(
        f"output_dir={folder}", "logging.trace_step=1", "logging.trace_steps=1", "logging.profile_ranks=[0]"
    )
    trace, profiled = Trace(DEVICE), SimpleNamespace(asked=[])
    profiled.start = profiled.stop = profiled.export_chrome_trace = lambda *_: None
    with mock.patch.object(recording, "profile", lambda activities, **_: profiled.asked.extend(activities) or profiled):
        kept = recording.Recording(run, layout_of(run), trace, world.RankInfo(0, 1, 0), "a", "bf16", DEVICE)
        for step in (1, 2):
            kept.before_step(step)
            begin = trace.now()
            trace.times.begin()
            trace.add("F", trace.mark(), 0, 0)
            watched = trace.watch("reduce", None, 8)
            trace.done("reduce", watched, 8)
            trace.times.end()
            trace.end_step(begin)
            kept.after_step()
    assert recording.ProfilerActivity.CUDA in profiled.asked
    written = json.loads((Path(run.run_dir) / "trace" / "rank00000.json").read_text())
    assert written["device"] == NAME and {"F", "reduce", "step"} <= {event[0] for event in written["events"]}


def case_times_of_steps(cuda: FakeCuda, folder: Path) -> None:
    times = Trace(DEVICE).times
    for _ in range(3):
        times.begin()
        times.add("wait data", times.now())
        times.end()
    assert len(times.take()) == 2


def case_machine_gemm(cuda: FakeCuda, folder: Path) -> None:
    request = {"dtype": None, "quick": True, "slots": 1, "run": RUN_FILE}
    computing = machine_rank.computing
    with (
        fake_ranks(cuda, 1),
        mock.patch.object(computing, "QUICK", computing.MeasuredSizes((32,), (32,), (32,), (64,), 64, 1 << 20)),
        mock.patch.object(computing, "PASSES", 1),
        mock.patch.object(computing, "range", lambda *bounds: range(*bounds)[:3], create=True),
    ):
        found = machine_rank.measure_computing(request, world.RankInfo(0, 1, 0), DEVICE)
    assert found["device"] == NAME and found["dtype"] == "bf16" and not found["host_computes"]


def case_memory_beside_the_plan(cuda: FakeCuda, folder: Path) -> None:
    """Of 6 MiB in use the allocator has 4, of which tensors had 3."""
    layouts.forget_memory(DEVICE)
    assert cuda.log == ["cache emptied", "peak reset"]
    plan: Any = SimpleNamespace(memory=[SimpleNamespace(total=9.0, margin=2.0), SimpleNamespace(total=8.0, margin=3.0)])
    found = memory_beside_plan(plan, layouts.measured_memory(DEVICE))
    mib = 1 << 20
    assert found == {"planned": 7.0, "planned_margin": 2.0, "measured": 3 * mib, "fragments": mib, "outside": 2 * mib,
                     "margin_share": 3 * mib / MEMORY}  # fmt: skip


def case_machine_comm(cuda: FakeCuda, folder: Path) -> None:
    request = {"max_bytes": None, "min_bytes": 64 << 20, "operations": None, "slots": 2, "seconds": 0.0}
    with fake_ranks(cuda, 2):
        found = machine_rank.measure_links(request, world.RankInfo(0, 2, 0), DEVICE)
    assert {one["operation"] for one in found["collectives"]} == set(machine_rank.OPERATIONS)
    assert found["collectives"][0]["sizes"] == [64 << 20, 256 << 20] and found["contention"]


def case_the_preflight(cuda: FakeCuda, folder: Path) -> None:
    group = {"name": "all", "master": "127.0.0.1", "port": 1, "first": 0, "size": 2}
    asked: list[str] = []
    with (
        fake_ranks(cuda, 2),
        mock.patch.object(dist, "init_process_group", lambda backend, **options: asked.append(backend)),
        mock.patch.object(dist, "destroy_process_group", lambda: None),
    ):
        found = burn.measure({"slot": 0, "burn_s": 0.0, "groups": [group]})
    assert asked == ["nccl"] and found["groups"]["all"] and found["tflops"] >= 0


def case_benchmarks_of_layers(cuda: FakeCuda, folder: Path) -> None:
    run = small_run("model.intermediate_size=64")
    found, _ = against_transformers.layers(run, "none", DEVICE, torch.bfloat16, fp8=True)
    x, grad = (torch.zeros(1, T, 32, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    assert "transformers_our_products" not in found
    for name in ("llama_ds_none", "llama_ds_fp8_delayed_all"):
        mine: LayerContestant = found[name]
        assert mine.peak_bytes(mine.step(x, grad), DEVICE) == 2 << 20
    timing = SimpleNamespace(median_s=1.0, seconds=[1.0])
    settings = {"batch": 1, "seq_len": T, "device": "cuda", "dtype": "bf16"}
    results = layer_results(run.model, settings, {"a": timing}, {"a": (1, 1)})  # type: ignore[dict-item]
    assert results["device"] == NAME and results["layers"]["a"]["mfu"] > 0


def case_a_lack_of_memory(cuda: FakeCuda, folder: Path) -> None:
    run, module = small_run(), torch.nn.Linear(4, 4, bias=False, device=DEVICE)
    memory = MemoryExplainer(run, layout_of(run), "bf16", 0, DEVICE)
    buffers = SimpleNamespace(bf16_groups_flat=[torch.zeros(256 << 10, device=DEVICE)])
    memory.built(SimpleNamespace(module=module, optimizer=buffers, param_names={}, device=DEVICE))
    text = memory.message("CUDA out of memory. Tried to allocate 1.00 MiB.")
    assert "could not allocate 1.00 MiB more after 3.00 MiB of the device's 80.00 GiB: weights 1.00 MiB" in text
    assert "activations and temporaries 2.00 MiB (planned" in text


CASES: list[Callable[[FakeCuda, Path], None]] = [
    function for name, function in list(globals().items()) if name.startswith("case_")
]
SITES = sites()
FILES = {str(PACKAGE / site.name.partition(":")[0]): site.name.partition(":")[0] for site in SITES}


@contextmanager
def lines_that_run(found: set[tuple[str, int]]) -> Iterator[None]:
    """Add the lines that run within this context, of files with places that depend on CUDA, to `found`."""

    def in_function(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            found.add((FILES[frame.f_code.co_filename], frame.f_lineno))
        return in_function

    def at_call(frame: FrameType, event: str, argument: Any) -> Any:
        return in_function if frame.f_code.co_filename in FILES else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        yield
    finally:
        sys.settrace(before)


@cache
def executed(case: Callable[[FakeCuda, Path], None]) -> frozenset[tuple[str, int]]:
    found: set[tuple[str, int]] = set()
    with TemporaryDirectory() as folder, fake_cuda() as cuda, lines_that_run(found):
        case(cuda, Path(folder))
    return frozenset(found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removeprefix("case_"))
def test_it_runs_on_cuda(case: Callable[[FakeCuda, Path], None]) -> None:
    executed(case)


def test_every_place_that_depends_on_cuda_runs() -> None:
    ran = frozenset[tuple[str, int]]().union(*map(executed, CASES))
    missed = {
        site.name: [line for line in site.lines if (site.name.partition(":")[0], line) not in ran] for site in SITES
    }
    assert {name for name, lines in missed.items() if lines} == NOT_RUN.keys(), missed
