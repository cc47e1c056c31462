"""What YAML's less common parts mean in a run file."""

from __future__ import annotations

from typing import Any

import pytest

from llama_ds.config.text import dump_yaml, parse_yaml
from llama_ds.errors import UserError

MERGED = """\
base: &base {path: shards/a, weight: 0.5}
sources:
- &first {<<: *base, name: a}
- {<<: [{weight: 0.25}, *first], name: b}
- <<: *first
  weight: 0.75
"""


def test_merges_take_keys_that_are_not_set() -> None:
    sources = parse_yaml(MERGED, "run.yaml")["sources"]
    assert sources == [
        {"path": "shards/a", "weight": 0.5, "name": "a"},
        {"path": "shards/a", "weight": 0.25, "name": "b"},
        {"path": "shards/a", "weight": 0.75, "name": "a"},
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"), ("No", "No"), ("on", "on"), ("True", True), ("FALSE", False), ("Null", None), ("~", None),
        ("1e5", 1e5), ("1e-5", 1e-5), ("'1e5'", "1e5"), ("+1_000", 1000), ("-0", 0), (".5", 0.5),
        ("+.inf", float("inf")),
        ("010", "010"), ("0o10", "0o10"), ("0x10", "0x10"), ("00.5", "00.5"), ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"), ("<", "<"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    found = parse_yaml(text, "run.yaml")
    assert (found, type(found)) == (value, type(value))
    assert parse_yaml(dump_yaml({"a": value, "b": text}), "") == {"a": value, "b": text}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "run.yaml:3: key 'a' is set twice, first in line 1; keep one"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  b: 2\n  b: 3", "run.yaml:5: key 'b' is set twice, first in line 4; keep one"),
        ("a: &x {b: 1}\nc: {<<: *x, <<: *x}", "run.yaml:2: key '<<' is set twice, first in line 2; keep one"),
        ("a: {<<: 3}", "run.yaml:1: not valid YAML: expected a mapping or list of mappings for merging, "
         "but found scalar"),
        ("a:\n\tb: 1", "run.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: &x {b: *x}", "run.yaml:1: not valid YAML: found unconstructable recursive node"),
        ("a: *x", "run.yaml:1: not valid YAML: found undefined alias 'x'"),
        ("a: 1\n---\nb: 2", "run.yaml:2: not valid YAML: but found another document"),
        ("? [1]\n: 2", "run.yaml:1: not valid YAML: found unhashable key"),
        ("a: !!python/name:os.system x", "run.yaml:1: not valid YAML: could not determine a constructor for the tag "
         "'tag:yaml.org,2002:python/name:os.system'"),
        ("a: !!bool x", "run.yaml: not a usable YAML file: 'x'; check its numbers and tags"),
        ("[" * 5000, "run.yaml: not a usable YAML file: it is nested too deeply"),
    ],
)  # fmt: skip
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_yaml(text, "run.yaml")
    assert str(error.value) == message
