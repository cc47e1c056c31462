"""`.ci/gpu`: order, limits, results and resumption, with steps that stand in for those that need a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tarfile
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.config.run_file import load_run
from llama_ds.launch.hostfile import parse_hostfile
from llama_ds.layout.layout import resolve_layout

REPO = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    """Return a script of .ci as a module."""
    loader = SourceFileLoader(f"ci_{name}", str(REPO / ".ci" / name))
    spec = spec_from_loader(loader.name, loader)
    assert spec
    module = module_from_spec(spec)
    sys.modules[loader.name] = module
    write, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # .ci is no package
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = write
    return module


@pytest.fixture(scope="module")
def kit() -> ModuleType:
    return script("gpu_kit")


def test_a_kit_in_parts_is_joined_and_a_damaged_part_is_named(kit: ModuleType, tmp_path: Path) -> None:
    content, parts, joined = tmp_path / "content", tmp_path / "parts", tmp_path / "joined"
    (content / "wheels").mkdir(parents=True)
    (content / "wheels" / "a.whl").write_bytes(os.urandom(3_000_000))
    (content / "data").write_text("tokens")
    kit.split(content, parts, 1_000_000)
    made = sorted(path for path in parts.iterdir() if path.suffix == ".part")
    assert len(made) == 4 and all(path.stat().st_size <= 1_000_000 for path in made)
    subprocess.run(["sh", parts / "unpack.sh", joined], check=True, stdout=subprocess.DEVNULL)
    for name in ("wheels/a.whl", "data"):
        assert (joined / name).read_bytes() == (content / name).read_bytes()
    made[1].write_bytes(made[1].read_bytes()[:-1] + b"?")
    again = subprocess.run(["sh", parts / "unpack.sh", tmp_path / "no"], capture_output=True, text=True)
    assert again.returncode and made[1].name in again.stdout and not (tmp_path / "no").exists()


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return script("gpu")


def result(out: Path, name: str) -> int:
    return json.loads((out / f"{name}.json").read_text())["exit_code"]


def test_a_failed_step_runs_again_after_those_that_were_not_reached(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each step notes that it ran; the second fails the first time, and the third needs its success."""
    ran, mended = tmp_path / "ran", tmp_path / "mended"

    def step(name: str, then: str = "true", after: str = "") -> object:
        return gpu.Step(name, "stub", 60.0, ("sh", "-c", f"echo {name} >> {ran}; echo says {name}; {then}"), after)

    steps = [step("one"), step("two", f"test -e {mended}"), step("three", after="two"), step("four")]
    assert not gpu.run_steps(steps, tmp_path, 300.0)
    assert ran.read_text().split() == ["one", "two", "four"]
    said = capsys.readouterr().out
    assert "== two: exit code 1 after" in said and "says four" in said
    assert "== three: left out, because two has not succeeded" in said and "not reached: three;" in said
    assert [result(tmp_path, name) for name in ("one", "two", "four")] == [0, 1, 0]

    mended.touch()
    assert gpu.run_steps(steps, tmp_path, 300.0)
    assert ran.read_text().split()[3:] == ["two", "three"]
    assert "== one: done before" in capsys.readouterr().out
    changed = [step("one", "echo otherwise"), *steps[1:]]
    assert gpu.run_steps(changed, tmp_path, 300.0)
    assert ran.read_text().split()[5:] == ["one"], "a command that has changed runs again"


def test_a_step_that_outlives_its_limit_ends_with_its_children_and_the_rest_runs(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = tmp_path / "child"
    endless = gpu.Step("endless", "stub", 1.0, ("sh", "-c", f"sleep 600 & echo $! > {child}; wait"))
    assert not gpu.run_steps([endless, gpu.Step("next", "stub", 60.0, ("true",))], tmp_path, 300.0)
    assert (result(tmp_path, "endless"), result(tmp_path, "next")) == (124, 0)
    assert not alive(int(child.read_text()))
    capsys.readouterr()


def test_a_step_ended_by_the_time_of_all_has_no_result_and_is_not_reached(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [gpu.Step(name, "stub", 500.0, ("sleep", "600")) for name in ("cut", "later")]
    gpu.SHORTEST_S, shortest = 0.5, gpu.SHORTEST_S
    try:
        assert gpu.run_steps(steps, tmp_path, 1.0), "nothing has failed"
    finally:
        gpu.SHORTEST_S = shortest
    assert not (tmp_path / "cut.json").exists()
    assert "not reached: cut, later;" in capsys.readouterr().out


def test_steps_are_named_once_and_come_after_what_they_need(gpu: ModuleType, tmp_path: Path) -> None:
    """The programs and run files of their commands exist, tools have their options, and runs their keys and layouts."""
    steps = gpu.steps("python", tmp_path, tmp_path)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for index, step in enumerate(steps):
        assert set(step.after.split()) <= set(names[:index])
        words = [
            word for word in step.command if word.endswith((".py", ".yaml")) and not word.startswith(str(tmp_path))
        ]
        assert all((REPO / word).exists() for word in words)
        check_options(list(step.command))


def test_a_rehearsal_has_the_same_steps_with_legal_commands(gpu: ModuleType, tmp_path: Path) -> None:
    """Its run file is made of the one that a GPU trains, and measurements of the machine have one rank."""
    shards = tmp_path / "data" / "shards" / "text"
    shards.mkdir(parents=True)
    (shards / "manifest.json").touch()
    place = gpu.Place("python", tmp_path, tmp_path / "data", True)
    gpu.prepare(place)
    assert parse_hostfile(str(tmp_path / gpu.ONE_RANK)) == {"localhost": 1}
    small, real = gpu.steps(*place), gpu.steps(*place._replace(rehearsal=False))
    for mine, other in zip(small, real, strict=True):
        assert mine._replace(command=(), limit_s=0.0) == other._replace(command=(), limit_s=0.0)
        check_options(list(mine.command))
        for step in (mine, other):
            assert "machine" not in step.group or step.command[step.command.index("--hostfile") + 1].endswith(
                gpu.ONE_RANK
            )
    assert load_run(place.run_file).model.hidden_size == gpu.REHEARSED["hidden_size"]


def test_results_travel_without_what_is_large_and_make_needed_steps_run_again(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On another machine a step whose product did not come along runs again, if one that has not run needs it."""
    here, there, ran = tmp_path / "here", tmp_path / "there", tmp_path / "ran"

    def steps(out: Path, then: str) -> list[object]:
        made = (
            f"echo $0 >> {ran}; mkdir -p {out}/runs/$0/big; echo '{{}}' > {out}/runs/$0/metrics.jsonl; touch {out}/$0"
        )
        return [
            gpu.Step(name, "stub", 60.0, ("sh", "-c", f"{made}; {end}", name), after, product)
            for name, after, product, end in (
                *(("first", "", "first", "true"), ("second", "first", "second", "true")),
                *(("other", "", "other", "true"), ("last", "second", "", then)),
            )
        ]

    here.mkdir(), there.mkdir()
    assert not gpu.run_steps(steps(here, "false"), here, 300.0)
    assert "last                   exit code   1" in (here / "summary.txt").read_text()
    with tarfile.open(here / "results.tar.gz") as tar:
        assert not {name for name in tar.getnames() if "big" in name} and "runs/last/metrics.jsonl" in tar.getnames()
        tar.extractall(there, filter="data")
    for path in there.glob("*.json"):  # the commands name the folder
        path.write_text(path.read_text().replace(str(here), str(there)).replace("false", "true"))
    ran.write_text("")
    assert gpu.run_steps(steps(there, "true"), there, 300.0)
    assert ran.read_text().split() == ["second", "last"], "first and other are done, and nobody needs them"
    capsys.readouterr()


def test_a_loss_is_compared_with_that_on_the_cpu(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, evaluate = tmp_path / "run", tmp_path / "python"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 60, "loss": 9.0}\n{"step": 60, "val_loss": 5.5}\n')
    for loss, code in ((5.501, 0), (5.53, 1)):
        evaluate.write_text(f'#!/bin/sh\ntest -z "$CUDA_VISIBLE_DEVICES" && echo \'{{"loss": {loss}, "step": 60}}\'\n')
        evaluate.chmod(0o755)
        assert gpu.main(["reference", str(evaluate), str(run), str(tmp_path / "hf")]) == code
        assert f"validation loss in step 60: 5.50000 in training, {loss:.5f} on the CPU" in capsys.readouterr().out


def test_all_steps_are_known_where_there_is_time_for_none(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.dict("os.environ"):
        assert gpu.main([str(tmp_path), "all", "--seconds", "0", "--data", str(tmp_path)]) == 0
    every = ", ".join(step.name for step in gpu.steps("python", tmp_path, tmp_path))
    assert f"not reached: {every}; the next call" in capsys.readouterr().out


def check_options(command: list[str]) -> None:
    """Check what the program of a command refuses before it starts."""
    program = next((i for i, word in enumerate(command) if word.startswith("tools/")), None)
    if program is not None:
        tool = importlib.import_module(command[program].removesuffix(".py").replace("/", "."))
        tool.parser().parse_args(command[program + 1 :])
    if "llama_ds/train.py" in command:
        run_file, *overrides = command[command.index("llama_ds/train.py") + 1 :]
        ranks = 2 if "torch.distributed.run" in command else 1
        run = load_run(run_file, overrides)
        deepspeed_config(run, resolve_layout(run, ranks), bf16_native=True)


def test_losses_of_runs_that_differ_are_named(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs log at steps of their own; lines without a loss are those of validations."""
    losses = {"whole": (9.5, 8.0), "same": (9.501,), "other": (9.5, 8.02), "broken": (float("nan"), 8.0)}
    for name, found in losses.items():
        lines = [{"step": 5 * (i + 1), "loss": loss} for i, loss in enumerate(found)] + [{"step": 5, "valid_loss": 1}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def compared(*names: str) -> int:
        return gpu.main(["losses", *(str(tmp_path / name) for name in ("whole", *names))])

    assert compared("same") == 0
    assert (
        compared("same", "other") == 1 and "other: loss 8.02000 in step 10, 8.00000 in whole" in capsys.readouterr().out
    )
    assert compared("broken", "same") == 1
    (tmp_path / "same" / "metrics.jsonl").write_text("")
    assert compared("same") == 1 and "no step that" in capsys.readouterr().out


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
