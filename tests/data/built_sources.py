"""What the fixture `built` gives to the tests of the data room."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SEQ_LEN = 64
VOCAB_SIZE = 600


@dataclass(frozen=True)
class Built:
    """What was built, and where."""

    code: str  # pattern of the documents
    prose: str
    tokenizer: str
    shards: Path
