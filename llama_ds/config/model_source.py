"""`model: {from: PATH}`: the model of a run file taken from a folder that holds one.

Readers of model folders lie on a higher floor. A program that loads run files names its reader with `read_models_by`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_ds.config.differences import model_differences, shown
from llama_ds.config.paths import expanded
from llama_ds.config.reader import ConfigSource, plain, read
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import shortened
from llama_ds.log import logger

KEY = "from"

Reader = Callable[[str], ModelConfig]
_readers: list[Reader] = []  # the last one counts


def read_models_by(reader: Reader) -> None:
    """Let `load_run` take models from folders with `reader`, which returns a folder's model or raises UserError."""
    _readers.append(reader)


def take_model(data: dict[str, Any], source: ConfigSource) -> None:
    """Replace `from` in the model section of a run's plain data by the keys of the model in that folder.

    Other keys of the section must have the folder's values, unless `checkpoint.start_from_changes` lists them.

    Raises:
        UserError: the folder holds no model, or other keys of the section differ from it.
    """
    section = data.get("model")
    if not isinstance(section, dict) or KEY not in section:
        return
    try:
        path = expanded(written := read(str, section[KEY], source, f"model.{KEY}"))
    except ValueError as error:
        raise source.error(f"model.{KEY}", f"= {shortened(written)}: {error}") from None
    if not _readers:
        raise source.error(
            f"model.{KEY}",
            f"= {path}: this program reads no model folders; call llama_ds.checkpoint.model_shape.read_models() first, "
            "or write the model's keys",
        )
    found = plain(_readers[-1](path))
    own = {key: value for key, value in section.items() if key != KEY}
    data["model"] = plain(read(ModelConfig, {**found, **own}, source, "model"))
    changes = _listed_changes(data)
    differing = model_differences(found, data["model"])
    if refused := [(key, there, here) for key, there, here in differing if key not in changes]:
        values = "; ".join(f"{key} = {shown(there)} there, {shown(here)} here" for key, there, here in refused)
        raise source.error(
            f"model.{KEY}",
            f"= {path}: the folder's model differs from the other keys of model: {values}; leave these keys out, or "
            f"change them on purpose: checkpoint.start_from_changes='[{', '.join(key for key, *_ in refused)}]'",
        )
    logger.info("model: from %s%s", path, "".join(f", {k} {shown(a)} -> {shown(b)}" for k, a, b in differing))


def _listed_changes(data: dict[str, Any]) -> list[Any]:
    checkpoint = data.get("checkpoint")
    found = checkpoint.get("start_from_changes") if isinstance(checkpoint, dict) else None
    return found if isinstance(found, list) else []
