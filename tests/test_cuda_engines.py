"""check-plan, and with it whole engines of DeepSpeed and ours, on the fake CUDA device: a step of each is taken.

What the fake device cannot say: values (an overflow, a norm, which weights a backward reached), for which
`fake_engines.py` has answers; the kernels that torch.compile would make; NCCL itself. DeepSpeed's own pipeline cannot
run there: a stage receives the shape of its first message as values.
"""

from __future__ import annotations

import json
from functools import cache

import pytest

from llama_ds.job.devices import BACKEND
from tests import warm
from tests.test_cuda_branches import RUN_FILE, SMALL

FLASH = {"_flash_attention_forward", "_flash_attention_backward", "_fused_adamw_"}
FP8 = ("model.intermediate_size=64", "compute.fp8=delayed", "compute.fp8_weight_gradients=true")
ZB_V = (
    *("parallel.pp=2", "parallel.schedule=zb_v", "parallel.virtual_stages=2", "parallel.post_validation=true"),
    "model.num_hidden_layers=4",
)
MUON = ("deepspeed=zero1_bf16.json", "optimizer.name=muon")
GLOO = {BACKEND: "gloo"}  # ranks that share a device
# Ranks, overrides, and what a step calls beside `FLASH`.
LAYOUTS: dict[str, tuple[int, tuple[str, ...], set[str]]] = {
    "zero1": (1, ("deepspeed=zero1_bf16.json",), {"all_reduce"}),
    "graphs": (1, ("deepspeed=zero1_bf16.json", "parallel.cuda_graphs=true"), {"a graph"}),
    "zero2": (1, ("deepspeed=zero2_bf16.json",), set()),
    "zero3": (1, ("deepspeed=zero3_bf16.json",), {"all_gather"}),
    "float8": (1, ("deepspeed=zero1_bf16.json", *FP8), {"_scaled_mm"}),
    "pipeline": (
        *(2, ("parallel.pp=2", "parallel.schedule=zb_h1", "parallel.joint_weight_gradients=2", *MUON)),
        {"send", "receive"},
    ),
    "graphs in a pipeline": (2, (*ZB_V, "deepspeed=zero1_bf16.json", "parallel.cuda_graphs=true"), {"a graph", "send"}),
    "tensor parallel": (
        *(2, ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.tp_chunks=2", *MUON)),
        {"all_gather", "reduce_scatter", "all_to_all"},
    ),
    "ring": (2, ("parallel.cp=2", "parallel.cp_method=ring", "deepspeed=zero1_bf16.json"), {"send", "receive"}),
    "pipeline on one device": (2, (*ZB_V, "deepspeed=zero1_bf16.json"), {"send", "receive"}),
}


@cache
def steps_of(ranks: int) -> dict[str, list[set[str]]]:
    """Return what the steps of each layout of that many ranks have called on each rank."""
    names = [name for name, (size, *_) in LAYOUTS.items() if size == ranks]
    requests = [
        {"run": RUN_FILE, "rounds": 1, "steps": 1 + (name == "float8")}  # its second step has a history
        | {"environment": GLOO if name.endswith("one device") else {}}
        | {"layouts": [[*SMALL, "training.global_batch=4", "compute.self_test=off", *LAYOUTS[name][1]]]}
        for name in names
    ]
    done = warm.run("-m", "tests.fake_engines", json.dumps(requests), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == ranks * len(names), done.stdout
    each = [[set(line["called"]) for line in lines if line["rank"] == rank] for rank in range(ranks)]
    return {name: list(found) for name, found in zip(names, zip(*each, strict=True), strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_of_a_whole_engine_runs_on_cuda(name: str) -> None:
    ranks, _, more = LAYOUTS[name]
    for called in steps_of(ranks)[name]:
        assert called >= FLASH | more
