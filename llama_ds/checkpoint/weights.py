"""The weights of a model in files of any supported format: this project's checkpoints and others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from llama_ds.checkpoint.carried import TOKENIZER, TOKENIZER_FILES, TOKENIZER_JSON
from llama_ds.checkpoint.manifest import DESCRIPTION, WEIGHT, Description, describe, read_tensors
from llama_ds.config.document_marks import LLAMA_MARKS, DocumentMarks
from llama_ds.config.reader import ConfigSource, read
from llama_ds.config.schema import ModelConfig, TrainingConfig
from llama_ds.errors import UserError
from llama_ds.layout.optimizer_states import MASTER
from llama_ds.layout.weights import Key, weight_shapes

T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by their short names


class Readable(Protocol):
    """Interface of a weight stored in files, as implemented by `llama_ds.checkpoint.spread.Spread`."""

    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""

    @property
    def paths(self) -> set[str]:
        """The files that hold it."""

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the unsharded tensor, in `dtype` or as stored."""

    def read(self, out: Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        """Fill `out` with elements of the shard of tensor-parallel rank `rank` of `size`, from `start` on.

        Shards of rows have R / size of them, rounded up; rows beyond the tensor's R are zeros.
        """


@dataclass(frozen=True)
class ModelFiles:
    """The weights of one model in files, with the model's configuration."""

    path: str
    model: ModelConfig
    seq_len: int  # longest sequence that the model was trained for
    dtype: str  # key of DTYPES: the dtype of forward and backward, and the default of a conversion
    # The keys are those of `layout.weights.weight_shapes(model)`; the values have the rotary layout of this project.
    tensors: Mapping[Key, Readable]
    tokenizer: str | None  # path of the tokenizer, if there is one
    document_mask: bool = False  # True: in training, attention stayed inside the documents of a row
    initializer_range: float = TrainingConfig.initializer_range  # standard deviation of the initial weights
    bos_id: int | None = None  # the tokenizer's, as far as the files say
    eos_id: int | None = None
    hf_config: Mapping[str, Any] = field(default_factory=dict)  # config.json, where the weights came from one
    masters: Mapping[Key, Readable] | None = None  # fp32, of the optimizer; rounded to `dtype` they equal `tensors`
    notes: tuple[str, ...] = ()  # what reading dropped, ignored or chose, each a line for the user

    @property
    def from_hf(self) -> bool:
        """Whether the weights, and the files beside them, came from a Hugging Face folder."""
        return "model_type" in self.hf_config

    @property
    def marks(self) -> DocumentMarks:
        """The ids between the documents of the training rows."""
        return LLAMA_MARKS if self.eos_id is None else DocumentMarks(self.bos_id, self.eos_id)

    @property
    def finest(self) -> Mapping[Key, Readable]:
        """The weights at the highest precision that the files hold: the fp32 masters if there are some."""
        return self.tensors if self.masters is None else self.masters

    def layer(self, layer: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the unsharded weights of one layer by local name."""
        return {name: stored.whole(dtype) for (index, name), stored in self.tensors.items() if index == layer}

    def layers(self) -> Iterator[int]:
        """Yield the indices of the layers in order."""
        yield from sorted({index for index, _ in self.tensors})


def tokenizer_in(folder: str) -> str | None:
    """Return the path of a model folder's tokenizer, if it has one; of two the one that Meta's format takes, too."""
    paths = (os.path.join(folder, name) for name in (TOKENIZER, TOKENIZER_JSON))
    return next((path for path in paths if os.path.exists(path)), None)


def tokenizer_copies(files: ModelFiles) -> dict[str, str]:
    """Return the files of a model's tokenizer, by name in the copy."""
    if files.tokenizer is None:
        return {}
    name = os.path.basename(files.tokenizer)
    names = TOKENIZER_FILES[1:] if name == TOKENIZER_JSON else (name,)
    paths = {name: os.path.join(files.path, name) for name in names}
    return {name: path for name, path in paths.items() if os.path.exists(path)}


def open_checkpoint(folder: str) -> ModelFiles:
    """Return the weights of a checkpoint of this project: those of forward and backward, and the fp32 masters.

    ZeRO-3 checkpoints hold only fp32 masters; rounded, these equal the weights used in forward and backward.

    Raises:
        UserError: the checkpoint is damaged.
    """
    description = describe(folder)
    kinds = read_tensors(folder, description, (WEIGHT, MASTER))
    if not kinds:
        raise UserError(f"{folder}: holds no weights; use another checkpoint")
    return ModelFiles(
        path=folder,
        model=description.model,
        seq_len=_run_value(folder, description, "data.seq_len", int, None),
        dtype=description.dtype,
        tensors=kinds.get(WEIGHT) or kinds[MASTER],
        tokenizer=tokenizer_in(folder),
        document_mask=_run_value(folder, description, "data.document_mask", bool, False),
        initializer_range=_run_value(
            folder, description, "training.initializer_range", float, ModelFiles.initializer_range
        ),
        bos_id=description.bos_id,
        eos_id=description.eos_id,
        hf_config=description.hf_config,
        masters=kinds.get(MASTER),
    )


def for_dtype(files: ModelFiles, dtype: str) -> ModelFiles:
    """Return the weights from which a result of `dtype` is made: for fp32 the masters of a checkpoint, if it has some.

    A note says which weights of a checkpoint were taken, if it was trained in another dtype.
    """
    if dtype != "fp32" or files.dtype == "fp32" or not os.path.exists(os.path.join(files.path, DESCRIPTION)):
        return files
    if files.masters is None:
        return replace(files, notes=(*files.notes, f"taken: {files.dtype} weights; the checkpoint holds no masters"))
    note = f"taken: fp32 masters, of which the {files.dtype} weights are roundings"
    if next(iter(files.masters.values())).dtype != torch.float32:
        note = f"taken: {files.dtype} weights, which are their own masters; no compensation was added"
    notes = (*files.notes, note)
    return replace(files, tensors=files.masters, dtype=dtype, notes=notes)


def _run_value(folder: str, description: Description, key: str, kind: type[T], default: T | None) -> T:
    """Return a value of the run that wrote a checkpoint; of a conversion, the run has only some sections."""
    section, name = key.split(".")
    keys = description.run.get(section, {})
    found = keys.get(name, default) if isinstance(keys, dict) else keys
    return read(kind, found, ConfigSource(os.path.join(folder, DESCRIPTION)), f"run.{key}")


def check_shapes(found: ModelFiles, wanted: ModelConfig) -> None:
    """Check that the weights found are those of the model `wanted`.

    Raises:
        UserError: a weight is missing, unexpected or of another shape; the message names the first.
    """
    shapes = weight_shapes(wanted)
    for key in {**shapes, **found.tensors}:
        here, there = shapes.get(key), found.tensors[key].shape if key in found.tensors else None
        if here != there:
            shown = [f"has shape {list(shape)}" if shape else "is not there" for shape in (there, here)]
            raise UserError(
                f"{found.path}: layer {key[0]} {key[1]} {shown[0]}, in the run's model it {shown[1]}; "
                f"{_other_vocabulary(found, wanted) or 'set the model of the run file to the shape of these weights'}"
            )


def _other_vocabulary(found: ModelFiles, wanted: ModelConfig) -> str:
    """Return what to do if a model differs from the run's only in the rows of its vocabulary tables; else nothing."""
    rows = found.model.vocab_size
    if weight_shapes(replace(wanted, vocab_size=rows)) != {key: t.shape for key, t in found.tensors.items()}:
        return ""
    return (
        f"set model.vocab_size={rows}, which may exceed the ids of the tokenizer, or resize the tables with "
        f"tools/convert.py {found.path} NEW --to deepspeed --vocab-size {wanted.vocab_size} and start from NEW"
    )
