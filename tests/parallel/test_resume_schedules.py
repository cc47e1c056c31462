"""A checkpoint written under one schedule goes on under another that puts the layers on other ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.parallel.layout_cases import STEPS, Case, train_reference

ROOT = Path(__file__).resolve().parents[2]


def turns(dp: int, **shape: object) -> list[Case]:
    return [
        Case(2, 1, dp, **shape),  # type: ignore[arg-type]
        Case(2, 1, dp, schedule="interleaved", virtual_stages=2, **shape),  # type: ignore[arg-type]
        Case(2, 1, dp, schedule="zb_h1", partition=(3, 1), **shape),  # type: ignore[arg-type]
        Case(2, 1, dp, schedule="dualpipe_v", virtual_stages=2, **shape),  # type: ignore[arg-type]
        Case(2, 1, dp, schedule="1f1b", **shape),  # type: ignore[arg-type]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("cases", [turns(1, tied=True), turns(2)], ids=["dp1 tied", "dp2"])
def test_history_is_that_of_one_run(cases: list[Case], tmp_path: Path) -> None:
    """1e-5 relative: as in test_layouts.py, only the order of sums differs."""
    (tmp_path / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cases[0].world}"]
    command += [
        "-m",
        "tests.parallel.resume_worker",
        str(tmp_path / "cases.json"),
        str(tmp_path),
        str(tmp_path / "out"),
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    history, reference = json.loads((tmp_path / "out").read_text()), train_reference(cases[0].reference)
    assert len(history) == STEPS
    for step, (found, wanted) in enumerate(zip(history, reference, strict=True)):
        assert found == pytest.approx(wanted, rel=1e-5), f"step {step}"
    for turn in (1, len(cases) - 1):  # interleaved, and the last
        check_universal(tmp_path / f"turn{turn}", tmp_path / f"universal{turn}")


def check_universal(tag: Path, universal: Path) -> None:
    """DeepSpeed's converter takes the checkpoint, and finds in the optimizer files the weights of the layer files."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(tag)]
    command += ["--output_folder", str(universal), "--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run([*command, "--inject_missing_state"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    compared = 0
    for file in sorted(tag.glob("layer_*.pt")):
        layer = int(file.name.split("_")[1].split("-")[0])
        for name, weight in torch.load(file, weights_only=False).items():
            found = list(universal.glob(f"zero/{layer}.{name}/fp32.pt")) or list(
                universal.glob(f"zero/tied_modules.embed.{name}/fp32.pt")
            )
            assert len(found) == 1, f"layer {layer} {name}"
            master = torch.load(found[0], weights_only=False)["param"]
            assert torch.equal(master.view(weight.shape), weight), f"layer {layer} {name}"
            compared += 1
    assert compared > 30
