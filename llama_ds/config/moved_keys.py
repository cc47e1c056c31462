"""Renamed keys and values of run files; the old names still work, also in runs recorded in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_ds.config.differences import shown
from llama_ds.config.reader import ConfigSource
from llama_ds.log import logger

MOVED_KEYS = {
    "model.attention_backend": "compute.attention_backend",
    "model.initializer_range": "training.initializer_range",
    "parallel.decoder_layer": "compute.decoder_layer",
    "logging.tensorboard": "logging.boards",
}
# Values that changed their form with the name of their key.
REFORMED: dict[str, dict[bool, list[dict[str, str]]]] = {
    "logging.tensorboard": {True: [{"name": "tensorboard"}], False: []},
}
RENAMED_VALUES = {("compute.decoder_layer", "written_out"): "manual_backward"}

Entry = tuple[str, Any]  # dotted key, value


def renamed_data(data: Mapping[str, Any], source: ConfigSource) -> dict[str, Any]:
    """Return a run's plain data under the current names.

    Raises:
        UserError: an old and a new key have different values.
    """
    copied = {name: dict(section) if isinstance(section, dict) else section for name, section in data.items()}
    for entry in _outdated(_entries(data)):
        section, name = entry[0].split(".")
        del copied[section][name]
        new, value = _renamed(*entry)
        section, name = new.split(".")
        keys = copied.setdefault(section, {})
        if isinstance(keys, dict):  # otherwise the reader reports the malformed section
            _check_same(entry, _renamed(new, keys.get(name, value)), source)
            keys[name] = value
    return copied


def renamed_overrides(changes: Sequence[Entry], source: ConfigSource) -> list[Entry]:
    """Return overrides under the current names, in their order.

    Raises:
        UserError: an old and a new key have different values.
    """
    entries = _with_sections(changes)
    given = {key: _renamed(key, value) for key, value in entries if key in MOVED_KEYS.values()}
    for entry in _outdated(entries):
        _check_same(entry, given.get(_renamed(*entry)[0], _renamed(*entry)), source)
    found: list[Entry] = []
    for key, value in changes:
        outdated = _outdated(_entries({key: value}))
        if outdated:
            value = {k: v for k, v in value.items() if (f"{key}.{k}", v) not in outdated}
        found += [_renamed(key, value), *(_renamed(*entry) for entry in outdated)]
    return found


def warn_of_old_names(path: str, data: Mapping[str, Any], changes: Sequence[Entry]) -> None:
    """Log a line for each old name in a run file's data and in overrides."""
    for source, entries in ((path, _entries(data)), ("command line", _with_sections(changes))):
        for old, value in _outdated(entries):
            new, present = _renamed(old, value)
            if old in REFORMED:
                logger.warning("%s: %s = %s is now written %s = %s", source, old, shown(value), new, shown(present))
            elif new == old:
                logger.warning("%s: %s = %s is now called %s; the old name still works", source, old, value, present)
            else:
                logger.warning("%s: %s is now called %s; the old name still works", source, old, new)


def _with_sections(changes: Sequence[Entry]) -> list[Entry]:
    """Return overrides, and for those of whole sections also the keys in them."""
    return [entry for key, value in changes for entry in ((key, value), *_entries({key: value}))]


def _entries(data: Mapping[str, Any]) -> list[Entry]:
    """Return the keys of all sections with their values."""
    sections = [(name, section) for name, section in data.items() if isinstance(section, dict)]
    return [(f"{name}.{key}", value) for name, section in sections for key, value in section.items()]


def _outdated(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if _renamed(*entry) != entry]


def _renamed(key: str, value: Any) -> Entry:
    if key in REFORMED and isinstance(value, bool):
        value = REFORMED[key][value]
    key = MOVED_KEYS.get(key, key)
    return key, RENAMED_VALUES.get((key, value), value) if isinstance(value, str) else value


def _check_same(old: Entry, given: Entry, source: ConfigSource) -> None:
    """Raise UserError if an entry under its old name differs from the one `given` under the current name."""
    if _renamed(*old) != given:
        raise source.error(old[0], f"= {old[1]} is now called {given[0]}, which is {given[1]}; keep {given[0]} alone")
