"""What DeepSpeed refuses is one line that names the user's file, before and while an engine starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
from deepspeed.utils import groups

from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.errors import UserError
from llama_ds.parallel.deepspeed_check import check_device, check_values, refusals
from tests import warm
from tests.parallel.layout_cases import Case

CHANGE = "; correct it, or take it out"
REFUSED = "ds.json: DeepSpeed refuses this configuration ({}); change the setting, or take it out"


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 1, **settings}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (zero(reduce_bucket_size=0), "zero_optimization.reduce_bucket_size = 0: Input should be greater than 0"),
        (
            zero(reduce_bucket_size=math.nan),
            "zero_optimization.reduce_bucket_size = nan: Input should be a finite number",
        ),
        (
            zero(allgather_bucket_size=5.5),
            "zero_optimization.allgather_bucket_size = 5.5: Input should be a valid integer, got a number with a "
            "fractional part",
        ),
        (
            zero(offload_optimizer={"devize": "cpu"}),
            "zero_optimization.offload_optimizer.devize = 'cpu': Extra inputs are not permitted",
        ),
        ({"compile": {"enabled": True}}, "compile.enabled = True: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_value_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_values("ds.json", given)
    assert str(error.value) == f"ds.json: {message}{CHANGE}"


def test_a_refusal_without_a_key_is_quoted() -> None:
    with pytest.raises(UserError) as error:
        check_values("ds.json", {**zero(), "bf16": {"enabled": True, "bf16_optimizer_states": True}})
    assert str(error.value) == REFUSED.format(
        "bf16_optimizer_states requires bf16_master_weights_and_grads to be enabled."
    )
    with pytest.raises(UserError, match="fp99"):
        check_values("ds.json", {"communication_data_type": "fp99"})


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_number_of_ranks_does_not_matter(zero_stage: int) -> None:
    case = Case(dp=4, zero=zero_stage)
    check_values("ds.json", deepspeed_config(case.run, case.layout, True))


def test_only_what_deepspeed_raises_is_a_refusal() -> None:
    with pytest.raises(UserError, match=r"^ds.json: DeepSpeed refuses"), refusals("ds.json"):
        groups._ensure_divisibility(3, 2)
    with pytest.raises(ValueError, match="a bug"), refusals("ds.json"):
        raise ValueError("a bug of this project")


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_quantization_needs_cuda(key: str) -> None:
    """DeepSpeed notices in the first step, where it ends every rank with a traceback."""
    check_device("ds.json", zero(**{key: True}), "cuda")
    check_device("ds.json", zero(**{key: False}), "cpu")
    with pytest.raises(UserError) as error:
        check_device("ds.json", zero(**{key: True}), "cpu")
    assert str(error.value) == f"ds.json: zero_optimization.{key}: DeepSpeed quantizes on CUDA only; take it out"


@pytest.mark.slow
def test_engines_that_do_not_start_end_a_run_with_one_line() -> None:
    """What only the engine itself notices; without a ZeRO section it trains."""
    done = warm.run("-m", "tests.training.refused_worker", ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert REFUSED.format("'float12' is not a valid DtypeEnum") in lines
    assert [line for line in lines if "gradient_predivide_factor != 1.0 is not yet supported with ZeRO-2" in line]
    assert lines[-1] == "trains"
