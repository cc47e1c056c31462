"""DeepSpeed's own PipelineEngine loads a checkpoint converted to deepspeed, including a tied embedding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from written_ranks import SHAPES, Write

from tests import warm
from tools import convert


@pytest.mark.slow
def test_deepspeed_loads_a_converted_checkpoint(write: Write, tmp_path: Path) -> None:
    pp, tp = 2, 2
    model = replace(SHAPES["tied"], vocab_size=801)  # its parts are padded
    for kind, *words in (("hf",), ("deepspeed", "--pp", str(pp), "--tp", str(tp))):
        source = str(tmp_path / "hf") if kind == "deepspeed" else write(1, True, model=model)
        assert convert.main([source, str(tmp_path / kind), "--to", kind, "--no-logits", *words]) == 0
    worker = Path(__file__).with_name("start_worker.py")
    done = warm.run(worker, tmp_path / "deepspeed", pp, tp, ranks=pp * tp)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found = sum(int(file.read_text()) for file in tmp_path.glob("deepspeed.loaded-*"))
    # On every tp rank: 27 weights of decoder layers, the final norm, and a vocabulary table on both end stages.
    assert found == (27 + 1 + 2) * tp
