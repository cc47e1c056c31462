"""`logging.check_finite` names the layer in which numbers go wrong, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llama_ds.errors import UserError
from llama_ds.training.nan_check import check_layers


def test_a_layer_that_is_given_nan_is_not_named() -> None:
    """A later pipeline stage would be named for what an earlier one computes."""
    layer = nn.Linear(4, 4)
    check_layers([(3, layer)], num_hidden_layers=4)
    layer(torch.full((2, 4), torch.nan))
    with torch.no_grad():
        layer.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="decoder layer 2 of 4 outputs 8 values that are NaN or infinite, from finite"):
        layer(torch.ones(2, 4))
