"""The manifest of a checkpoint: its description, a checksum of every file, and the location of every tensor.

A checkpoint is a folder. DeepSpeed's own files hold the tensor data; beside them are

- `llama_ds.json`: the description, with the size and checksum of every other file, and a checksum of itself;
- `index.json`: for every weight and each of its kinds (WEIGHT and the optimizer states), its runs of elements with
  file and byte offset. Any layout can thus read exactly the elements that it needs, without unpickling anything.

Each rank lists the files and tensors that it wrote in a record; the committing rank merges the records.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, get_type_hints

import torch
import xxhash

from llama_ds.atomic_files import write_atomically
from llama_ds.checkpoint.carried import carried_files
from llama_ds.checkpoint.spread import Run, Spread
from llama_ds.checkpoint.stored import Stored
from llama_ds.config.document_marks import LLAMA_MARKS
from llama_ds.config.moved_keys import renamed_data
from llama_ds.config.reader import ConfigSource, read
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError
from llama_ds.layout.optimizer_states import OptimizerStates, states_by_name
from llama_ds.layout.weights import Key, Weight, weights

DESCRIPTION = "llama_ds.json"
INDEX = "index.json"
FORMAT = 2
WEIGHT = "weight"  # kind of the weights used in forward and backward; the other kinds are optimizer states
READ_BYTES = 1 << 20  # small enough that a chunk is still in the CPU cache when it is hashed


class FileEntry(NamedTuple):
    """A file of a checkpoint."""

    size: int  # bytes
    checksum: str  # 128-bit XXH3 over the entire file
    rank: int  # the global rank that wrote it


class StoredPiece(NamedTuple):
    """A run of consecutive elements of a tensor-parallel part, stored in a file."""

    kind: str
    part: int
    start: int  # index of the first element within the part
    numel: int
    file: str
    offset: int  # bytes
    dtype: str  # torch's name: float32

    @property
    def end(self) -> int:
        """Index after the last element."""
        return self.start + self.numel


@dataclass
class Record:
    """The files and tensors that one rank wrote."""

    rank: int
    files: dict[str, FileEntry] = field(default_factory=dict)
    pieces: dict[str, list[StoredPiece]] = field(default_factory=dict)  # by name of the weight (`name_of`)

    def as_json(self) -> str:
        """Return the record as JSON text."""
        return json.dumps({"rank": self.rank, "files": self.files, "pieces": self.pieces})

    @staticmethod
    def from_json(text: str) -> Record:
        """Return the record that `as_json` wrote."""
        found = json.loads(text)
        files = {name: FileEntry(*entry) for name, entry in found["files"].items()}
        pieces = {name: [StoredPiece(*piece) for piece in rows] for name, rows in found["pieces"].items()}
        return Record(found["rank"], files, pieces)


@dataclass(frozen=True)
class Description:
    """What a checkpoint is: enough to resume or convert it without the run file that made it."""

    step: int
    tokens: int
    zero_stage: int
    dtype: str  # dtype of the weights used in forward and backward: bf16 | fp32
    layout: dict[str, int]
    run: dict[str, Any]  # the resolved run
    data: dict[str, Any] = field(default_factory=dict)  # `llama_ds.data.mixture.DataState`
    optimizer_steps: int | None = None  # Adam's own count, without skipped non-finite steps; None: weights only
    # A run has no random state that advances: initial weights are a function of (seed, layer, name, block) and rows of
    # (seed, row), so the seed suffices.
    rng: dict[str, int] = field(default_factory=dict)
    rewinds: list[dict[str, int]] = field(default_factory=list)  # rewinds of the run before this step: {to, id}
    # The tokenizer's; checkpoints from before these keys have LLaMA's.
    bos_id: int | None = LLAMA_MARKS.bos
    eos_id: int | None = LLAMA_MARKS.eos
    # Of converted weights: the config.json of the Hugging Face folder, or token ids given for one of Meta's.
    hf_config: dict[str, Any] = field(default_factory=dict)
    fp8_history: list[str] = field(default_factory=list)  # state of delayed scaling, `llama_ds.model.fp8_delayed`
    config_hash: str = ""  # hash of `run`, filled in by `write_manifest`
    files: dict[str, FileEntry] = field(default_factory=dict)  # filled in by `write_manifest`
    format: int = FORMAT

    @cached_property
    def model(self) -> ModelConfig:
        """The shape of the model."""
        return read(ModelConfig, self.run.get("model"), ConfigSource(DESCRIPTION), "run.model")

    @property
    def states(self) -> OptimizerStates:
        """The states that the run's optimizer keeps for each weight."""
        given = {"name": "adamw", **self.run.get("optimizer", {})}
        return states_by_name(**{key: given[key] for key in ("name", "state_dtype", "masters") if key in given})


def name_of(key: Key) -> str:
    """Return a weight's name in the index: "3.mlp.up_proj.weight"."""
    return f"{key[0]}.{key[1]}"


def hash_of(run: Mapping[str, Any]) -> str:
    """Return a short hash of a resolved run."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(folder: str, description: Description, records: Iterable[Record]) -> Description:
    """Write the index and, last, the description; return the completed description. All files are durable on return.

    Raises:
        ValueError: the records do not cover every element of every weight exactly once.
    """
    files: dict[str, FileEntry] = {}
    pieces: dict[str, list[StoredPiece]] = {}
    for record in records:
        files.update(record.files)
        for name, rows in record.pieces.items():
            pieces.setdefault(name, []).extend(rows)
    _check_cover(description, pieces)
    index = json.dumps(pieces, separators=(",", ":"))
    write_durably(os.path.join(folder, INDEX), index)
    files[INDEX] = FileEntry(len(index.encode()), _checksum_of(index.encode()), 0)
    for name, path in carried_files(folder).items():
        files[name] = FileEntry(os.path.getsize(path), checksum(path), 0)
    description = replace(description, files=files, config_hash=hash_of(description.run))
    content = json.loads(json.dumps(asdict(description)))  # in the form in which it will be read
    content["checksum"] = _checksum_of(_canonical(content))
    write_durably(os.path.join(folder, DESCRIPTION), json.dumps(content, indent=1))
    return description


def describe(folder: str) -> Description:
    """Read the description of a checkpoint folder. Renamed keys in its run are translated to their present names.

    Raises:
        UserError: the description is missing, damaged, or of an unsupported version.
    """
    path = os.path.join(folder, DESCRIPTION)
    if not os.path.exists(path):
        raise UserError(
            f"{folder}: contains no {DESCRIPTION}, so it is not a complete checkpoint of llama_ds; "
            "give a folder such as runs/NAME/checkpoints/step_00000100"
        )
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        version = content.get("format", 1)
        if version == FORMAT:
            wanted = content.pop("checksum")
            if wanted != _checksum_of(_canonical(content)):
                raise ValueError("its checksum does not match")
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); use another checkpoint, or copy this one again") from None
    if version != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {version}, this version reads {FORMAT}; resume with the version that wrote it, "
            "or convert its weights there (tools/convert.py) and start from them"
        )
    return description_from(content, ConfigSource(path))


def check_present(folder: str, description: Description) -> None:
    """Check that every file of a checkpoint exists at its full size.

    Raises:
        UserError: one does not; the message names the first.
    """
    for name, entry in description.files.items():
        path = os.path.join(folder, name)
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise UserError(f"{path}: is missing ({error.strerror}), {_DAMAGED}") from None
        if size != entry.size:
            raise UserError(f"{path}: is {size} bytes, not {entry.size}, {_DAMAGED}")


def verify(folder: str, description: Description, names: Iterable[str]) -> None:
    """Read the files `names` of a checkpoint and verify their checksums.

    Raises:
        UserError: one differs; the message names the first.
    """
    for name in names:
        path = os.path.join(folder, name)
        try:
            found = checksum(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}), {_DAMAGED}") from None
        if found != description.files[name].checksum:
            raise UserError(
                f"{path}: its bytes have checksum {found}, not {description.files[name].checksum}, {_DAMAGED}"
            )


_DAMAGED = "the checkpoint is damaged; copy it again, or use another"


def read_tensors(folder: str, description: Description, kinds: Iterable[str]) -> dict[str, dict[Key, Spread]]:
    """Return the tensors of a checkpoint by kind and weight, for each of `kinds` the weights that have it.

    Raises:
        UserError: the index is damaged.
    """
    path = os.path.join(folder, INDEX)
    try:
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
        found: dict[str, dict[Key, Spread]] = {}
        for key, weight in weights(description.model):
            pieces = [_stored_piece(row) for row in rows[name_of(key)]]
            held = _held(weight, description)
            for kind in kinds:
                parts = _parts([p for p in pieces if p.kind == kind])
                if parts:
                    _check_parts(parts, held, key, kind)
                    runs = [[Run(p.start, _stored(folder, p), p.numel) for p in part] for part in parts]
                    found.setdefault(kind, {})[key] = Spread(weight.shape(description.model), weight.cut, runs)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); use another checkpoint, or copy this one again") from None
    return found


def checksum(path: str) -> str:
    """Return the checksum of a file's bytes."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def write_durably(path: str, text: str) -> None:
    """Write a small file atomically. It is durable on return."""
    write_atomically(path, text, durable=True)
    sync(os.path.dirname(path))


def sync(path: str) -> None:
    """Make a folder's entries, or a file's bytes, durable."""
    entry = os.open(path, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)


_KINDS: dict[str, Any] = {  # types of the description's fields, as its JSON text holds them
    **dict.fromkeys(("step", "tokens", "zero_stage", "format"), int),
    **dict.fromkeys(("dtype", "config_hash"), str),
    **dict.fromkeys(("run", "data", "hf_config"), dict[str, object]),
    **dict.fromkeys(("layout", "rng"), dict[str, int]),
    "optimizer_steps": int | None,
    "rewinds": tuple[dict[str, int], ...],
    "fp8_history": tuple[str, ...],
    "bos_id": int | None,
    "eos_id": int | None,
    "files": dict[str, tuple[int, str, int]],
}
_PIECE_KINDS = list(get_type_hints(StoredPiece).values())


def description_from(content: Mapping[str, Any], source: ConfigSource) -> Description:
    """Return the description that a JSON object holds, without fields that are not known.

    Raises:
        UserError: a field is missing or has another type.
    """
    found: dict[str, Any] = {}
    for known in fields(Description):
        if known.name in content:
            found[known.name] = read(_KINDS[known.name], content[known.name], source, known.name)
        elif known.default is MISSING and known.default_factory is MISSING:
            raise source.error(known.name, f"is missing, {_DAMAGED}")
    found["run"] = renamed_data(found["run"], source)
    if "model" in found["run"]:
        read(ModelConfig, found["run"]["model"], source, "run.model")
    for name in ("rewinds", "fp8_history"):
        found[name] = list(found.get(name, ()))
    found["files"] = {name: FileEntry(*entry) for name, entry in found.get("files", {}).items()}
    return Description(**found)


def _stored_piece(row: list[Any]) -> StoredPiece:
    if list(map(type, row)) == _PIECE_KINDS:  # not by `read`, because there may be a million rows
        piece = StoredPiece(*row)
        if piece.offset >= 0 and isinstance(getattr(torch, piece.dtype, None), torch.dtype):
            return piece
    raise ValueError(f"{row} is not the location of a tensor")


def _stored(folder: str, piece: StoredPiece) -> Stored:
    return Stored(os.path.join(folder, piece.file), piece.offset, getattr(torch, piece.dtype), (piece.numel,))


def _parts(pieces: list[StoredPiece]) -> list[list[StoredPiece]]:
    """Return the pieces of one weight and kind for each part that has some, in the order of their elements."""
    ordered = sorted(pieces, key=lambda p: (p.part, p.start))
    return [list(part) for _, part in groupby(ordered, key=lambda p: p.part)]


def _held(weight: Weight, description: Description) -> list[int]:
    """Return the number of elements of each part of a weight, without the padding of the vocabulary."""
    parts = description.layout["tp"] if weight.cut is not None else 1
    return [weight.own_numel(description.model, part, parts) for part in range(parts)]


def _check_parts(parts: list[list[StoredPiece]], held: list[int], key: Key, kind: str) -> None:
    """Raise ValueError unless there are parts 0, 1, ... with the numbers of elements `held`, each exactly once."""
    if [part[0].part for part in parts] != list(range(len(held))):
        raise ValueError(f"{name_of(key)}: {len(parts)} parts of its {kind} were written, not {len(held)}")
    for part, numel in zip(parts, held, strict=True):
        ends = [0, *(p.end for p in part)]
        if [p.start for p in part] != ends[:-1] or ends[-1] != numel:
            raise ValueError(f"{name_of(key)}: the elements of its {kind} were not written exactly once")


def _check_cover(description: Description, pieces: Mapping[str, list[StoredPiece]]) -> None:
    """Check that every saved kind covers all elements of all TP parts of every weight that has it, exactly once."""
    kinds = {p.kind for rows in pieces.values() for p in rows} or {WEIGHT}
    for key, weight in weights(description.model):
        held = _held(weight, description)
        for kind in kinds:
            wanted = held if kind in (WEIGHT, *description.states.kinds(weight.role)) else []
            parts = _parts([p for p in pieces.get(name_of(key), ()) if p.kind == kind])
            _check_parts(parts, wanted, key, kind)


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _checksum_of(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()
