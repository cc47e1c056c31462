"""Memory of a conversion does not grow with the model: a wide one is converted in less memory than its shards take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from written_ranks import MODEL

from llama_ds.checkpoint.formats.hf_config import hf_config
from llama_ds.checkpoint.formats.plan import OutputTensor, safetensors_header
from llama_ds.checkpoint.names import hf_name
from llama_ds.layout.weights import weight_shapes

ROOT = Path(__file__).resolve().parents[2]
WIDE = replace(
    MODEL, vocab_size=16000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, rope_scaling=None,
)  # fmt: skip
LAYER = 2 * (4 * 4096**2 + 3 * 4096 * 11008)  # bytes in bf16
LIMIT = 2 * LAYER + 10**9  # bytes: two decoder layers, and the libraries themselves
# The peak of the entire process; python, torch and other imports take 300 MB of it. It must be far below the model's
# 1.1 GB, because no tensor stays mapped or in memory.
MEASURED = 0.6e9
PROGRAM = """
import sys
from tools import convert
code = convert.main(sys.argv[1:])
# Not ru_maxrss: that includes the memory of pytest at the fork.
(line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(line.split()[1]) * 1024, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[Path]:
    """A Hugging Face folder of 1.1 GB in bf16: sparse files with some numbers at the beginning of every tensor."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(WIDE, 64, "bfloat16")))
    names = {hf_name(*key, WIDE.num_hidden_layers): shape for key, shape in weight_shapes(WIDE).items()}
    tensors = tuple(OutputTensor(name, shape, None) for name, shape in names.items())  # type: ignore[arg-type]
    header = safetensors_header(tensors, torch.bfloat16)
    position = len(header)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        for i, tensor in enumerate(tensors):
            some = torch.randn(4000, generator=torch.Generator().manual_seed(i)).bfloat16()
            file.seek(position)
            file.write(some.view(torch.uint8).numpy().tobytes())
            position += 2 * tensor.numel
        file.truncate(position)
    assert position > 1.05e9 > 2.5 * LAYER
    yield folder


def peak(source: Path, destination: Path, *words: str) -> int:
    """Convert in a separate process; return its peak memory in bytes."""
    command = [sys.executable, "-c", PROGRAM, str(source), str(destination), "--no-logits", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1])


@pytest.mark.slow
def test_memory_is_bounded(wide: Path, tmp_path: Path) -> None:
    """The chain copies, shards, merges, reorders heads and changes the dtype."""
    chain = (("deepspeed", "--tp", "2"), ("hf",), ("meta", "--tp", "2", "--dtype", "fp16"))
    source, peaks = wide, {}
    for i, (kind, *words) in enumerate(chain):
        result = tmp_path / str(i)
        peaks[kind, i] = peak(source, result, "--to", kind, *words, "--workers", "4")
        for file in source.iterdir():
            file.unlink()  # the files take a gigabyte per format
        source = result
    assert MEASURED < LIMIT
    assert max(peaks.values()) < MEASURED, peaks
    for file in source.iterdir():
        file.unlink()
