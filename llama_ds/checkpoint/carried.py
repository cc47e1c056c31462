"""The files beside weights that every conversion between formats of this project and Hugging Face carries along.

They are the tokenizer in all its spellings, chat templates and generation settings. Their bytes are copied.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_ds.errors import UserError

TOKENIZER, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_JSON, TOKENIZER_CONFIG, CHAT_TEMPLATE)
# Where a Hugging Face folder has Llama 3's file: beside the weights, tools take a tokenizer.model for sentencepiece's.
ORIGINAL = "original/tokenizer.model"
GENERATION = "generation_config.json"
TEMPLATES = "additional_chat_templates"  # a folder of *.jinja
CARRIED = (
    *TOKENIZER_FILES,
    ORIGINAL,
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", GENERATION),
)


def carried_files(folder: str) -> dict[str, str]:
    """Return the paths of the files to carry along that a folder has, by their names relative to it."""
    names = [name for name in CARRIED if os.path.exists(os.path.join(folder, name))]
    templates = os.path.join(folder, TEMPLATES)
    if os.path.isdir(templates):
        names += [f"{TEMPLATES}/{name}" for name in sorted(os.listdir(templates)) if name.endswith(".jinja")]
    return {name: os.path.join(folder, name) for name in names}


def check_carried(paths: Mapping[str, str]) -> None:
    """Check that files to carry along, by their names, are whole, because most are copied without being read.

    Raises:
        UserError: a JSON file holds no object, or a tokenizer is empty.
    """
    for name, path in paths.items():
        content = Path(path).read_bytes() if name.endswith((".json", TOKENIZER)) else b"{}"
        try:
            if not content or (name.endswith(".json") and not isinstance(json.loads(content), dict)):
                raise ValueError("it holds no object" if content else "it is empty")
            if name == TOKENIZER_JSON and "model" not in json.loads(content):
                raise ValueError("it holds no model")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: is damaged ({str(error).partition(':')[0]}); copy it again, or remove it"
            ) from None


@dataclass(frozen=True)
class Carried:
    """What the checkpoints of a run take over from the model that it started from."""

    hf_config: Mapping[str, Any] = field(default_factory=dict)  # content of its config.json, or token ids
    folder: str = ""  # where its files are; "": there are none

    def files(self) -> dict[str, bytes]:
        """Return the contents of its files by name. The folder may be deleted afterwards."""
        found = carried_files(self.folder) if self.folder else {}
        return {name: Path(path).read_bytes() for name, path in found.items()}
