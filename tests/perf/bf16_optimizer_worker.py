"""Prints what DeepSpeed's pipeline moves for each weight in bf16, in bytes by operation, as JSON.

The first object is of a micro-batch's backward, the second of a step's end. Products are left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WIDTH, LAYERS = 48, 2
WEIGHTS = LAYERS * WIDTH**2
OVERWRITING = ("copy_", "zero_")


class Moved(TorchDispatchMode):
    """Bytes that operations on tensors as large as a weight read and write, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            name = func.overloadpacket.__name__
            read = args[1:] if name in OVERWRITING else args
            for tensor in tree_leaves((read, result)):
                if isinstance(tensor, Tensor) and tensor.numel() % WIDTH**2 == 0:
                    self.bytes[name] += tensor.numel() * tensor.element_size()
        return result


def step_bytes(micro_batches: int) -> Counter[str]:
    """Return what the second step of a pipeline of one stage moves, with gradients in fp32."""
    layers = [LayerSpec(nn.Linear, WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    module = PipelineModule(layers, num_stages=1, loss_fn=lambda found, wanted: (found - wanted).float().square().sum())
    config = {
        "train_batch_size": micro_batches,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": 1e-3,
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.SGD(module.parameters(), lr=1e-6), config=config
    )
    row = torch.ones(1, WIDTH, dtype=torch.bfloat16)

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield row, -row

    data = rows()
    engine.train_batch(data)
    with Moved() as moved:
        engine.train_batch(data)
    return moved.bytes


def main() -> None:
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # as in llama_ds/training/engines/build.py
    deepspeed.init_distributed("gloo", verbose=False)
    few, many = step_bytes(2), step_bytes(4)
    backward = {name: (many[name] - few[name]) / 2 / WEIGHTS for name in many if name != "mm"}
    end = {name: few[name] / WEIGHTS - 2 * backward[name] for name in backward}
    print(json.dumps([{name: size for name, size in found.items() if size} for found in (backward, end)]))


if __name__ == "__main__":
    main()
