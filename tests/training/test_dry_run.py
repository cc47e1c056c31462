"""The dry run predicts the collectives and messages of real ranks, call by call, and their memory."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llama_ds.config.run_file import load_run
from llama_ds.config.text import dump_yaml
from llama_ds.layout.layout import resolve_layout
from llama_ds.layout.recompute import stage_policies
from llama_ds.perf.plan.memory import run_memory
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
RUN: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "output_dir": "runs",
    "deepspeed": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "model": {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "data": {
        "tokenizer": "none.model",
        "seq_len": 16,
        "sources": [{"name": "text", "path": "nowhere", "weight": 1.0}],
    },
    "training": {"global_batch": 16, "steps": 4},
    "optimizer": {"lr": 1e-3, "warmup_steps": 1},
    "parallel": {"micro_batch": 2},
}
# Layouts of 4 ranks on gloo that differ in their communication.
REAL = {
    "pp2_tp2": [
        *("parallel.pp=2", "parallel.tp=2", "parallel.sequence_parallel=true", "parallel.recompute=full"),
        *("model.vocab_size=127", "optimizer.name=muon", "parallel.tp_chunks=4"),  # padded, and with other states
    ],
    "pp2_dp2_split": [
        *("parallel.pp=2", "parallel.schedule=zb_h1", "parallel.joint_weight_gradients=2"),
        *("model.tie_word_embeddings=true", "optimizer.name=lion"),
        *("optimizer.state_dtype=bf16", "optimizer.masters=bf16_kahan"),
    ],
    "zero3": [
        *("parallel.tp=2", "deepspeed.zero_optimization.stage=3", "deepspeed.bf16.enabled=false"),
        *("model.attention_bias=qkvo", "model.mlp_bias=true", "model.qk_norm=true"),
    ],
}
# Half of the 7B model on 16 ranks, with few micro-batches.
SEVEN_B = [
    *("model.hidden_size=4096", "model.intermediate_size=11008", "model.num_attention_heads=32"),
    *("model.num_key_value_heads=32", "model.num_hidden_layers=16", "model.vocab_size=32000", "data.seq_len=2048"),
    *("parallel.pp=4", "parallel.tp=2", "parallel.sequence_parallel=true", "parallel.micro_batch=1"),
    *("training.global_batch=16", "parallel.joint_weight_gradients=2"),  # holds more for the weight gradients
]


def dryrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    return warm.run(ROOT / "tools" / "dryrun.py", *arguments, timeout_s=900)


def report(*arguments: object) -> dict[str, Any]:
    done = dryrun(*arguments, "--json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dry_run") / "tiny.yaml"
    path.write_text(dump_yaml(RUN))
    return path


@pytest.fixture(scope="module")
def real(run_file: Path) -> Path:
    """A folder with the records of four real ranks for every layout."""
    folder = run_file.parent / "real"
    cases = [json.dumps([name, overrides]) for name, overrides in REAL.items()]
    done = warm.run("-m", "tests.training.dry_run_worker", folder, run_file, *cases, ranks=4)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@cache
def predicted(name: str, run_file: Path, calls: Path) -> dict[str, Any]:
    """The dry run's report on all four ranks of a layout in REAL."""
    return report(run_file, *REAL[name], "--world", 4, "--rank", "0,1,2,3", "--backend", "gloo", "--calls", calls)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_every_call_and_all_memory_are_those_of_real_ranks(name: str, real: Path, run_file: Path) -> None:
    folder = real.parent / f"dry_{name}"
    found = predicted(name, run_file, folder)
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1, 2, 3]
    for rank in found["ranks"]:
        dry = json.loads((folder / f"rank{rank['rank']:05d}.json").read_text())
        recorded = json.loads((real / name / f"calls{rank['rank']}.json").read_text())
        for part in ("building", "step"):
            calls = [[kind, dry["groups"][group]["ranks"], peer, size] for kind, group, peer, size in dry[part]]
            assert calls == [[kind, ranks, peer, size] for kind, ranks, _, peer, size in recorded[part]]
        assert len(dry["step"]) > 10
        assert rank["matrices"] == recorded["matrices"] <= rank["planned_matrices"] + 8, "and a few flags"
        for category in ("weights", "gradients", "optimizer"):
            if name != "zero3":  # ZeRO-3 frees gradients and gathered weights within the step
                assert rank["memory"][category] == recorded["held"][category]


@pytest.mark.slow
def test_messages_and_reductions_are_those_that_the_trainer_traces(real: Path, run_file: Path) -> None:
    """The engine's own trace of a real step, which is independent of the ledger, counts the same bytes."""
    name = "pp2_dp2_split"
    found = predicted(name, run_file, real.parent / f"dry_{name}")
    for rank in found["ranks"]:
        events = json.loads((real / name / f"rank{rank['rank']:05d}.json").read_text())["events"]
        traced = {
            kind: sorted(size for what, *_, size in events if what in words)
            for kind, words in {
                "send": ("send activation", "send grad"),
                "all_to_all": ("reduce",),
                "all_gather": ("gather",),
            }.items()
        }
        for kind, sizes in traced.items():
            calls = [call for call in rank["calls"] if call["kind"] == kind]
            assert sorted(c["bytes"] for c in calls for _ in range(c["count"])) == sizes, (rank["rank"], kind)


@pytest.mark.slow
def test_memory_is_what_trainer_and_planner_say(run_file: Path) -> None:
    run = load_run(str(run_file), SEVEN_B)
    layout = resolve_layout(run, 16)
    planned = run_memory(run, layout, stage_policies(run, layout, 2), device_bytes=0)
    found = report(run_file, *SEVEN_B, "--world", 16, "--rank", "0,4,8,12", "--device-gib", 40)
    assert found["ok"]
    assert {rank["pp_rank"] for rank in found["ranks"]} == {0, 1, 2, 3}
    for rank in found["ranks"]:
        memory, plan = rank["memory"], planned[rank["pp_rank"]]
        for category in ("weights", "gradients", "optimizer", "activations"):
            # Of the last stage, the total is largest when some factors of weight gradients are gone.
            near = 0.05 if category == "activations" and rank["pp_rank"] == 3 else 0.01
            assert memory[category] == pytest.approx(rank["planned"][category], rel=near), category
            assert memory[category] == pytest.approx(getattr(plan, category), rel=near), category
        if rank["pp_rank"] < 3:  # on CUDA the head's backward holds its weight gradient twice; the plan counts it once
            assert memory["working"] <= 1.02 * plan.working
        assert rank["memory_total"] == pytest.approx(plan.total, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [("parallel.recompute=selective",), ("parallel.schedule=zb_v", "parallel.virtual_stages=2")],
    ids=["1f1b", "zb_v"],
)
def test_memory_of_graphs_is_what_the_planner_says(more: tuple[str, ...], run_file: Path) -> None:
    """Slots for the micro-batches in flight, temporaries of their own, and the check of a graph by the eager layer.

    The most is held during the check of one of the last graphs, and the plan counts the memory of all of them.
    """
    settings = [*SEVEN_B[:-6], *("parallel.pp=2", "parallel.cuda_graphs=true", "training.global_batch=8"), *more]
    settings += ["model.num_hidden_layers=8"]
    run = load_run(str(run_file), settings)
    layout = resolve_layout(run, 2)
    planned = run_memory(run, layout, stage_policies(run, layout, 2), device_bytes=0)
    for rank in report(run_file, *settings, "--world", 2, "--rank", "0,1")["ranks"]:
        memory, plan = rank["memory"], planned[rank["pp_rank"]]
        # 160 KB of 7 GB are small tensors that the plan does not count.
        assert 0.95 * plan.activations < memory["activations"] <= plan.activations + 1_000_000
        assert 0.4 * plan.working < memory["working"] <= plan.working
        assert rank["memory_total"] == pytest.approx(plan.total, rel=0.1)


@pytest.mark.parametrize("neighbours", [1, 2])
def test_layers_on_their_way_in_bf16_are_counted(neighbours: int, run_file: Path) -> None:
    """`recompute: auto` would fill their room with activations."""
    sizes = ("hidden_size=512", "intermediate_size=1408", "num_hidden_layers=8", "vocab_size=1024")
    found = report(
        run_file,
        *(f"model.{size}" for size in sizes),
        *("parallel.pp=2", "deepspeed.communication_data_type=bf16", f"parallel.gradient_neighbours={neighbours}"),
        *("--world", 8, "--rank", 0),
    )
    (rank,) = found["ranks"]
    assert 0.75 * rank["planned"]["working"] < rank["memory"]["working"] <= rank["planned"]["working"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--world", "8", "--rank", "none"], ["--rank none", "at least one rank", "use 0 to 7"]),
        (["--world", "8", "--rank", "8"], ["--rank 8", "8 ranks", "use 0 to 7"]),
        (["--world", "8", "--rank", "frist"], ["--rank 'frist'", "did you mean 'first'?"]),
        (["--world", "8", "--rank", ""], ["--rank ''", "first, middle, last"]),
        (["--world", "7", "parallel.pp=2"], ["world size 7", "start 4, 6 or 8 ranks"]),
        (["--world", "0"], ["--world: '0' is not a whole number from 1 to 1000000"]),
        (["--world", "8", "--jobs", "0"], ["--jobs: '0' is not a whole number from 1"]),
        (["--world", "8", "--device-gib", "nan"], ["--device-gib: 'nan' is not a finite number above 0"]),
        (["--world", "8", "--calls", __file__], ["--calls", "name another folder"]),
        (["--world", "8", "parallel.recompute=auto"], ["parallel.recompute = auto", "--device-gib 80"]),
        (["--world", "8", "parallel.pp=2", "parallel.schedule=deepspeed"], ["schedule = deepspeed", "use"]),
        (
            ["--world", "8", "deepspeed.zero_optimization.offload_optimizer.device=cpu"],
            ["offload_optimizer", "remove it"],
        ),
        (["--hostfile", "/nowhere/hosts"], ["/nowhere/hosts"]),
        (["--world", "8", "modell.x=1"], ["modell", "did you mean 'model'?"]),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], parts: list[str], run_file: Path) -> None:
    done = dryrun(run_file, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line


@pytest.mark.slow
def test_65b_on_2048_ranks() -> None:
    """With three layers a stage instead of ten, and an eighth of the micro-batches, as many as the pipeline holds."""
    smaller = ("training.global_batch=256", "model.num_hidden_layers=24")
    found = report(
        *("ds_configs/llama_65b.yaml", *smaller, "--hostfile", "hostfiles/256x8"),
        *("--rank", "all-distinct", "--device-gib", 80),
    )
    assert found["ok"] and len(found["checks"]) == 8
    assert len(found["ranks"]) == 24
    run = load_run(str(ROOT / "ds_configs/llama_65b.yaml"), smaller)
    layout = resolve_layout(run, 2048)
    planned = run_memory(run, layout, stage_policies(run, layout, 2), device_bytes=0)
    for rank in found["ranks"]:
        # Of so few layers, the temporaries of one are a large part, and the plan counts more than it has.
        assert 0.95 < rank["memory_total"] / planned[rank["pp_rank"]].total < 1.01
        assert rank["micro_batches"] == (8 if rank["pp_rank"] in (0, 7) else 0)
    assert max(rank["host_bytes"] for rank in found["ranks"]) < 1e9  # for each of two concurrent processes
