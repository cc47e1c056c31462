"""Verification that a conversion's result equals its source: shapes, a hash of every weight read back, logits.

Hashes are 128-bit XXH3 of each unsharded weight in this project's layout and the result's dtype. The source's values,
rounded to that dtype, are compared with those that the result's own reader returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import xxhash
from torch import Tensor

from llama_ds.checkpoint.conversion.convert import CHUNK_BYTES, Counter, Options, Progress, run_all
from llama_ds.checkpoint.load_model import load_model
from llama_ds.checkpoint.manifest import name_of
from llama_ds.checkpoint.weights import DTYPES, ModelFiles, Readable
from llama_ds.errors import UserError
from llama_ds.layout.weights import Key, weight_shapes

PROMPT_TOKENS = 32
# Relative to the largest logit: two libraries that compute one model in fp32 sum in different orders. Heads in the
# wrong rotary layout, or a wrong theta, cause differences more than a hundred times as large.
TOLERANCE = 1e-3

Rounded = Callable[[Readable, Readable], Readable]  # source and result -> the source's values as the result holds them
Logits = Callable[[str, Tensor], Tensor]  # model folder, ids (1, T) -> logits (1, T, V) in fp32


@dataclass(frozen=True)
class Proof:
    """The findings of a verification."""

    tensors: int
    parameters: int
    dtype: str  # the result's
    source_hash: str
    result_hash: str
    max_difference: float | None = None  # largest absolute difference of two logits; None: not computed
    largest: float = 0.0  # largest absolute value of the source's logits

    def lines(self) -> list[str]:
        """Return the findings as lines of text."""
        logits = "skipped (--no-logits)"
        if self.max_difference is not None:
            logits = (
                f"max abs difference {self.max_difference:.3g} of {self.largest:.3g} on {PROMPT_TOKENS} fixed ids, fp32"
            )
        return [
            f"proof   tensors {self.tensors} of {self.tensors}, {self.parameters} parameters, all shapes equal",
            f"proof   hash    source as {self.dtype} {self.source_hash}",
            f"proof   hash    result {' ' * len(self.dtype)}    {self.result_hash}",
            f"proof   logits  {logits}",
        ]


def prove(
    source: ModelFiles,
    result: ModelFiles,
    options: Options,
    progress: Progress,
    logits_of_result: Logits | None = None,
    with_logits: bool = True,
    rounded: Rounded = lambda source, result: source,
) -> Proof:
    """Compare the result of a conversion with its source.

    Args:
        rounded: applies what the result's format rounds besides the dtype, which is quantization.
        logits_of_result: computes logits with the library that the result is meant for; None: this project's model.

    Raises:
        UserError: they differ; the message names the tensor or the logits.
    """
    _compare_shapes(source, result)
    hashes = _compare_hashes(source, result, rounded, options, progress)
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in result.tensors.values())
    proof = Proof(len(result.tensors), parameters, result.dtype, *hashes)
    if not with_logits:
        return proof
    ids = prompt(source)
    expected = _our_logits(source, ids)
    found = logits_of_result(result.path, ids) if logits_of_result else _our_logits(result, ids)
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not _narrower(result.dtype, source.dtype) and not difference <= TOLERANCE * max(largest, 1.0):
        raise UserError(
            f"{result.path}: its logits differ from those of {source.path} by {difference:.3g} of {largest:.3g}; "
            "this is an error of the conversion: report it with both configurations"
        )
    return Proof(len(result.tensors), parameters, result.dtype, *hashes, difference, largest)


def prompt(files: ModelFiles) -> Tensor:
    """Return the fixed ids (1, T), spread over the vocabulary."""
    length = min(PROMPT_TOKENS, files.seq_len)
    return (torch.arange(length) * 7919 + 1).remainder(files.model.vocab_size)[None]


def _narrower(result: str, source: str) -> bool:
    """Return whether a dtype holds fewer values than the source's; quantized ones have no torch dtype."""
    if result not in DTYPES or {result, source} == {"bf16", "fp16"}:
        return True
    return DTYPES[result].itemsize < DTYPES[source].itemsize


def _compare_shapes(source: ModelFiles, result: ModelFiles) -> None:
    if source.tensors.keys() != result.tensors.keys():
        different = sorted(source.tensors.keys() ^ result.tensors.keys())
        raise UserError(f"{result.path}: {name_of(different[0])} is missing in the source or in the result; {_AGAIN}")
    for key, tensor in source.tensors.items():
        found = result.tensors[key].shape
        if found != tensor.shape:
            raise UserError(
                f"{result.path}: {name_of(key)} has shape {list(found)}, not {list(tensor.shape)}; {_AGAIN}"
            )


def _compare_hashes(
    source: ModelFiles, result: ModelFiles, rounded: Rounded, options: Options, progress: Progress
) -> tuple[str, str]:
    total = sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in result.tensors.values())
    counter = Counter(progress, "prove", total)
    hashes: dict[Key, tuple[str, str]] = {}

    def compare(key: Key) -> None:
        wanted, found = rounded(source.tensors[key], result.tensors[key]), result.tensors[key]
        hashes[key] = _hash(wanted, found.dtype, None), _hash(found, found.dtype, counter)
        if len(set(hashes[key])) > 1:
            raise UserError(f"{result.path}: {name_of(key)} differs from that of {source.path}; {_AGAIN}")

    run_all((partial(compare, key) for key in result.tensors), options.workers, counter)
    combined = [xxhash.xxh3_128(), xxhash.xxh3_128()]
    for key in weight_shapes(result.model):  # the order is the same for all formats, so equal models have equal hashes
        for digest, found in zip(combined, hashes[key], strict=True):
            digest.update(f"{name_of(key)}:{found}\n".encode())
    return combined[0].hexdigest(), combined[1].hexdigest()


_AGAIN = "the disk or the source changed during the conversion: remove the folder and convert again"


def _hash(tensor: Readable, dtype: torch.dtype, counter: Counter | None) -> str:
    digest = xxhash.xxh3_128()
    total = torch.Size(tensor.shape).numel()
    buffer = torch.empty(min(total, CHUNK_BYTES // dtype.itemsize), dtype=dtype)
    for start in range(0, total, len(buffer)):
        part = buffer[: min(len(buffer), total - start)]
        tensor.read(part, 0, 1, start)
        digest.update(part.view(torch.uint8).numpy().data)
        if counter:
            counter.add(part.nbytes)
    return digest.hexdigest()


@torch.no_grad()
def _our_logits(files: ModelFiles, ids: Tensor) -> Tensor:
    return load_model(files, "cpu", torch.float32, document_mask=False)(ids)
