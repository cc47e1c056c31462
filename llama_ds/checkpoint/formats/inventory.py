"""Checks of a model folder: all files exist, and its tensors are exactly those of the model, each of its shape."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch

from llama_ds.checkpoint.formats.views import TableRows
from llama_ds.checkpoint.spread import Run, Spread
from llama_ds.checkpoint.stored import Stored
from llama_ds.checkpoint.weights import DTYPES, ModelFiles, Readable, tokenizer_in
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError
from llama_ds.layout.weights import Key, Role, weight_of, weight_shapes, weights

MAX_LAYERS = 10_000  # a larger number is taken for damage: listing its tensors would exhaust memory
LFS_POINTER, LFS_POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024  # beginning and limit of size
DISTINCT_ELEMENTS = 1024  # number of elements at the beginning of two parts by which most are told apart
MAX_SHOWN = 3  # number of tensors that an error message names


def check_file(path: str) -> str:
    """Return `path`, checked to be an existing regular file.

    Raises:
        UserError: it is missing, a broken link, not a regular file, or a pointer to it in git-lfs.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); copy the model again, with all its files"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: is not a regular file; copy the model again")
    if found.st_size < LFS_POINTER_BYTES and _is_lfs_pointer(path):
        raise UserError(
            f"{path}: is a pointer of git-lfs, and the file itself was not downloaded; run `git lfs pull` in the folder"
        )
    return path


def _is_lfs_pointer(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False  # whoever reads the file reports it


def check_layers(path: str, model: ModelConfig) -> None:
    """Check that the number of layers in the file `path` is plausible.

    Raises:
        UserError: it exceeds MAX_LAYERS.
    """
    if model.num_hidden_layers > MAX_LAYERS:
        raise UserError(f"{path}: num_hidden_layers = {model.num_hidden_layers} is above {MAX_LAYERS}; copy it again")


def check_names(path: str, wanted: Collection[str], found: Collection[str]) -> None:
    """Check that the tensors found are exactly those wanted.

    Raises:
        UserError: tensors are missing or unknown; the message has their count and the first few names.
    """
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(
            f"{path}: {some_tensors(missing)} missing of {len(wanted)}; the model is incomplete: copy it again"
        )
    known = set(wanted)
    foreign = [name for name in found if name not in known]
    if foreign:
        raise UserError(
            f"{path}: {some_tensors(foreign)} unknown to a LLaMA of this configuration; give the folder of a plain "
            "LLaMA (adapters merged, no other heads)"
        )


def check_shape(path: str, name: str, found: tuple[int, ...], wanted: tuple[int, ...], config: str) -> None:
    """Check that a tensor has the shape that follows from the file `config`.

    Raises:
        UserError: it has another; the message names the tensor and both shapes.
    """
    if found != wanted:
        raise UserError(
            f"{path}: tensor {name} has shape {list(found)}, {config} implies {list(wanted)}: "
            "the weights belong to another model or are incomplete; copy both from one release"
        )


def model_files(
    folder: str,
    where: str,
    config: str,
    names: Mapping[Key, str],
    model: ModelConfig,
    seq_len: int,
    tensors: Mapping[Key, Readable],
    vocab_size: int | None,
) -> ModelFiles:
    """Return the model of a folder, with its tensors checked against its configuration.

    Args:
        where: the path to name in messages about tensors.
        config: name of the configuration file, for messages.
        names: names of the tensors in the folder, for messages.
        vocab_size: rows of the vocabulary tables; missing rows become zeros. None: as many as `config` says.

    Raises:
        UserError: a tensor has an unexpected shape or dtype; the message names the first.
    """
    if vocab_size is not None:
        model, tensors = with_vocabulary(model, tensors, vocab_size)
    _check_tensors(where, tensors, model, names, config)
    return ModelFiles(folder, model, seq_len, _dtype_of(folder, tensors), tensors, tokenizer_in(folder))


def _check_tensors(
    path: str, tensors: Mapping[Key, Readable], model: ModelConfig, names: Mapping[Key, str], config: str
) -> None:
    """Check the shapes of a model's tensors. `names` are their names in the folder.

    Raises:
        UserError: a shape differs; the message names the first, and for a vocabulary table the flag to use.
    """
    for key, wanted in weight_shapes(model).items():
        found, name = tensors[key].shape, names[key]
        if key in vocabulary_tables(model) and found[1:] == wanted[1:] and found[0] != wanted[0]:
            raise UserError(
                f"{path}: {name} has {found[0]} rows, {config} has vocab_size = {wanted[0]}; convert with "
                f"--vocab-size {found[0]} or --vocab-size {wanted[0]}: missing rows become zeros, others are dropped"
            )
        check_shape(path, name, found, wanted, config)


def _dtype_of(path: str, tensors: Mapping[Key, Readable]) -> str:
    """Return the short name of the dtype that most elements of a model's hidden matrices have.

    Raises:
        UserError: the dtype is not one of DTYPES.
    """
    elements: Counter[torch.dtype] = Counter()
    for (_, name), tensor in tensors.items():
        if weight_of(name).role is Role.HIDDEN_MATRIX:
            elements[tensor.dtype] += torch.Size(tensor.shape).numel()
    ((stored, _),) = elements.most_common(1)
    for name, dtype in DTYPES.items():
        if stored == dtype:
            return name
    name, known = str(stored).removeprefix("torch."), ", ".join(DTYPES)
    raise UserError(f"{path}: its weights are {name}, not one of {known}; save them as one of these")


def vocabulary_tables(model: ModelConfig) -> tuple[Key, ...]:
    """Return the keys of the weights with one row for each id of the vocabulary."""
    return tuple(key for key, weight in weights(model) if weight.role in (Role.EMBEDDING, Role.HEAD))


def with_vocabulary(
    model: ModelConfig, tensors: Mapping[Key, Readable], vocab_size: int
) -> tuple[ModelConfig, dict[Key, Readable]]:
    """Return model and tensors with vocabulary tables of `vocab_size` rows, padded with zeros or truncated."""
    tables = {key: TableRows(tensors[key], vocab_size) for key in vocabulary_tables(model)}
    return replace(model, vocab_size=vocab_size), {**tensors, **tables}


def same(first: Readable, second: Readable, elements: int = 4 << 20) -> bool:
    """Return whether two tensors are equal in shape, dtype and every bit; stop reading at the first difference."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    total = torch.Size(first.shape).numel()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.dtype.itemsize]
    for start in range(0, total, elements):
        parts = [torch.empty(min(elements, total - start), dtype=first.dtype) for _ in range(2)]
        for tensor, part in zip((first, second), parts, strict=True):
            tensor.read(part, 0, 1, start)
        if not torch.equal(parts[0].view(bits), parts[1].view(bits)):
            return False
    return True


def merged(
    name: str, parts: Sequence[Mapping[str, Stored]], paths: Sequence[str], dim: int | None, equal: bool = True
) -> Spread:
    """Return a tensor assembled from the parts of all ranks; `dim` None: it is unsharded, the first rank's is taken.

    Args:
        parts: the tensors of each rank's file by name, in the order of the ranks.
        paths: the paths of these files.
        equal: check that an unsharded tensor is equal in every part.

    Raises:
        UserError: the shapes, or the values of an unsharded tensor, differ between the parts, or two ranks have equal
            parts of a sharded one.
    """
    first = parts[0][name]
    for path, part in zip(paths, parts, strict=True):
        check_shape(path, name, part[name].shape, first.shape, os.path.basename(paths[0]))
    runs = [[Run(0, part[name], torch.Size(first.shape).numel())] for part in parts]
    if dim is not None and len(first.shape) != 2:
        raise UserError(f"{paths[0]}: tensor {name} has shape {list(first.shape)}, not that of a matrix; copy it again")
    if dim is None:
        full = Spread(first.shape, None, runs[:1])
        for path, run in zip(paths[1:], runs[1:], strict=True):
            if equal and not same(full, Spread(first.shape, None, [run])):
                raise UserError(f"{path}: {name} differs from that of {paths[0]}: parts of two models; copy it again")
        return full
    _check_distinct(name, [run.stored for (run,) in runs], paths)
    shape = tuple(n * len(parts) if i == dim else n for i, n in enumerate(first.shape))
    return Spread(shape, dim, runs)


def _check_distinct(name: str, parts: Sequence[Stored], paths: Sequence[str]) -> None:
    """Check that no two ranks have equal parts of a matrix, unless these are all zeros, as padding is.

    Ranks' files have one name in folders of their own, or nearly one name, so that a copy may overwrite another.
    """
    first: dict[bytes, int] = {}
    for rank, part in enumerate(parts):
        start = torch.empty(min(DISTINCT_ELEMENTS, torch.Size(part.shape).numel()), dtype=part.dtype)
        part.read(start)
        other = first.setdefault(start.view(torch.uint8).numpy().tobytes(), rank)
        if other == rank or not start.any():
            continue
        numel = torch.Size(part.shape).numel()
        before, after = (Spread(part.shape, None, [[Run(0, own, numel)]]) for own in (parts[other], part))
        if same(before, after):
            raise UserError(
                f"{paths[rank]}: {name} equals that of {paths[other]}, though each rank has its own part: one file was "
                "copied over the other; copy the model again"
            )


def shown(names: Sequence[str]) -> str:
    """Return the first few of some names, for a message."""
    return ", ".join(names[:MAX_SHOWN]) + (", ..." if len(names) > MAX_SHOWN else "")


def some_tensors(names: Sequence[str]) -> str:
    """Return the beginning of a sentence about tensors: their number, the first few names, and the verb."""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({shown(names)}) {'is' if len(names) == 1 else 'are'}"
