"""Compare GGUF files in llama.cpp with this project: those of tools/convert.py, and those of llama.cpp's converter.

Usage: in_llama_cpp.py FOLDER LLAMA_CPP, the folder of llama.cpp's sources
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from comparing import MODELS, Expected

# llama.cpp's converter knows Llama 3's tokenizer by a hash of ids, which a small vocabulary of the same kind lacks.
CONVERTER = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def main(folder: Path, sources: Path) -> None:
    """Compare all models."""
    for name in MODELS:
        expected, where = Expected(folder / name), f"llama.cpp ({llama_cpp.__version__}), {name}"
        theirs = expected.folder / "theirs.gguf"
        words = [sys.executable, "-c", CONVERTER, sources, expected.folder / "hf", "--outtype", "f32"]
        done = subprocess.run([*map(str, words), "--outfile", str(theirs)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{where}: llama.cpp's converter failed:\n{done.stderr}")
        compare_files(f"{where}, both converters", expected.folder / "model.gguf", theirs)
        compare(expected, f"{where}, tools/convert.py", expected.folder / "model.gguf")
        compare(expected, f"{where}, llama.cpp's converter", theirs)
        quantized = load(expected.folder / "q8_0.gguf")
        difference = np.abs(logits_of(quantized, ids_of(quantized, expected.prompts[0], True)) - expected.logits).max()
        print(f"{where}, q8_0: logits differ by at most {difference:.2g} of {np.abs(expected.logits).max():.3g}")


def compare(expected: Expected, where: str, path: Path) -> None:
    """Compare one file."""
    model = load(path)
    expected.check_ids(where, lambda text: ids_of(model, text, False))
    space = expected.folder.name == "sentencepiece-prefix"  # decoding keeps the space before a text
    expected.check_texts(where, lambda ids: model.detokenize(ids).decode()[1 if space and ids else 0 :])
    expected.check_begin(where, lambda text: ids_of(model, text, True))
    expected.check_logits(where, logits_of(model, ids_of(model, expected.prompts[0], True)))

    def continuation(prompt: str, count: int) -> list[int]:
        ids = list(ids_of(model, prompt, True))
        begin = len(ids)
        for _ in range(count):
            logits = logits_of(model, ids)[-1]
            logits[expected.eos] = -np.inf
            ids.append(int(logits.argmax()))
        return ids[begin:]

    expected.check_greedy(where, continuation)


def compare_files(where: str, ours: Path, theirs: Path) -> None:
    """Compare tensors, and the metadata of the model and the tokenizer, of two files."""
    readers = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    tensors = [{t.name: t for t in reader.tensors} for reader in readers]
    if tensors[0].keys() != tensors[1].keys():
        raise SystemExit(f"{where}: other tensors: {sorted(tensors[0].keys() ^ tensors[1].keys())}")
    for name, tensor in tensors[0].items():
        # Rotary factors are computed in another order of operations; all others are copies.
        rounding = 1e-6 if name.startswith("rope_freqs") else 0
        if not np.allclose(tensor.data, tensors[1][name].data, rtol=rounding, atol=0):
            raise SystemExit(f"{where}: {name} differs")
    fields = [
        {k: f.contents() for k, f in r.fields.items() if not k.startswith(("GGUF.", "general."))} for r in readers
    ]
    for key in fields[0].keys() & fields[1].keys():
        if key != "tokenizer.ggml.scores" and fields[0][key] != fields[1][key]:
            raise SystemExit(f"{where}: {key} is {fields[0][key]!r:.200} and {fields[1][key]!r:.200}")
    only = [sorted(fields[i].keys() - fields[1 - i].keys()) for i in range(2)]
    print(f"{where}: {len(tensors[0])} tensors and {len(fields[0].keys() & fields[1].keys())} metadata keys equal")
    print(f"{where}: keys only in ours {only[0]}, only in theirs {only[1]}")


def load(path: Path) -> Any:
    """Return a model that keeps the logits of all tokens; its keys and values are fp32, not the default fp16."""
    fp32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, logits_all=True, type_k=fp32, type_v=fp32, verbose=False)


def ids_of(model: Any, text: str, begin: bool) -> list[int]:
    """Return the ids of a text; with `begin`, as llama.cpp begins a prompt."""
    return model.tokenize(text.encode(), add_bos=begin, special=False)


def logits_of(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Return the logits (T, V) of ids."""
    model.reset()
    model.eval(list(ids))
    return np.array(model.scores[: len(ids)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
