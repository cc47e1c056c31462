"""What a model folder must hold: its files, every tensor of the model's shape, and none that the model has not."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from llama_ds.checkpoint.formats.views import TableRows
from llama_ds.checkpoint.weights import DTYPES, ModelFiles, Readable, tokenizer_in
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError
from llama_ds.layout.weights import Key, Role, weight_of, weight_shapes, weights

MOST_LAYERS = 10_000  # more is a damaged number: the list of their tensors would not end
SHOWN = 3  # of the tensors that an error is about


def check_file(path: str) -> str:
    """Return `path`, a file that is there.

    Raises:
        UserError: it is missing, a link to nothing or to itself, or no regular file.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); copy the model again, with all its files"
        ) from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is not a regular file; copy the model again")
    return path


def check_layers(path: str, model: ModelConfig) -> None:
    """Check that the number of layers in the file `path` is one that a model may have.

    Raises:
        UserError: it is so large that it must be damaged.
    """
    if model.num_hidden_layers > MOST_LAYERS:
        raise UserError(f"{path}: num_hidden_layers = {model.num_hidden_layers} is above {MOST_LAYERS}; copy it again")


def check_names(path: str, wanted: Collection[str], found: Collection[str]) -> None:
    """Check that a folder has all tensors that its model wants, and no others.

    Raises:
        UserError: with their count and the first few names.
    """
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(f"{path}: {_some(missing)} missing of {len(wanted)}; the model is incomplete: copy it again")
    known = set(wanted)
    foreign = [name for name in found if name not in known]
    if foreign:
        raise UserError(
            f"{path}: {_some(foreign)} unknown to a LLaMA of this configuration; give the folder of a plain LLaMA "
            "(adapters merged, no other heads)"
        )


def check_shape(path: str, name: str, found: tuple[int, ...], wanted: tuple[int, ...], config: str) -> None:
    """Check that a tensor has the shape that the file `config` gives it.

    Raises:
        UserError: naming tensor and shapes.
    """
    if found != wanted:
        raise UserError(
            f"{path}: tensor {name} has shape {list(found)}, {config} makes it {list(wanted)}: "
            "the weights are of another model, or not all there; copy both from one place"
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
    """Return the model of a folder, its tensors checked against its configuration.

    Args:
        where: the path that messages about tensors name.
        config: name of the file that says the model's shape.
        names: of the tensors in the folder.
        vocab_size: rows to give the tables of the vocabulary; None: they must be as many as `config` says.

    Raises:
        UserError: naming the first that differs.
    """
    if vocab_size is not None:
        model, tensors = with_vocabulary(model, tensors, vocab_size)
    _check_tensors(where, tensors, model, names, config)
    return ModelFiles(folder, model, seq_len, _dtype_of(folder, tensors), tensors, tokenizer_in(folder))


def _check_tensors(
    path: str, tensors: Mapping[Key, Readable], model: ModelConfig, names: Mapping[Key, str], config: str
) -> None:
    """Check the shapes of a model's tensors. `names` are those in the folder.

    Raises:
        UserError: naming the first that differs, for a vocabulary with the flag that mends it.
    """
    for key, wanted in weight_shapes(model).items():
        found, name = tensors[key].shape, names[key]
        if key in vocabulary_tables(model) and found[1:] == wanted[1:] and found[0] != wanted[0]:
            raise UserError(
                f"{path}: {name} has {found[0]} rows, {config} has vocab_size = {wanted[0]}; convert with "
                f"--vocab-size {found[0]} or --vocab-size {wanted[0]}: rows that lack become zeros, others are cut"
            )
        check_shape(path, name, found, wanted, config)


def _dtype_of(path: str, tensors: Mapping[Key, Readable]) -> str:
    """Return the name of the dtype of a model's matrices.

    Raises:
        UserError: it is none that a model is trained in.
    """
    stored = next(tensor.dtype for (_, name), tensor in tensors.items() if weight_of(name).role is Role.HIDDEN_MATRIX)
    for name, dtype in DTYPES.items():
        if stored == dtype:
            return name
    raise UserError(f"{path}: its weights are {str(stored).removeprefix('torch.')}, not one of {', '.join(DTYPES)}")


def vocabulary_tables(model: ModelConfig) -> tuple[Key, ...]:
    """Return the keys of the tables with a row for each id of the vocabulary."""
    return tuple(key for key, weight in weights(model) if weight.role in (Role.EMBEDDING, Role.HEAD))


def with_vocabulary(
    model: ModelConfig, tensors: Mapping[Key, Readable], vocab_size: int
) -> tuple[ModelConfig, dict[Key, Readable]]:
    """Return model and tensors with `vocab_size` rows in their tables: zeros added at the end, or rows left out."""
    tables = {key: TableRows(tensors[key], vocab_size) for key in vocabulary_tables(model)}
    return replace(model, vocab_size=vocab_size), {**tensors, **tables}


def same(first: Readable, second: Readable, elements: int = 4 << 20) -> bool:
    """Tell whether two tensors of one shape and dtype are bit for bit equal, reading no further than they are."""
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


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({shown}) {'is' if len(names) == 1 else 'are'}"
