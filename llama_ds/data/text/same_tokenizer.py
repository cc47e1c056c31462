"""Comparison of two tokenizers that may be files of different kinds."""

from __future__ import annotations

from collections.abc import Iterator

from llama_ds.data.text.tokenizer import Tokenizer

SAMPLE = 2000  # ids whose texts are compared
TEXT = '  Two  spaces, ﬁne 2048 ｆｕｌｌ e\u0301é 漢字 😀\t\r\n\u3000def f(x):\n    return x  # I\'ll say "no" '


def difference(theirs: Tokenizer, ours: Tokenizer) -> str:
    """Return in words how `theirs` differs from `ours`; "" if they are one file, or give equal ids.

    Files that differ are compared by size, bos, eos, and the ids of a fixed text and of the texts of SAMPLE ids spread
    over both vocabularies, one by one and joined.
    """
    if theirs.sha256 == ours.sha256:
        return ""
    for what in ("vocab_size", "bos_id", "eos_id"):
        there, here = getattr(theirs, what), getattr(ours, what)
        if there != here and None not in (there, here):
            return f"{what} {there}, not {here}"
    for text in _probes(theirs, ours):
        if (there := theirs.encode(text)) != (here := ours.encode(text)):
            first = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), 0)
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            return f"ids {there[first : first + 4]}, not {here[first : first + 4]}, in {shown!r}"
    return ""


def _probes(*tokenizers: Tokenizer) -> Iterator[str]:
    yield TEXT
    for tokenizer in tokenizers:
        step = -(-tokenizer.vocab_size // SAMPLE)
        texts = [tokenizer.decode([i]) for i in range(0, tokenizer.vocab_size, step)]
        texts = [text for text in texts if text and "\ufffd" not in text]  # a byte alone is no text
        yield from texts
        yield "".join(texts)
