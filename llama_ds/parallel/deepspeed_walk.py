"""The keys that the installed DeepSpeed reads from its JSON, found by letting its own classes read one."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from enum import Enum
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from llama_ds.config.deepspeed_effects import SECTIONS
from llama_ds.parallel.deepspeed_check import ONE_RANK

_MODELS = {  # attribute of DeepSpeedConfig by the section that it reads
    "zero_optimization": "zero_config",
    "bf16": "bfloat16_config",
    "fp16": "float16_config",
    "compile": "compile_config",
}
_DEPRECATED = "deprecated"


class _Recorder(dict[str, Any]):
    """A mapping that records which keys are looked up."""

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.read: dict[str, Any] = {}  # key: default that the reader gave

    def __contains__(self, key: object) -> bool:
        self.read.setdefault(str(key), PydanticUndefined)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.read.setdefault(key, PydanticUndefined)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value; record the key and its default."""
        if self.read.get(key, PydanticUndefined) is PydanticUndefined:
            self.read[key] = default
        return super().get(key, default)

    def keys(self) -> Any:
        """Return this mapping itself, so that `key in mapping.keys()` is recorded."""
        return self


def deepspeed_keys() -> dict[str, Any]:
    """Return DeepSpeed's keys with their defaults: dotted in the sections that are passed on, else top-level.

    The default is PydanticUndefined where DeepSpeed states none while it reads.
    """
    top = _Recorder(ONE_RANK)
    sections = {name: _Recorder() for name in SECTIONS}
    config: Any = DeepSpeedConfig.__new__(DeepSpeedConfig)
    with redirect_stdout(io.StringIO()):
        for name, section in sections.items():
            dict.__setitem__(top, name, section)
        config._param_dict = top
        config._initialize_params(top)
    found = dict(top.read)
    for name, section in sections.items():
        found |= {f"{name}.{key}": default for key, default in section.read.items()}
    for name, attribute in _MODELS.items():
        found |= {f"{name}.{key}": default for key, default in _fields(type(getattr(config, attribute)))}
    found |= {f"comms_logger.{key}": default for key, default in _fields(type(config.comms_config.comms_logger))}
    return found


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a class and of the offload classes in it, without those that only rename another."""
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if extra.get(_DEPRECATED):
            continue
        default = field.default
        yield name, default.value if isinstance(default, Enum) else default
        if name.startswith("offload_"):
            for arm in getattr(field.annotation, "__args__", ()):
                if isinstance(arm, type) and issubclass(arm, BaseModel):
                    yield from ((f"{name}.{key}", value) for key, value in _fields(arm))
