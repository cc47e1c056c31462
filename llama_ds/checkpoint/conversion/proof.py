"""Verification that a conversion's result equals its source: shapes, a hash of every weight read back, logits.

Hashes are 128-bit XXH3 of each unsharded weight in this project's layout and the result's dtype. The source's values,
rounded to that dtype, are compared with those that the result's own reader returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import xxhash
from torch import Tensor

from llama_ds.checkpoint.conversion.convert import Counter, Options, Progress, run_all
from llama_ds.checkpoint.conversion.digest import Digest, digest
from llama_ds.checkpoint.formats.folded import exactly_folded
from llama_ds.checkpoint.formats.inventory import shown
from llama_ds.checkpoint.load_model import load_model
from llama_ds.checkpoint.manifest import name_of
from llama_ds.checkpoint.names import hf_name
from llama_ds.checkpoint.weights import DTYPES, ModelFiles, Readable
from llama_ds.errors import UserError
from llama_ds.layout.weights import Key, weight_shapes

PROMPT_TOKENS = 32
# Relative to the largest logit: two libraries that compute one model in fp32 sum in different orders. Heads in the
# wrong rotary layout, or a wrong theta, cause differences more than a hundred times as large.
TOLERANCE = 1e-3

Rounded = Callable[[Readable, Readable], Readable]  # source and result -> the source's values as the result holds them
Pairs = dict[Key, tuple[Digest, Digest]]  # those of source and result
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
    rounded: tuple[str, ...] = ()  # weights that are stored in a wider dtype than the source's, and were rounded
    not_finite: tuple[str, ...] = ()  # weights with NaN or infinite elements, with their numbers

    def lines(self) -> list[str]:
        """Return the findings as lines of text."""
        logits = "skipped (--no-logits)"
        if self.not_finite:
            logits = "skipped, because some weights are not finite"
        if self.max_difference is not None:
            logits = (
                f"max abs difference {self.max_difference:.3g} of {self.largest:.3g} on {PROMPT_TOKENS} fixed ids, fp32"
            )
        found = [
            f"proof   tensors {self.tensors} of {self.tensors}, {self.parameters} parameters, all shapes equal",
            f"proof   hash    source as {self.dtype} {self.source_hash}",
            f"proof   hash    result {' ' * len(self.dtype)}    {self.result_hash}",
            f"proof   logits  {logits}",
        ]
        if self.rounded:
            found.append(
                f"proof   rounded {len(self.rounded)} of {self.tensors} tensors, stored in a wider dtype, to "
                f"{self.dtype} ({shown(self.rounded)}); --dtype fp32 keeps every bit"
            )
        if self.not_finite:
            found.append(f"proof   not finite, copied as they are: {', '.join(self.not_finite)}")
        return found


def prove(
    source: ModelFiles,
    result: ModelFiles,
    options: Options,
    progress: Progress,
    with_logits: bool = True,
    original: ModelFiles | None = None,
    logits_of_result: Logits | None = None,
    rounded: Rounded = lambda source, result: source,
) -> Proof:
    """Compare the result of a conversion with its source.

    Args:
        original: the source before factors were folded into its weights, which has the same logits.
        rounded: applies what the result's format rounds besides the dtype, which is quantization.
        logits_of_result: computes logits with the library that the result is meant for; None: this project's model.

    Raises:
        UserError: they differ; the message names the tensor or the logits.
    """
    _compare_shapes(source, result)
    pairs = _compare_digests(source, result, rounded, options, progress)
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in result.tensors.values())
    proof = Proof(
        len(result.tensors),
        parameters,
        result.dtype,
        *_combined(result, pairs),
        rounded=_rounded(source, pairs),
        not_finite=_not_finite(source, pairs),
    )
    if proof.not_finite and not options.allow_nonfinite:
        raise UserError(
            f"{source.path}: {len(proof.not_finite)} of its tensors hold numbers that are not finite "
            f"({shown(proof.not_finite)}): the model is damaged; --allow-nonfinite converts it as it is"
        )
    if proof.not_finite or not with_logits:
        return proof
    ids = prompt(source)
    expected = _our_logits(original if original and exactly_folded(original.model, result.dtype) else source, ids)
    found = logits_of_result(result.path, ids) if logits_of_result else _our_logits(result, ids)
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    exact = result.dtype in DTYPES and not any(before.rounded for before, _ in pairs.values())
    if exact and not difference <= TOLERANCE * max(largest, 1.0):
        raise UserError(
            f"{result.path}: its logits differ from those of {source.path} by {difference:.3g} of {largest:.3g}; "
            "this is an error of the conversion: report it with both configurations"
        )
    return replace(proof, max_difference=difference, largest=largest)


def prompt(files: ModelFiles) -> Tensor:
    """Return the fixed ids (1, T), spread over the vocabulary."""
    length = min(PROMPT_TOKENS, files.seq_len)
    return (torch.arange(length) * 7919 + 1).remainder(files.model.vocab_size)[None]


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


def _compare_digests(
    source: ModelFiles, result: ModelFiles, rounded: Rounded, options: Options, progress: Progress
) -> Pairs:
    """Return the digests of every weight in source and result, in the result's dtype.

    Raises:
        UserError: a weight differs.
    """
    total = sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in result.tensors.values())
    counter = Counter(progress, "prove", total)
    pairs: Pairs = {}

    def compare(key: Key) -> None:
        after = result.tensors[key]
        before = rounded(source.tensors[key], after)
        converted = before.dtype != after.dtype
        pairs[key] = digest(before, after.dtype, converted), digest(after, after.dtype, converted, counter.add)
        if pairs[key][0].hash != pairs[key][1].hash:
            raise UserError(f"{result.path}: {name_of(key)} differs from that of {source.path}; {_AGAIN}")

    run_all((partial(compare, key) for key in result.tensors), options.workers, counter)
    return pairs


def _combined(result: ModelFiles, pairs: Pairs) -> tuple[str, str]:
    """Return one hash over those of all weights, for source and result."""
    combined = [xxhash.xxh3_128(), xxhash.xxh3_128()]
    for key in weight_shapes(result.model):  # the order is the same for all formats, so equal models have equal hashes
        for hasher, found in zip(combined, pairs[key], strict=True):
            hasher.update(f"{name_of(key)}:{found.hash}\n".encode())
    return combined[0].hexdigest(), combined[1].hexdigest()


def _rounded(source: ModelFiles, pairs: Pairs) -> tuple[str, ...]:
    """Return the weights that lost bits although their dtype is not the one that the model has by default."""
    usual, layers = DTYPES[source.dtype], source.model.num_hidden_layers
    changed = [key for key, (before, _) in pairs.items() if before.rounded and source.tensors[key].dtype != usual]
    return tuple(hf_name(*key, layers) for key in sorted(changed))


def _not_finite(source: ModelFiles, pairs: Pairs) -> tuple[str, ...]:
    layers = source.model.num_hidden_layers
    return tuple(
        f"{hf_name(*key, layers)}: {before.nan} NaN, {before.infinite} infinite"
        for key, (before, _) in sorted(pairs.items())
        if before.nan or before.infinite
    )


_AGAIN = "the disk or the source changed during the conversion: remove the folder and convert again"


@torch.no_grad()
def _our_logits(files: ModelFiles, ids: Tensor) -> Tensor:
    return load_model(files, "cpu", torch.float32, document_mask=False)(ids)
