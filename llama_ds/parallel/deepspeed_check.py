"""DeepSpeed's own reading of a configuration, with what it refuses as one line for the user."""

from __future__ import annotations

import copy
import io
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from llama_ds.errors import UserError

SECTIONS = {  # section of the JSON by the class that reads it
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedBF16Config": "bf16",
    "CompileConfig": "compile",
    "DeepSpeedFlopsProfilerConfig": "flops_profiler",
}
ONE_RANK = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
DEEPSPEED, PROJECT = Path(deepspeed.__file__).parent, Path(__file__).parents[1]


class _OneRank:
    """The grid of a job of one rank. Without a grid, DeepSpeed takes the ranks that have joined."""

    def get_data_parallel_world_size(self) -> int:
        return 1


def check_values(path: str, config: dict[str, Any]) -> None:
    """Let DeepSpeed's classes read the merged configuration `config`; `path` is the user's file, for messages.

    Raises:
        UserError: a value has a wrong type or is out of range; the message names the first.
    """
    try:
        with redirect_stdout(io.StringIO()):  # it announces the world size
            DeepSpeedConfig(copy.deepcopy(config) | ONE_RANK, mpu=_OneRank())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (SECTIONS.get(error.title, error.title), *first["loc"])))
        raise UserError(f"{path}: {key} = {first['input']!r}: {first['msg']}; correct it, or take it out") from None
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _refused(path, error) from None


def check_device(path: str, config: dict[str, Any], device: str) -> None:
    """Refuse what DeepSpeed computes on CUDA only, and otherwise notices in the first step; `path` is for messages.

    Raises:
        UserError: a key of ZeRO asks for quantization on another `device`.
    """
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if device != "cuda" and config.get("zero_optimization", {}).get(key):
            raise UserError(f"{path}: zero_optimization.{key}: DeepSpeed quantizes on CUDA only; take it out")


@contextmanager
def refusals(path: str) -> Iterator[None]:
    """Turn what DeepSpeed's engines refuse at their start into an error of the user's file `path`.

    Raises:
        UserError: DeepSpeed's own code has raised one of the exceptions with which it refuses a setting.
    """
    try:
        yield
    except Exception as error:
        if type(error) in (AssertionError, ValueError, Exception) and _comes_from_deepspeed(error):
            raise _refused(path, error) from error
        raise


def _comes_from_deepspeed(error: Exception) -> bool:
    """Return whether DeepSpeed, or a library that it called, raised an error, rather than this project's code."""
    folders = [Path(frame.filename).parents for frame in traceback.extract_tb(error.__traceback__)]
    ours_or_its = [DEEPSPEED in parents for parents in folders if DEEPSPEED in parents or PROJECT in parents]
    return ours_or_its[-1]


def _refused(path: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path}: DeepSpeed refuses this configuration ({reason}); change the setting, or take it out")
