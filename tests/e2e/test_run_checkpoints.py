"""What happens to a run's checkpoints while it runs: signals, time limits, full disks, damage, retention."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launching import TIMEOUT_S, TRAIN, Process, alone, finish, forked, run, start, succeed, warm_deepspeed
from tiny_run import LAYOUTS, VOCAB_SIZE, Run

from llama_ds.checkpoint.load_model import open_model
from tools import convert

LONG = 120  # steps: enough for signals to arrive in the midst of them
PP2 = {"parallel.pp": 2}


def wait_for(process: Process, log: Path, happened: Callable[[], bool]) -> None:
    """Wait until a run meets a condition."""
    deadline = time.monotonic() + TIMEOUT_S
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.001)


def reported(run: Run, step: int) -> bool:
    path = run.dir / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


def ranks_of(process: Process) -> list[psutil.Process]:
    """Return the processes of a launcher's ranks, the first rank's first."""
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [p for p in children if TRAIN in p.cmdline() and "deepspeed" not in " ".join(p.cmdline()[:4])]
    return sorted(ranks, key=lambda p: int(p.environ()["RANK"]))


def interrupt(run: Run, number: int, at_step: int, whom: Callable[[Process], psutil.Process]) -> str:
    """Start the run, send a signal to one of its processes when a step is reported; return its output."""
    process = start(warm_deepspeed(2, TRAIN, run.file), run.log)
    wait_for(process, run.log, lambda: reported(run, at_step))
    whom(process).send_signal(number)
    return finish(process, run.log).output


@pytest.mark.slow
def test_signals_save_and_the_run_goes_on(make_run: Callable[..., Run]) -> None:
    """One rank receives the signal, all save the same step; no step of the run is lost or repeated."""
    changes = {**PP2, "model.num_hidden_layers": 2, "parallel.micro_batch": 4, "training.steps": LONG}
    whole, this = make_run("uninterrupted", changes), make_run("interrupted", changes)
    process = start(warm_deepspeed(2, TRAIN, this.file), this.log)
    wait_for(process, this.log, lambda: reported(this, 3))
    first_rank = ranks_of(process)[0]
    first_rank.suspend()  # it does not end meanwhile, and is not taken for dead
    second = run(forked(2, TRAIN, this.file), this.log.with_suffix(".second"))
    first_rank.resume()
    assert second.code == 2 and len(second.errors) == 1, second.output
    assert f"this run is in use by another job: process {first_rank.pid} of" in second.errors[0]
    ranks_of(process)[1].send_signal(signal.SIGUSR1)
    wait_for(process, this.log, lambda: (this.checkpoints / "latest").exists())
    saved = this.newest.name
    wait_for(process, this.log, lambda: reported(this, int(saved[5:]) + 3))  # it went on
    ranks_of(process)[1].send_signal(signal.SIGTERM)
    done = finish(process, this.log)
    assert done.code == 0, done.output
    first_end = int(this.newest.name[5:])
    assert f"ending at step {first_end} of {LONG}" in done.output
    assert int(saved[5:]) < first_end < LONG

    # As schedulers do: to the launcher, which passes it on to its ranks and then waits for them.
    interrupt(this, signal.SIGTERM, first_end + 2, lambda p: ranks_of(p)[0].parent())
    second_end = int(this.newest.name[5:])
    assert first_end < second_end < LONG
    assert not list(this.checkpoints.glob("attempt_*"))

    for one in (this, whole):
        succeed(forked(2, TRAIN, one.file, f"checkpoint.stop_at={second_end + 3}"), one.log)
    assert len(this.losses) == second_end + 3 and this.losses == whole.losses


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_or_refused(
    trained: Callable[[str], Run], make_run: Callable[..., Run]
) -> None:
    whole, this = trained("pp2"), make_run("damaged", {**PP2, "checkpoint.interval": 1, "checkpoint.stop_at": 5})
    this_run = forked(2, TRAIN, this.file, "checkpoint.keep_last=2", "checkpoint.keep_every=2")
    succeed(this_run, this.log)
    tags = sorted(path.name for path in this.checkpoints.glob("step_*"))
    assert tags == ["step_00000002", "step_00000004", "step_00000005"]  # 4 and 5 are the last, 2 is a second one's
    victim = sorted(this.newest.glob("zero_*optim_states.pt"))[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (this.checkpoints / "step_00000007.partial").mkdir()

    refused = run(forked(2, TRAIN, this.file, "--strict"), this.log)
    assert refused.code != 0
    (error,) = refused.errors
    assert victim.name in error and "checkpoint.strict" in error
    output = succeed(forked(2, TRAIN, this.file, "checkpoint.stop_at=0"), this.log)
    assert "DAMAGED CHECKPOINT" in output and victim.name in output
    assert "resumed at step 4 of 6" in output
    assert this.losses == whole.losses
    assert {path.name for path in this.checkpoints.iterdir()} >= {"step_00000005.damaged", "step_00000006"}
    assert not (this.checkpoints / "step_00000007.partial").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for two checkpoints of the tiny run, not three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_no_run(make_run: Callable[..., Run], small_disk: Path) -> None:
    """The run goes on without the checkpoint, warns, and saves again when there is room."""
    changes: dict[str, Any] = {
        "training.steps": LONG, "checkpoint.interval": 4, "checkpoint.keep_last": 1, "output_dir": str(small_disk),
    }  # fmt: skip
    this = make_run("full", changes)
    folder = small_disk / "full"
    room = Run(this.file, folder)
    process = start(alone(TRAIN, this.file), this.log)
    wait_for(process, this.log, lambda: (room.checkpoints / "latest").exists())
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(max(free - 100_000, 0)))
    wait_for(process, this.log, lambda: "CHECKPOINT LOST" in this.log.read_text())
    (small_disk / "filler").unlink()
    before = room.newest.name
    wait_for(process, this.log, lambda: room.newest.name > before)
    os.kill(process.pid, signal.SIGTERM)  # or it would only take longer
    done = finish(process, this.log)
    assert done.code == 0, done.output
    assert "No space left on device" in done.output
    assert f"ending at step {int(room.newest.name[5:])} of {LONG}" in done.output
    assert [path.name for path in room.checkpoints.glob("step_*")] == [room.newest.name]


@pytest.mark.slow
def test_a_run_whose_last_save_failed_says_so(make_run: Callable[..., Run], small_disk: Path) -> None:
    this = make_run("full_at_last", {"output_dir": str(small_disk)})
    succeed(alone(TRAIN, this.file, "checkpoint.stop_at=3"), this.log)
    room = Run(this.file, small_disk / "full_at_last")
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(max(free - 100_000, 0)))
    done = run(alone(TRAIN, this.file), this.log)
    assert done.code == 2
    (error,) = done.errors
    assert "step_00000006, could not be written" in error and "it resumes from step_00000003" in error
    assert [path.name for path in room.checkpoints.glob("step_*")] == ["step_00000003"]
    (small_disk / "filler").unlink()
    assert "resumed at step 3 of 6" in succeed(alone(TRAIN, this.file), this.log)
    assert len(room.losses) == 6


@pytest.mark.slow
def test_any_layout_goes_on_with_the_ordinary_command(
    trained: Callable[[str], Run], make_run: Callable[..., Run]
) -> None:
    """What changes is on the command line only. 1e-5 relative: as between layouts that train from the start."""
    whole, this = trained("alone"), make_run("moving", {"checkpoint.stop_at": 2})
    succeed(forked(4, TRAIN, this.file, *overrides(LAYOUTS["pp2_tp2"][1])), this.log)
    output = succeed(forked(2, TRAIN, this.file, *overrides(LAYOUTS["dp2_zero3"][1]), "checkpoint.stop_at=4"), this.log)
    assert "resumed at step 2 of 6" in output
    succeed(alone(TRAIN, this.file, "checkpoint.stop_at=0"), this.log)
    assert this.losses == pytest.approx(whole.losses, rel=1e-5)
    assert this.validation_loss == pytest.approx(whole.validation_loss, rel=1e-5)


def overrides(changes: dict[str, Any]) -> list[str]:
    return [f"{key}={str(value).lower()}" for key, value in changes.items()]


@pytest.mark.slow
def test_a_run_starts_from_weights_of_any_format(
    trained: Callable[[str], Run], make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """Continued pre-training: the first loss is that of the trained weights, in whatever format they come."""
    source = trained("alone")
    losses = {}
    for kind, ranks, layout in (("deepspeed", 1, {}), ("hf", 2, PP2), ("meta", 2, {"parallel.tp": 2})):
        folder = source.dir
        if kind != "deepspeed":
            folder = tmp_path / kind
            assert convert.main([str(source.dir), str(folder), "--to", kind]) == 0
        if kind == "hf":
            (folder / "chat_template.jinja").write_text("{{ messages }}")
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 5], "pad_token_id": 0}))
        this = make_run(f"from_{kind}", {**layout, "checkpoint.start_from": str(folder), "checkpoint.stop_at": 2})
        succeed(forked(ranks, TRAIN, this.file), this.log)
        losses[kind] = this.losses
        if kind == "hf":
            check_metadata(folder, this, tmp_path / "again")
    assert losses["hf"] == pytest.approx(losses["deepspeed"], rel=1e-5)
    assert losses["meta"] == pytest.approx(losses["deepspeed"], rel=1e-5)
    assert losses["deepspeed"][0] < source.losses[0] - 0.2  # six steps had lowered the loss


def check_metadata(folder: Path, run: Run, again: Path) -> None:
    """Chat template and token ids of the Hugging Face folder `folder` come out of the run that started from it."""
    assert convert.main([str(run.dir), str(again), "--to", "hf", "--no-logits"]) == 0
    assert (again / "chat_template.jinja").read_text() == "{{ messages }}"
    then, now = (json.loads((each / "config.json").read_text()) for each in (folder, again))
    assert {key for key in then if then[key] != now.get(key)} == set()
    assert (now["eos_token_id"], now["pad_token_id"]) == ([2, 5], 0)


@pytest.mark.slow
def test_a_run_starts_from_the_masters_of_a_checkpoint(make_run: Callable[..., Run]) -> None:
    """Not from their bf16 roundings; the table has more rows than the tokenizer has ids, as published ones do."""
    padded = {"model.vocab_size": VOCAB_SIZE + 64}
    first = make_run("masters", {**padded, "checkpoint.stop_at": 2, "deepspeed.bf16.enabled": True})
    succeed(alone(TRAIN, first.file), first.log)
    source = open_model(str(first.dir))
    assert source.masters and all(t.dtype == torch.bfloat16 for t in source.tensors.values())
    changes = {"checkpoint.start_from": str(first.dir), "checkpoint.stop_at": 1, "optimizer.lr": 1e-12}
    second = make_run("from_masters", {**padded, **changes})
    succeed(alone(TRAIN, second.file), second.log)
    for key, found in open_model(str(second.dir)).tensors.items():
        master = source.masters[key].whole()
        assert torch.equal(master.bfloat16(), source.tensors[key].whole())
        # One step of AdamW at this rate changes a weight by 1e-12; a bf16 rounding, by up to 4e-3.
        torch.testing.assert_close(found.whole(), master, atol=1e-11, rtol=0)
