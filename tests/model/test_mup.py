"""muP: nothing changes at the base's width, and each factor of wider models is that of its role.

`tests/parallel/test_layouts.py` compares training under every layout with plain torch, and
`tests/checkpoint/test_neighbours.py` the function with that of transformers after an export.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama_ds.config.schema import ModelConfig, MupConfig, OptimizerConfig
from llama_ds.errors import UserError
from llama_ds.layout.weights import Role, weight_of
from llama_ds.model.build import build_model
from llama_ds.training.engines.optimizer_groups import build_optimizer, decay_groups

BASE = ModelConfig(96, 32, 88, 2, 4, 2, 8, mup=MupConfig(32, 8), attention_bias="qkvo")
# Four times the width, and heads of four times the size.
WIDE = replace(BASE, hidden_size=128, intermediate_size=352, head_dim=32)
SETTINGS = OptimizerConfig(lr=1e-3, weight_decay=0.25, eps=1e-6)
MUON = replace(SETTINGS, name="muon", muon_lr=2e-3)
CONFIG: dict[str, Any] = {"bf16": {"enabled": False}}


def run_with(settings: OptimizerConfig) -> Any:
    """Return what an optimizer reads of a run."""
    return SimpleNamespace(optimizer=settings, seed=0)


def test_at_the_width_of_the_base_all_numbers_are_those_without_it() -> None:
    ids = torch.arange(2 * 17).view(2, 17) % 96
    found = []
    for model in (BASE, replace(BASE, mup=None)):
        built = build_model(model, 16, seed=3)
        optimizer = build_optimizer(decay_groups(built, SETTINGS, model), run_with(SETTINGS), CONFIG)
        for _ in range(2):
            optimizer.zero_grad()
            loss = built(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
        found.append([loss.detach(), *(p.detach() for p in built.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("settings", "rate"), [(SETTINGS, 1 / 4), (MUON, 1 / 2), (replace(MUON, muon_scale="jordan"), 1.0)]
)
def test_hidden_matrices_have_a_learning_rate_of_their_own(settings: OptimizerConfig, rate: float) -> None:
    """Their decay in a step, learning rate * weight_decay, is that of the base; Muon's own rate keeps its ratio."""
    module = build_model(WIDE, 16)
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = decay_groups(module, settings, WIDE)
    build_optimizer(groups, run_with(settings), CONFIG)
    for group in groups:
        roles = {weight_of(names[p]).role for p in group["params"]}
        hidden, own = Role.HIDDEN_MATRIX in roles, 2.0 if settings.name == "muon" else 1.0
        assert len(roles) == 1 or not hidden
        assert group["lr_factor"] == (rate * own if hidden else 1.0)
        decays = roles <= {Role.HIDDEN_MATRIX, Role.EMBEDDING, Role.HEAD}
        assert group["weight_decay"] == (0.25 / (rate if hidden else 1.0) if decays else 0.0)
        assert group["eps"] == 1e-6 / 4


def test_hidden_matrices_start_smaller_and_others_alike() -> None:
    plain = build_model(replace(WIDE, mup=None), 16).state_dict()
    for name, weight in build_model(WIDE, 16).state_dict().items():
        factor = 1 / 2 if weight_of(name).role is Role.HIDDEN_MATRIX else 1.0
        assert torch.equal(weight, plain[name] * factor), name


@pytest.mark.parametrize(
    ("mup", "said"),
    [
        (MupConfig(512 * 128), "model.mup.base_width = 65536 is the hidden_size of the model on which"),
        (MupConfig(32, 1 << 14), "not within a factor of 256 of model.head_dim = 32; use 1 to 8192"),
    ],
)
def test_a_base_far_from_the_model_is_refused(mup: MupConfig, said: str) -> None:
    with pytest.raises(UserError) as error:
        replace(WIDE, mup=mup)
    assert said in str(error.value)


def test_a_base_that_is_no_width_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.mup\.base_width = 0 is not positive"):
        MupConfig(0)
