"""`benchmark.py step` and `layer` compare equal work and write the results as JSON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from calling import Tools

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
TINY = ("model.vocab_size=64", "model.hidden_size=16", "model.intermediate_size=40", "model.num_hidden_layers=2")
HEADS = ("model.num_attention_heads=4", "model.num_key_value_heads=2")


def benchmark(*args: object, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | warm.SETTINGS | settings
    return warm.run(ROOT / "tools" / "benchmark.py", *args, environment=environment)


@pytest.mark.slow
def test_a_tiny_shape_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "measured" / "tiny.json"
    sizes = ("--batch", 2, "--seq-len", 8, "--threads", 1, "--repeats", 2, "--json", "--out", out)
    uncompiled = {"TORCH_COMPILE_DISABLE": "1"}  # compiling takes 45 s of CPU
    done = benchmark("step", "--compiled", *sizes, *TINY, *HEADS, **uncompiled)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads(out.read_text()) == found
    steps = found["steps"]
    assert set(steps) == {
        "transformers",
        "transformers_fused_adamw",
        "transformers_our_products",
        "transformers_compiled",
        "llama_ds_model",
        "llama_ds_engine",
        "gemms",
        "gemms_our_products",
    }
    for name, step in steps.items():
        assert step["tokens_per_s"] * step["median_s"] == 16 or abs(step["tokens_per_s"] * step["median_s"] - 16) < 1e-9
        if not name.startswith("gemms"):  # every step trains on the same rows, so all losses fall alike
            assert step["last_loss"] < step["first_loss"]
            assert abs(step["last_loss"] - steps["transformers"]["last_loss"]) < 1e-4
            for floor in ("gemms", "gemms_our_products"):
                assert found[f"time_over_{floor}"][name] == step["median_s"] / steps[floor]["median_s"]
    ours = steps["llama_ds_model"]["median_s"]
    assert found["speed_over_transformers"]["llama_ds_model"] == steps["transformers"]["median_s"] / ours
    theirs = [steps[f"transformers{kind}"]["median_s"] for kind in ("", "_fused_adamw", "_compiled")]
    assert found["speed_over_fastest_transformers"]["llama_ds_model"] == min(theirs) / ours
    assert (found["batch"], found["seq_len"], found["shape"]["hidden_size"]) == (2, 8, 16)


@pytest.mark.slow
def test_evaluation_is_measured_beside_transformers(tools: Tools, words: dict[str, object], tmp_path: Path) -> None:
    """Texts are compared before their times are: other ones are an error."""
    assert tools.call("tools/convert.py", words["run"], tmp_path / "hf", "--to", "hf").code == 0
    sizes = ("--requests", 12, "--prompt-words", 4, "--new-tokens", 4, "--batches", 1, 3, "--repeats", 1)
    done = benchmark("evaluation", tmp_path / "hf", *sizes, "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for measured in (*found["scoring"].values(), *found["generation"].values()):
        ours = measured["contestants"].pop("llama_ds")
        for name, one in measured["contestants"].items():
            assert measured["speed_over"][name] == pytest.approx(ours["tokens_per_s"] / one["tokens_per_s"])
    tokens = {name: one["tokens"] for name, one in found["generation"].items()}  # a text may end early
    assert tokens.keys() == {"1", "3"} and 1 <= tokens["1"] <= 4 and 3 <= tokens["3"] <= 12
    assert found["scoring"]["choices"]["speed_over"].keys() == {"forward"}  # lm-eval is not installed here


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_a_layer_is_measured_against_autograd_and_transformers(policy: str) -> None:
    sizes = ("--shape", "quickstart", "--tp", 2, "--batch", 1, "--seq-len", 16, "--threads", 1, "--repeats", 2)
    fp8 = ("--tp", 1, "--fp8") if policy == "full" else ()
    done = benchmark("layer", *sizes, *fp8, "--policy", policy, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    layers = found["layers"]
    assert list(layers) == [
        "llama_ds_none",
        f"llama_ds_{policy}",
        "llama_ds_autograd",
        "transformers",
        "transformers_checkpointed",
        *(("llama_ds_fp8_current", "llama_ds_fp8_delayed", "llama_ds_fp8_delayed_all") if fp8 else ()),
        "transformers_our_products",
    ]
    tp = 1 if fp8 else 2
    assert (found["model"]["num_attention_heads"], found["model"]["intermediate_size"]) == (8 // tp, 688 // tp)
    for name, layer in layers.items():
        assert layer["tokens_per_s"] == pytest.approx(16 / layer["median_s"])
        assert layer["tflops"] == pytest.approx(found["model_gflops"] / 1e3 / layer["median_s"])
        assert layer["mfu"] is None  # the peak of a CPU is unknown
        assert layer["peak_bytes"] > layer["saved_bytes"] > 0, name
    assert layers[f"llama_ds_{policy}"]["saved_bytes"] < layers["llama_ds_none"]["saved_bytes"]
    assert layers["transformers_checkpointed"]["saved_bytes"] == 16 * 256 * 4  # only its input


def test_impossible_numbers_are_one_line_and_exit_2() -> None:
    for args, word in (
        (("step", "--batch", 0), "--batch: '0' is not a whole number of 1 or more"),
        (("step", "--run", "no.yaml"), "no.yaml"),
        (("step", "model.hidde=3"), "hidde"),
        (("layer", "--tp", 3), "--tp 3 does not divide"),
        (("layer", "--batch", 10**12), "memory is not enough: "),
        (("layer", "--tp", 2, "--fp8"), "model.intermediate_size / tp = 344 is not a multiple of 16"),
    ):
        done = benchmark(*args)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: ") and word in line
    done = benchmark("layer", "--compiled", CXX="absent-c++")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: command line: --compiled needs a C++ compiler")
