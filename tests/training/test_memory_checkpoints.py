"""A state in memory is resumed from only if it is whole, finite, newer than the disk's, and of this very run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from llama_ds.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from llama_ds.errors import Corruption, UserError
from llama_ds.job.memory_slots import MemorySlot, whole_slots
from llama_ds.layout.layout import resolve_layout
from llama_ds.layout.weights import weight_shapes
from llama_ds.parallel import world
from llama_ds.parallel.world import RankInfo
from llama_ds.training.checkpoints import Checkpoints
from llama_ds.training.memory_checkpoints import MemoryCheckpoints

MODEL = ModelConfig(6, 4, 6, 1, 2, 2, 2)
DATA: dict[str, Any] = {"segments": []}


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    (tmp_path / "r").mkdir()
    (tmp_path / "memory").mkdir()
    data, saves = DataConfig("any", 8, (SourceConfig("any", "any", 1.0),)), CheckpointConfig()
    saves = replace(saves, memory_interval=2, memory_folder=str(tmp_path / "memory"))
    training = TrainingConfig(4, 100, 3200)
    rest = (OptimizerConfig(1e-3), ParallelConfig())
    return RunConfig("r", 0, str(tmp_path), MODEL, data, training, *rest, checkpoint=saves)


class Engine:
    """What checkpoints in memory use of DeepSpeed's engine: fp32 weights that are their own masters."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        names = {f"{layer}.{name}": shape for (layer, name), shape in weight_shapes(MODEL).items()}
        self.param_names = {torch.nn.Parameter(torch.randn(shape)): name for name, shape in names.items()}
        self.optimizer = torch.optim.AdamW(self.param_names, 1e-3)
        self.global_steps = self.global_samples = self.skipped_steps = 0

    def train_batch_size(self) -> int:
        return 4

    def step(self) -> None:
        for parameter in self.param_names:
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    @property
    def state(self) -> list[torch.Tensor]:
        kinds = ("exp_avg", "exp_avg_sq", "step")
        return [t.clone() for p in self.param_names for t in (p.detach(), *(self.optimizer.state[p][k] for k in kinds))]


def started(run: RunConfig) -> MemoryCheckpoints:
    checkpoints = Checkpoints(run, resolve_layout(run, 1), "fp32", RankInfo(0, 1, 0))
    return MemoryCheckpoints(run, checkpoints, ["node1"], torch.device("cpu"))


def trained(run: RunConfig, steps: int = 4) -> Engine:
    """Train some steps with checkpoints in memory, and end without freeing them."""
    memory, engine = started(run), Engine(0)
    assert memory.find(0) is None
    memory.begin(engine, 0)
    for done in range(1, steps + 1):
        engine.step()
        memory.after_step(engine, done, lambda: DATA)
    memory.close(ended=False)
    return engine


def newest(run: RunConfig) -> MemorySlot:
    folder = next(Path(run.checkpoint.memory_folder).iterdir()) / "node1"
    return max((slot for _, slot in whole_slots(folder)), key=lambda slot: slot.step)


def test_state_and_counts_come_back_to_the_bit(run: RunConfig) -> None:
    engine = trained(run)
    memory, other = started(run), Engine(1)
    found = memory.find(disk_step=2)
    assert found and (found.step, found.optimizer_steps, found.data, found.tokens) == (4, 4, DATA, 4 * 4 * 8)
    assert memory.load(other) == 4
    assert all(map(torch.equal, other.state, engine.state))
    assert (other.global_steps, other.global_samples, other.skipped_steps) == (4, 16, 0)
    memory.begin(other, 4)
    memory.close(ended=True)
    assert not list(Path(run.checkpoint.memory_folder).iterdir())


def spoil(slot: MemorySlot) -> None:
    slot.payload[100] ^= 1


def make_infinite(slot: MemorySlot) -> None:
    torch.frombuffer(slot.payload, dtype=torch.float32, count=1, offset=64 + 4 * 3).fill_(float("inf"))
    header = slot.header
    assert header
    slot.complete(header | {"checksum": slot.checksum()})


@pytest.mark.parametrize(("damage", "why"), [(spoil, "checksum"), (make_infinite, "weights that are not finite")])
def test_a_bad_state_is_refused_and_the_one_before_it_used(
    run: RunConfig, damage: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    trained(run)
    damage(newest(run))
    with caplog.at_level(logging.WARNING):
        found = started(run).find(disk_step=0)
    assert found and found.step == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("MEMORY CHECKPOINT: the state of rank 0 after step 4 on node1 is not used") and why in line
    assert started(run).find(disk_step=2) is None


def test_memory_that_is_reserved_already_is_not_needed_again(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a start that was killed before its first state, or while it wrote one."""
    memory = started(run)
    memory.begin(Engine(0), 0)
    memory.close(ended=False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    started(run).begin(Engine(0), 0)


def test_before_the_first_finite_step_there_is_no_state(run: RunConfig) -> None:
    memory = started(run)
    memory.begin(Engine(0), 0)
    memory.after_step(Engine(0), 2, lambda: DATA)  # DeepSpeed has skipped both steps
    memory.close(ended=False)
    assert started(run).find(0) is None


def test_states_of_two_histories_are_not_mixed(run: RunConfig) -> None:
    """A host returns with a step that the others have trained again since, from the disk."""
    trained(run)
    memory, folder = started(run), newest(run).path.parent
    other = MemorySlot(folder / "rank_00001.a", 64)
    header = newest(run).header
    assert header
    other.complete(header | {"history": "another", "checksum": other.checksum()})
    memory._hosts = ["node1", "node1"]
    copies = set(memory._listed({(0, 4): newest(run), (1, 4): other}))
    assert len(copies) == 2 and memory._chosen(copies, 4) is None


def test_only_a_state_of_this_very_run_is_used(run: RunConfig, tmp_path: Path) -> None:
    trained(run)
    assert started(run).find(0)
    assert started(run).find(4) is None  # the disk has the same step
    assert started(replace(run, seed=1)).find(0) is None
    assert started(replace(run, checkpoint=replace(run.checkpoint, rewind_to=3))).find(0) is None
    (tmp_path / "r" / "memory.id").unlink()  # the run's folder was deleted, and a new run has its name
    assert started(run).find(0) is None


def test_states_are_forgotten_when_a_start_resumes_from_the_disk(run: RunConfig) -> None:
    """Also those of a host that is away then: the run would jump ahead of the steps that it has taken again."""
    trained(run)
    away = {path: path.read_bytes() for path in newest(run).path.parent.glob("rank_*")}
    memory = started(run)
    memory.begin(Engine(0), 2)  # resumed from the disk's step 2
    memory.close(ended=False)
    assert started(run).find(0) is None
    for path, content in away.items():
        path.write_bytes(content)
    assert newest(run).step == 4
    assert started(run).find(0) is None


def test_states_since_the_last_comparison_are_forgotten_when_replicas_differ(run: RunConfig) -> None:
    """They may hold the wrong weights; the one before is used, and without any comparison a save on disk."""
    trained(run)
    for good_step, found in ((3, 2), (-1, None)):
        memory = started(run)
        assert memory.find(0)
        memory.begin(Engine(0), 4)
        with pytest.raises(Corruption), memory.trusted():
            raise Corruption("the weights of rank 1 differ", [1], good_step)
        state = started(run).find(0)
        assert (state and state.step) == found


def test_states_are_forgotten_also_if_a_rank_dies_meanwhile(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(run)
    memory = started(run)
    assert memory.find(0)
    memory.begin(Engine(0), 4)
    monkeypatch.setattr(world, "barrier", Mock(side_effect=RuntimeError("connection closed by peer")))
    with pytest.raises(RuntimeError), memory.trusted():
        raise Corruption("the weights of rank 1 differ", [1], 3)
    monkeypatch.undo()
    state = started(run).find(0)
    assert state and state.step == 2


def test_too_little_memory_is_said_before_the_first_step(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1024))
    with pytest.raises(UserError) as raised:
        started(run).begin(Engine(0), 0)
    assert "the states of rank 0 do not fit into" in str(raised.value)
    assert "on node1: 0.00 GiB are needed and 0.00 GiB free" in str(raised.value)


def test_memory_that_others_may_read_is_refused(run: RunConfig) -> None:
    trained(run)
    (folder,) = Path(run.checkpoint.memory_folder).iterdir()
    folder.chmod(0o755)
    with pytest.raises(UserError, match="others may write to it or read it"):
        started(run).begin(Engine(0), 0)


def test_without_an_interval_nothing_is_kept(run: RunConfig) -> None:
    trained(replace(run, checkpoint=replace(run.checkpoint, memory_interval=0)))
    assert not list(Path(run.checkpoint.memory_folder).iterdir())
