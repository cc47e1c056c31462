"""The files beside weights that every conversion between formats of this project and Hugging Face carries along.

They are the tokenizer in all its spellings, chat templates and generation settings. Their bytes are copied.
"""

from __future__ import annotations

import os

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
