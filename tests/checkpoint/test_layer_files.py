"""What is converted to deepspeed is a checkpoint that DeepSpeed's own PipelineEngine loads, the tied table too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from written_ranks import SHAPES, Write

from tools import convert

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_deepspeed_loads_a_converted_checkpoint(write: Write, tmp_path: Path) -> None:
    pp, tp = 2, 2
    for kind, *words in (("hf",), ("deepspeed", "--pp", str(pp), "--tp", str(tp))):
        source = str(tmp_path / "hf") if kind == "deepspeed" else write(1, True, model=SHAPES["tied"])
        assert convert.main([source, str(tmp_path / kind), "--to", kind, "--no-logits", *words]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={pp * tp}"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT))
    worker = [str(Path(__file__).with_name("start_worker.py")), str(tmp_path / "deepspeed"), str(pp), str(tp)]
    done = subprocess.run([*command, *worker], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found = sum(int(file.read_text()) for file in tmp_path.glob("deepspeed.loaded-*"))
    # 27 weights of decoder layers and the final norm on every tp rank, and a table at each end.
    assert found == (27 + 1 + 2) * tp
