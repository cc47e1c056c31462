"""Compare an export in vLLM on the CPU with this project. Usage: in_vllm.py FOLDER"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from comparing import MODELS, Expected

# One process, without compilation: the models are small. The cache of keys and values takes 1 GiB.
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "2"}

import vllm

TOLERANCE = 1e-3  # nats, of a sum over a text in fp32


def main(folder: Path) -> None:
    """Compare all models."""
    for name in MODELS:
        compare(Expected(folder / name), f"vLLM {vllm.__version__}, {name}")


def compare(expected: Expected, where: str) -> None:
    """Compare one model."""
    model = vllm.LLM(str(expected.folder / "hf"), dtype="float32", max_model_len=256, enforce_eager=True)
    tokenizer = model.get_tokenizer()
    expected.check_ids(where, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    greedy = vllm.SamplingParams(
        temperature=0, max_tokens=len(expected.greedy[0]), logit_bias={expected.eos: -100.0}, prompt_logprobs=0
    )
    found = dict(zip(expected.prompts, model.generate(list(expected.prompts), greedy, use_tqdm=False), strict=True))
    expected.check_begin(where, lambda prompt: found[prompt].prompt_token_ids)
    expected.check_greedy(where, lambda prompt, count: found[prompt].outputs[0].token_ids)
    scored = found[expected.prompts[1]]
    ids = scored.prompt_token_ids
    total = sum(ranks[token].logprob for token, ranks in zip(ids[1:], scored.prompt_logprobs[1:], strict=True))
    if abs(total - expected.rolling) > TOLERANCE:
        raise SystemExit(f"{where}: {total:.4f} nats, not {expected.rolling:.4f}")
    print(f"{where}: log-likelihood {total:.4f} nats, equal to {abs(total - expected.rolling):.1g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
