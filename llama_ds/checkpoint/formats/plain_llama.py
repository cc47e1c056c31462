"""Refusal of models that a format of LLaMA alone cannot express."""

from __future__ import annotations

from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError

PLAIN = {"attention_bias": "none", "mlp_bias": False, "qk_norm": False}
PLAIN_ROPE = "llama3"  # the kind of rotary scaling that Meta's releases have


def check_plain(model: ModelConfig, source: str, program: str) -> None:
    """Check that a model has neither biases, nor norms of queries and keys, nor rotary scaling of another kind.

    Args:
        source: path of the model, for messages.
        program: name in messages of what reads the format: "Meta's code".

    Raises:
        UserError: it has.
    """
    for key, plain in PLAIN.items():
        value = getattr(model, key)
        if value != plain:
            raise UserError(
                f"{source}: model.{key} = {str(value).lower()}, {program} computes {str(plain).lower()} only; "
                "convert to hf or deepspeed"
            )
    if model.rope_scaling and model.rope_scaling.rope_type != PLAIN_ROPE:
        raise UserError(
            f"{source}: model.rope_scaling.rope_type = {model.rope_scaling.rope_type}, {program} computes {PLAIN_ROPE} "
            "only; convert to hf or deepspeed"
        )
