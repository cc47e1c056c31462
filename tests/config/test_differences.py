"""Differences between configurations are named by key, and only real ones."""

from __future__ import annotations

from llama_ds.config.differences import ABSENT, differences, model_differences, shown

SOURCES = [{"name": "code", "weight": 0.75, "path": "a"}, {"name": "web", "weight": 0.25, "path": "b"}]


def test_keys_are_compared_in_sections_and_whole_in_lists() -> None:
    then = {"optimizer": {"lr": 1.0, "betas": [0.9, 0.95]}, "name": "x", "deepspeed": {"zero": {"stage": 1}}}
    now = {"optimizer": {"lr": 1.0, "betas": [0.9, 0.99]}, "name": "x", "deepspeed": {"zero": {}}, "data": {}}
    assert list(differences(then, then)) == []
    assert list(differences(then, now)) == [
        ("optimizer.betas", [0.9, 0.95], [0.9, 0.99]),
        ("deepspeed.zero.stage", 1, ABSENT),
        ("data", ABSENT, {}),
    ]


def test_sources_are_compared_by_name() -> None:
    """Otherwise a reordered list would be reported as another weight and path of every source."""
    new = {"name": "new", "weight": 0.5, "path": "c"}
    assert list(differences({"sources": SOURCES}, {"sources": SOURCES[::-1]})) == []
    now = {"sources": [new, {**SOURCES[1], "weight": 0.5}]}
    assert list(differences({"sources": SOURCES}, now)) == [
        ("sources[code]", {"weight": 0.75, "path": "a"}, ABSENT),
        ("sources[web].weight", 0.25, 0.5),
        ("sources[new]", ABSENT, {"weight": 0.5, "path": "c"}),
    ]


def test_numbers_of_a_model_that_are_equal_as_float32_are_equal() -> None:
    """Otherwise an eps from a file that stores float32 would be refused as 9.999999747378752e-06, not 1e-05."""
    model = {"rms_norm_eps": 1e-5, "rope_scaling": {"factor": 8.0}, "heads": 4}
    assert model_differences(model, {**model, "rms_norm_eps": 9.999999747378752e-06}) == []
    other = {**model, "rms_norm_eps": 1.000001e-5, "rope_scaling": None}
    assert model_differences(model, other) == [
        ("model.rms_norm_eps", 1e-5, 1.000001e-5),
        ("model.rope_scaling", {"factor": 8.0}, None),
    ]


def test_values_are_shown_as_in_a_run_file() -> None:
    values = ("text", "", None, True, 1e-5, [1, 2], {"a": "b"}, ABSENT)
    assert [shown(value) for value in values] == [
        *("text", '""', "null", "true", "1e-05", "[1, 2]", "{a: b}", "absent"),
    ]  # fmt: skip
