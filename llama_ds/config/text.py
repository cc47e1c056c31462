"""Reads and writes run files and DeepSpeed files as plain data. The only importer of PyYAML."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from llama_ds.atomic_files import overwrite
from llama_ds.errors import UserError, shortened


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars (`1e-5` is a number, `no` is a word), YAML 1.1's merge key, no duplicate keys.

    A number with a leading zero, which the two versions read differently, is text, and a date is too. Aliases that
    contain themselves are errors.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (the base class declares it so)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping; its keys are compared here, before merges add the keys of others."""
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in first:
                before = first[key.value]
                raise UserError(f"{self.name}:{line}: key '{key.value}' is set twice, first in line {before}; keep one")
            first[str(key.value)] = line
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        """Return the document's value, built depth first: so PyYAML notices an alias within its own value."""
        return self.construct_object(node, deep=True)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes strings that `_Loader` would read as other types."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), list(_first))


def save_text(path: str, text: str) -> None:
    """Write `text` to the file `path`; create missing folders.

    Raises:
        UserError: it cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        overwrite(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; give another path") from None


def read_yaml(path: str, what: str = "a run file", like: str = "ds_configs/quickstart.yaml") -> dict[str, Any]:
    """Return the mapping in the YAML file `path`; errors say that it is to be `what`, `like` another file.

    Raises:
        UserError: the file is missing, has a syntax error (its line is reported) or a duplicate key, or is no mapping.
    """
    data = parse_yaml(_text(path), path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no sections; {what} is a YAML mapping (see {like})")
    return data


def parse_yaml(text: str, source: str) -> Any:
    """Return the value that `text` has as YAML; errors name `source` and the line."""
    try:
        loader = _Loader(text)
        loader.name = source
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"{where}: not valid YAML: {problem or 'it holds characters that YAML forbids'}") from None
    except RecursionError:
        raise UserError(f"{source}: not a usable YAML file: it is nested too deeply") from None
    except (
        AttributeError,
        LookupError,
        ValueError,
    ) as error:  # !!int "x"; a number of more digits than Python converts
        raise UserError(
            f"{source}: not a usable YAML file: {shortened(str(error))}; check its numbers and tags"
        ) from None


def dump_yaml(data: dict[str, Any]) -> str:
    """Return `data` as YAML text that `read_yaml` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def read_json(path: str) -> dict[str, Any]:
    """Return the object in the JSON file `path`.

    Raises:
        UserError: the file is missing, has a syntax error (its line is reported) or a duplicate key, or is no object.
    """
    text = _text(path)
    try:
        data = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{path}: not a usable JSON file: it is nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise UserError(f"{path}: not a usable JSON file: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no JSON object; a DeepSpeed file is one, such as {{}}")
    return data


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as stream:  # some editors begin a file with a mark
            return stream.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give the path of an existing file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None


def _unique(pairs: list[tuple[str, Any]], path: str) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: key '{name}' is set twice; keep one")
    return dict(pairs)
