"""The section of the run file about the scaling of rotary embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from llama_ds.config.declare import MOST_LENGTH, POSITIVE, Key, Section, declared
from llama_ds.config.section_rules import ROPE_KEYS, check_rope_scaling


@dataclass(frozen=True)
class RopeScaling(Section):
    """Scaling of the rotary frequencies for longer rows; names and kinds are those of HF's `rope_scaling`."""

    SECTION: ClassVar[str] = "model.rope_scaling"

    factor: Annotated[float, Key("Factor by which frequencies are divided.", rule="At least 1.", most=1e6)]
    low_freq_factor: Annotated[
        float | None,
        Key(
            "Wavelengths above `original_max_position_embeddings / low_freq_factor` are scaled in full.",
            rule="llama3 only, required. Positive and below `high_freq_factor`.",
            most=1e6,
        ),
    ] = None
    high_freq_factor: Annotated[
        float | None,
        Key(
            "Wavelengths below `original_max_position_embeddings / high_freq_factor` are not scaled.",
            rule="llama3 only, required.",
            most=1e6,
        ),
    ] = None
    original_max_position_embeddings: Annotated[
        int | None,
        Key(
            "Longest row before the scaling.", "tokens", POSITIVE, rule="Required except for linear.", most=MOST_LENGTH
        ),
    ] = None
    rope_type: Annotated[
        str,
        Key(
            "Which frequencies are scaled: those of long waves (Llama 3.1), all alike, a larger base for rows longer "
            "than the original ones, or those of slow rotations (YaRN, arXiv 2309.00071).",
            choices=tuple(ROPE_KEYS),
        ),
    ] = "llama3"
    attention_factor: Annotated[
        float | None,
        Key(
            "Factor of the rotated queries and keys; null: 0.1 log(factor) + 1, or the quotient of this with `mscale` "
            "and with `mscale_all_dim` before the logarithm.",
            sign=POSITIVE,
            rule="yarn only.",
            most=1e3,
        ),
    ] = None
    beta_fast: Annotated[
        float | None,
        Key(
            "Frequencies with more rotations in the longest original row are not scaled; null: 32.",
            sign=POSITIVE,
            rule="yarn only. Above `beta_slow`.",
            most=1e6,
        ),
    ] = None
    beta_slow: Annotated[
        float | None,
        Key(
            "Frequencies with fewer rotations are scaled in full; null: 1.", sign=POSITIVE, rule="yarn only.", most=1e6
        ),
    ] = None
    mscale: Annotated[float | None, Key("See `attention_factor`.", sign=POSITIVE, rule="yarn only.", most=1e3)] = None
    mscale_all_dim: Annotated[
        float | None, Key("See `attention_factor`.", sign=POSITIVE, rule="yarn only.", most=1e3)
    ] = None
    truncate: Annotated[
        bool | None,
        Key("Whether the scaled range is widened to entire frequencies; null: true.", rule="yarn only."),
    ] = None

    def check(self) -> None:
        check_rope_scaling(self)

    def parameters(self) -> dict[str, float]:
        """Return the keys that are set, without the kind."""
        found = {name: getattr(self, name) for name in declared(RopeScaling) if name != "rope_type"}
        return {name: value for name, value in found.items() if value is not None}
