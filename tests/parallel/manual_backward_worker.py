"""One of four ranks that compare the hand-written backward with autograd under tensor parallelism, as JSON."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llama_ds.config.recompute import POLICIES
from llama_ds.config.schema import ModelConfig
from llama_ds.model.attention import CausalAttention
from llama_ds.model.decoder import DecoderLayer, LayerContext
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.model.rope import RotaryTables
from llama_ds.model.tensor_parallel import Pending, TensorParallel
from llama_ds.parallel import world
from llama_ds.parallel.tensor_parallel import GroupTensorParallel
from tests.model.test_manual_backward import saved_by_hooks

ROWS, T = 2, 16
PLAIN = ModelConfig(64, 32, 88, 2, 8, 8, 4)
STARTS = torch.tensor([0] * 5 + [5] * 11, dtype=torch.int32).expand(ROWS, T)


@dataclass(frozen=True)
class Case:
    """One comparison; `groups` are key-value heads."""

    tp: int
    sequence_parallel: bool
    masked: bool
    groups: int
    policy: str
    chunks: int = 1
    deferred: bool = False  # weight gradients


# Masks and heads are independent of each other and of the chunks.
CASES = [
    *(
        Case(tp, sequence, False, 4, policy)
        for tp, sequence, policy in itertools.product((2, 4), (False, True), POLICIES)
    ),
    *(Case(2, sequence, False, 8, policy) for sequence, policy in itertools.product((False, True), POLICIES)),
    *(Case(tp, tp == 4, True, 4, policy) for tp, policy in itertools.product((2, 4), POLICIES)),
    *(
        Case(2, sequence, False, 4, policy, 4, deferred)
        for sequence, policy, deferred in itertools.product((False, True), POLICIES, (False, True))
    ),
]


class Recording(GroupTensorParallel):
    """A communicator that records when each collective is issued and waited for."""

    events: list[str]

    def _recorded(self, name: str, pending: Pending) -> Pending:
        number = sum(event.startswith("issue") for event in self.events)
        self.events.append(f"issue {number} {name}")

        def wait() -> Tensor:
            self.events.append(f"wait {number} {name}")
            return pending()

        return wait

    def _issue_gather(self, x: Tensor, out: Tensor) -> Pending:
        return self._recorded("gather", super()._issue_gather(x, out))

    def _issue_scatter_sum(self, x: Tensor, out: Tensor) -> Pending:
        return self._recorded("reduce", super()._issue_scatter_sum(x, out))

    def _issue_sum(self, x: Tensor) -> Pending:
        return self._recorded("norm" if x.dim() == 1 else "reduce", super()._issue_sum(x))


class Products(TorchDispatchMode):
    """Records each matrix product among the events."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.events.append("product")
        return func(*args, **(kwargs or {}))


def build(case: Case, tp: TensorParallel) -> LayerContext:
    model = replace(PLAIN, num_key_value_heads=case.groups)
    return LayerContext(model, 7, tp, CausalAttention("sdpa"), RotaryTables(model, T), initializer_range=0.2)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def own_tokens(x: Tensor, tp: TensorParallel) -> Tensor:
    """Return this rank's part of a replicated (B, T, D)."""
    if not tp.sequence_parallel:
        return x
    rows, tokens, width = x.shape
    chunks = x.flatten(0, 1).chunk(tp.chunks_of(rows * tokens // tp.size))
    return torch.cat([chunk.chunk(tp.size)[tp.rank] for chunk in chunks]).view(rows, -1, width)


def run(layer: nn.Module, x: Tensor, grad: Tensor, masked: bool) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer((x, STARTS))[0] if masked else layer(x)
    y.backward(grad)
    if isinstance(layer, ManualBackwardLayer) and layer.weight_grads.deferred:
        layer.run_deferred_wgrad()
    found = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return {name: value.clone() for name, value in found.items() if value is not None}


def compare(case: Case, tp: TensorParallel) -> dict[str, Any]:
    """Return the largest difference from autograd, relative to each gradient's size, and from finite differences."""
    context = build(case, tp)
    context.weight_gradients.deferred = case.deferred
    reference, layer = (
        DecoderLayer(context, 0).double(),
        ManualBackwardLayer(context, 0, case.policy, first=True).double(),
    )
    with torch.no_grad():
        for seed, norm in enumerate((reference.input_layernorm, reference.post_attention_layernorm)):
            norm.weight.add_(random(seed, 32) * 0.1)
    layer.load_state_dict(reference.state_dict())
    x, grad = (own_tokens(random(seed, ROWS, T, 32), tp) for seed in (3, 4))
    wanted, found = run(reference, x, grad, case.masked), run(layer, x, grad, case.masked)
    assert wanted.keys() == found.keys()
    worst = max(float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)
    return {"worst": worst, "slope": slope_error(layer, x, grad, found, case, tp)}


def slope_error(
    layer: nn.Module, x: Tensor, grad: Tensor, found: dict[str, Tensor], case: Case, tp: TensorParallel
) -> float:
    """Return the relative error of the derivative along a random direction, by central differences, over all ranks."""
    everything = {"x": x, **dict(layer.named_parameters())}
    directions = {}
    for number, (name, value) in enumerate(everything.items()):
        replicated = "norm" in name or (name == "x" and not tp.sequence_parallel)
        directions[name] = random(100 + number + (0 if replicated else 50 * (1 + tp.rank)), *value.shape)
    own = sum(
        float((found[name] * directions[name]).sum())
        / (tp.size if "norm" in name or (name == "x" and not tp.sequence_parallel) else 1)
        for name in everything
    )

    @torch.no_grad()
    def loss(step: float) -> float:
        for name, p in layer.named_parameters():
            p.add_(directions[name], alpha=step)
        moved = x + step * directions["x"]
        y = layer((moved, STARTS))[0] if case.masked else layer(moved)
        for name, p in layer.named_parameters():
            p.sub_(directions[name], alpha=step)
        return float((y * grad).sum()) / (1 if tp.sequence_parallel else tp.size)

    step = 1e-6
    measured = (loss(step) - loss(-step)) / (2 * step)
    sums = torch.tensor([own, measured], dtype=torch.float64)
    dist.all_reduce(sums, group=tp.group)  # type: ignore[attr-defined]
    return abs(float(sums[0] / sums[1]) - 1)


def saved_bytes(case: Case, tp: TensorParallel) -> int:
    """Return what a layer in float32 keeps for its backward on this rank."""
    layer = ManualBackwardLayer(build(case, tp), 0, case.policy, first=True)
    return saved_by_hooks(layer, own_tokens(random(3, ROWS, T, 32), tp).float().requires_grad_())


def record(case: Case, group: dist.ProcessGroup) -> list[str]:
    """Return the events of two layers' forward and backward; "backward" separates them."""
    tp = Recording(group, case.sequence_parallel, chunks=case.chunks)
    tp.events = []
    context = build(case, tp)
    context.weight_gradients.deferred = case.deferred
    both = nn.Sequential(
        ManualBackwardLayer(context, 0, case.policy, first=True), ManualBackwardLayer(context, 1, case.policy)
    ).double()
    x, grad = (own_tokens(random(seed, ROWS, T, 32), tp) for seed in (3, 4))
    with Products(tp.events):
        y = both(x.requires_grad_())
        tp.events.append("backward")
        y.backward(grad)
    return tp.events


def gathered(result: dict[str, float]) -> dict[str, float]:
    """Return the worst over all ranks."""
    values = world.maximum(list(result.values()), torch.device("cpu"))
    return dict(zip(result, values, strict=True))


def main() -> None:
    rank_info = world.find_rank_info()
    world.join(rank_info)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group_of: dict[int, dist.ProcessGroup] = {2: pairs[rank_info.rank // 2], 4: dist.group.WORLD}  # type: ignore[dict-item]
    results: list[dict[str, Any]] = []
    for case in CASES:
        tp = GroupTensorParallel(group_of[case.tp], case.sequence_parallel, chunks=case.chunks)
        results.append({"case": asdict(case), **gathered(compare(case, tp))})
        if not case.masked:
            results[-1]["saved"] = saved_bytes(case, tp)
            results[-1]["events"] = record(case, group_of[case.tp])
    if rank_info.rank == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    with world.failing_together():
        main()
