"""Any value under any key of a run file is one line of error, or a run that is read back the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ds.config import run_file
from llama_ds.config.declare import declared
from llama_ds.config.numbers import divisors, near_divisors, near_multiples
from llama_ds.config.reader import ConfigSource, plain, read
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout

BASE: dict[str, Any] = {
    "name": "tiny",
    "deepspeed": {"zero_optimization": {"stage": 1}},
    "model": {
        **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
        **{"num_attention_heads": 8},
        "rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32},
    },
    "data": {
        "tokenizer": "tok.model",
        "seq_len": 32,
        "sources": [{"name": "code", "path": "code", "weight": 1}, {"name": "prose", "path": "prose", "weight": 0}],
        "mixture": [{"at_tokens": 20_000, "weights": {"prose": 1}}],
        "skip": [{"at_step": 4, "steps": 1}],
    },
    "training": {"global_batch": 16, "steps": 100},
    "optimizer": {"lr": 1e-3, "warmup_steps": 10},
    "parallel": {"pp": 2},
    "logging": {"trace_step": 3},
}
VALUES = (
    *("", "~", "true", "yes", "x", "'1e5'", "' 1'", "1__0", "010", "0x10", "2024-01-01", "1:30"),
    *("0", "-1", "0.5", "-0.5", "1e5", "1e23", "-1e23", "1e400", ".nan", "-.inf", "9" * 400, "9" * 4400, "9e99T"),
    *("[]", "[1]", "[-1, 1e30]", "{}", "{a: 1}", "{weights: {a: .inf}}", "&a [*a]", "!!bool x", "!!int ''"),
    *("x" * 5000, '"a\\0b"', '"a\\nb"', '"\\ud800"', "$NOT_SET/x", "~no-user/x", "ÿ", "<<", "/"),
)


def keys(kind: type = RunConfig, at: str = "") -> Iterator[str]:
    """Yield the dotted keys of the schema; lists of sections have the entry 0."""
    for name, hint in get_type_hints(kind).items():
        arms = [arm for arm in (hint, *get_args(hint)) if isinstance(arm, type) and is_dataclass(arm)]
        for arm in arms:
            index = ".0" if name in ("sources", "mixture", "skip") else ""
            yield from keys(arm, f"{at}{name}{index}.")
        if arms or name in declared(kind):
            yield f"{at}{name}"


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_file, "read_yaml", lambda path: copy.deepcopy(BASE))
    monkeypatch.delenv("NOT_SET", raising=False)


@pytest.mark.parametrize("key", list(keys()))
def test_a_hostile_value_is_one_line(key: str, base: None) -> None:
    """A value that gets through would come up as a traceback on every rank, or as a run elsewhere on the disk."""
    for value in VALUES:
        try:
            run = load_run("tiny.yaml", [f"{key}={value}"])
            resolve_layout(run, 16)
        except UserError as error:
            text = str(error)
            assert "\n" not in text
            if key != "deepspeed":  # the path of a file, which its error names
                assert text.startswith(("tiny.yaml: ", "command line: ")) and len(text) < 800, (value[:40], text)
            continue
        assert read(RunConfig, plain(run), ConfigSource("")) == run
        assert run.output_dir and run.name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=1e23", "command line: model.hidden_size = 99999999999999991611392 is above 1e6, the "
         "largest that is accepted"),
        ("optimizer.clip=1e10", "tiny.yaml: optimizer.clip = 10000000000.0 is above 1e9, the largest that is accepted"),
        ("optimizer.betas=[-1e30, 0]", "tiny.yaml: optimizer.betas.0 = -1e+30 is below -1e9, the smallest that is "
         "accepted"),
        ("model.rope_theta=0.5", "tiny.yaml: model.rope_theta = 0.5 is below 1"),
        ("training.steps=900_000_000", None),
        ("seed=010", "command line: seed = '010' is not an integer (4194304, 4_194_304, 4M, 1.4T and 1.4e12 are)"),
        ("compute.self_test=false", "command line: compute.self_test = False is not auto, always or off"),
        ("name=1e5", "command line: name = 100000.0 is not a string"),
        ("name=2024-01-01", None),
        ("output_dir=~", "command line: output_dir = None is not a string; YAML reads ~ and an empty value as null, so "
         "write them in quotes"),
        ("output_dir=''", 'tiny.yaml: output_dir = "" is empty; write a path'),
        ("data.tokenizer=''", 'tiny.yaml: data.tokenizer = "" is empty; write a path'),
        ("checkpoint.start_from=''", None),
        ("data.cache_dir=$NOT_SET/x", "tiny.yaml: data.cache_dir = '$NOT_SET/x': the environment variable NOT_SET is "
         "not set; set it, or write the path out"),
        ("data.sources.0.path=~no-user/x", "tiny.yaml: data.sources.0.path = '~no-user/x': there is no home folder of "
         "~no-user; write the path out (./~x for a name)"),
        ("deepspeed=$NOT_SET", "command line: deepspeed = '$NOT_SET': the environment variable NOT_SET is not set; set "
         "it, or write the path out"),
        ("model={from: $NOT_SET}", "command line: model.from = $NOT_SET: the environment variable NOT_SET is not set; "
         "set it, or write the path out"),
    ],
)  # fmt: skip
def test_what_a_hostile_value_is_told(override: str, message: str | None, base: None) -> None:
    try:
        load_run("tiny.yaml", [override])
    except UserError as error:
        assert str(error) == message
        return
    assert message is None


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_suggested_sizes_divide(n: int, wanted: int) -> None:
    every = [d for d in range(1, n + 1) if n % d == 0]
    assert divisors(n) == every
    assert set(near_divisors(n, wanted)) <= set(every)
    assert len(near_divisors(n, wanted)) == min(len(every), 12)
    multiples = near_multiples(n, wanted, 3)
    nearest = sorted(abs(m - wanted) for m in range(n, wanted + 4 * n, n))[:3]
    assert sorted(abs(m - wanted) for m in multiples) == nearest
