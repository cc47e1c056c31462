"""Sections constructed in Python are checked like those read from a run file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from llama_ds.config.reader import ConfigSource, read
from llama_ds.config.schema import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeScaling,
    SourceConfig,
    TrainingConfig,
)
from llama_ds.errors import UserError

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(MODEL, num_key_value_heads=3), "model.num_key_value_heads = 3 does not divide "
         "model.num_attention_heads = 8; use 1, 2, 4 or 8"),
        (lambda: replace(MODEL, num_key_value_heads=0), "model.num_key_value_heads = 0 is not positive"),
        (lambda: replace(MODEL, rms_norm_eps=float("nan")), "model.rms_norm_eps = nan is not positive"),
        (lambda: RopeScaling(8.0, 4.0, 1.0, 8192), "model.rope_scaling.low_freq_factor = 4.0 is not between 0 and "
         "high_freq_factor = 1.0; Llama 3.1 has 1 and 4"),
        (lambda: RopeScaling(8.0), "model.rope_scaling.low_freq_factor is missing; rope_type llama3 has no default"),
        (lambda: RopeScaling(4.0, rope_type="yarn"), "model.rope_scaling.original_max_position_embeddings is missing; "
         "rope_type yarn has no default"),
        (lambda: RopeScaling(4.0, rope_type="linear", beta_fast=32.0), "model.rope_scaling.beta_fast = 32.0 is not a "
         "key of rope_type linear; leave it out"),
        (lambda: RopeScaling(0.5, rope_type="linear"), "model.rope_scaling.factor = 0.5 is below 1; it is new / "
         "original length"),
        (lambda: RopeScaling(4.0, None, None, 16, "yarn", beta_slow=40.0), "model.rope_scaling.beta_slow = 40.0 is not "
         "below beta_fast = 32.0"),
        (lambda: replace(MODEL, rope_theta=1.0, rope_scaling=RopeScaling(4.0, None, None, 16, "yarn")),
         "model.rope_theta = 1.0 is not above 1, as rope_type yarn requires"),
        (lambda: replace(MODEL, head_dim=2, rope_scaling=RopeScaling(4.0, None, None, 16, "dynamic")),
         "model.head_dim = 2 has one frequency, which rope_type dynamic keeps; use 4 or more"),
        (lambda: replace(MODEL, attention_bias="qk"), "model.attention_bias = 'qk' is not none, qkv or qkvo "
         "(did you mean 'qkv'?)"),
        (lambda: ComputeConfig("flsh"), "compute.attention_backend = 'flsh' is not auto, flash_attn, sdpa or "
         "reference"),
        (lambda: ComputeConfig(decoder_layer="written_out"), "compute.decoder_layer = 'written_out' is not "
         "manual_backward or autograd"),
        (lambda: TrainingConfig(8, 100, 0), "training.tokens = 0 is not positive"),
        (lambda: OptimizerConfig(1e-3, betas=(0.9, 1.0)), "optimizer.betas.1 = 1.0 is not in [0, 1)"),
        (lambda: OptimizerConfig(1e-3, min_lr_ratio=2.0), "optimizer.min_lr_ratio = 2.0 is above 1; it is final / peak "
         "learning rate"),
        (lambda: ParallelConfig(sequence_parallel=True), "parallel.sequence_parallel = true shares rows over tp ranks "
         "and tp is 1; set it to false"),
        (lambda: ParallelConfig(pp=2, partition=(4, 0)), "parallel.partition = [4, 0]: every stage needs a decoder "
         "layer or more"),
        (lambda: ParallelConfig(pp=3, recompute="none,full"), "parallel.recompute = none,full names 2 stages of 3; "
         "name one or 3"),
        (lambda: DataConfig("t.model", 8, (SourceConfig("a", "a", 0.5),)), "data.sources: the weights 0.5 sum to 0.5, "
         "not 1; divide each by 0.5"),
        (lambda: CheckpointConfig(keep_last=-1), "checkpoint.keep_last = -1 is negative"),
        (lambda: LoggingConfig(profile_ranks=(1,)), "logging.profile_ranks = [1] requires logging.trace_step, the "
         "first step to record; set it, or leave out profile_ranks"),
    ],
)  # fmt: skip
def test_a_section_that_breaks_a_rule_cannot_be_made(make: Callable[[], object], message: str) -> None:
    """A mistake in a notebook would come up later, as a KeyError or in numbers."""
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message


def test_errors_name_keys_as_they_stand_in_the_file() -> None:
    """Somebody who reads config.json would look there for a key model.head_dim."""
    shape = {**vars(MODEL), "head_dim": 7}
    for key, name in (("", "head_dim"), ("model", "model.head_dim"), ("base.model", "base.model.head_dim")):
        with pytest.raises(
            UserError, match=rf"^config.json: {name} = 7 is odd; rotary embeddings rotate pairs"
        ) as error:
            read(ModelConfig, shape, ConfigSource("config.json"), key)
        assert type(error.value) is UserError
