"""State dicts are copied and written to files that torch.load reads, and every tensor is located in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from commit_contents import KINDS, MOMENTS, SMALL, THREE, LiveRank
from torch import Tensor, nn

from llama_ds.checkpoint.manifest import WEIGHT, Record, StoredPiece
from llama_ds.checkpoint.snapshot import HostMemory, Located, Snapshot
from llama_ds.checkpoint.stored import Stored
from llama_ds.checkpoint.writing import write_rank
from llama_ds.layout.optimizer_states import MASTER

MODEL_FILE, OPTIMIZER_FILE = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
A, B, C = (0, "weight"), (1, "mlp.up_proj.weight"), (2, "norm.weight")


def written(folder: Path, files: Sequence[tuple[str, Any]], wanted: Sequence[Located]) -> Record:
    """Copy and write a rank's files; return its record."""
    write_rank(str(folder), 0, HostMemory().take(files, wanted))
    return Record.from_json((folder / "rank_00000.json").read_text())


def read(folder: Path, piece: StoredPiece) -> Tensor:
    """Read a tensor at its recorded location."""
    out = torch.empty(piece.numel, dtype=getattr(torch, piece.dtype))
    Stored(str(folder / piece.file), piece.offset, out.dtype, (piece.numel,)).read(out)
    return out


def same(left: Any, right: Any) -> bool:
    """Return whether two trees are equal, including the type of every container and the dtype of every tensor."""
    if isinstance(left, Tensor):
        equal = type(right) is Tensor and left.dtype == right.dtype and left.shape == right.shape
        return equal and torch.equal(left.detach(), right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def test_files_load_as_what_was_saved(tmp_path: Path) -> None:
    """Otherwise neither DeepSpeed nor torch.load could read the checkpoints of a run."""
    tree = {
        "module": OrderedDict(w=nn.Parameter(torch.randn(3, 5)), b=torch.arange(4, dtype=torch.bfloat16)),
        "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(4, 6).T}, "name": "adam"},
        "list": [torch.randn(2), (torch.ones(1, dtype=torch.int64), None, 3.5)],
        "shapes": [OrderedDict(w=torch.Size([3, 5]))],
        "flags": {"empty": torch.empty(0), "bool": torch.tensor([True, False]), "none": None},
    }
    other = {"optimizer_state_dict": {"flat": torch.randn(1000)}}
    record = written(tmp_path, [(MODEL_FILE, tree), (OPTIMIZER_FILE, other)], [])
    for name, content in ((MODEL_FILE, tree), (OPTIMIZER_FILE, other)):
        assert same(content, torch.load(tmp_path / name, weights_only=False))
        data = (tmp_path / name).read_bytes()
        assert record.files[name] == (len(data), xxhash.xxh3_128(data).hexdigest(), 0)
    assert record.pieces == {}


def test_pieces_are_at_their_recorded_locations(tmp_path: Path) -> None:
    """Otherwise another layout would read wrong elements."""
    flats = {kind: torch.randn(100) for kind in (MASTER, *MOMENTS)}
    weights = {A: torch.randn(4, 5).bfloat16(), B: torch.randn(8, 3).bfloat16(), C: torch.randn(7).bfloat16()}
    flat_weights = torch.randn(60).bfloat16()  # under ZeRO-1, weights are views of a flat buffer
    weights[B] = flat_weights[11:35].view(8, 3)
    module = {f"{layer}.{name}": weight for (layer, name), weight in weights.items()}
    optimizer = {"single_partition_of_fp32_groups": [flats[MASTER]], "base": {0: {k: flats[k] for k in MOMENTS}}}
    ranges = {A: (0, 20, 0), B: (20, 13, 11), C: (93, 7, 0)}  # begin in the flat buffers, count, start in the weight
    skipped = {A: 0, B: 0, C: 3}  # number of leading elements of a weight that are not indexed
    wanted = [Located(key, WEIGHT, 1, skipped[key], weight.view(-1)[skipped[key] :]) for key, weight in weights.items()]
    for kind, flat in flats.items():
        wanted += [Located(key, kind, 1, start, flat[b : b + n]) for key, (b, n, start) in ranges.items()]
    record = written(tmp_path, [(MODEL_FILE, {"module": module}), (OPTIMIZER_FILE, {"o": optimizer})], wanted)
    assert set(record.pieces) == {"0.weight", "1.mlp.up_proj.weight", "2.norm.weight"}
    for (layer, name), weight in weights.items():
        begin, count, start = ranges[layer, name]
        pieces = record.pieces[f"{layer}.{name}"]
        assert [piece.kind for piece in pieces] == [WEIGHT, MASTER, *MOMENTS] == list(KINDS)
        first = skipped[layer, name]
        assert torch.equal(read(tmp_path, pieces[0]), weight.view(-1)[first:])
        assert pieces[0][1:5] == (1, first, weight.numel() - first, MODEL_FILE) and pieces[0].dtype == "bfloat16"
        for piece in pieces[1:]:
            assert torch.equal(read(tmp_path, piece), flats[piece.kind][begin : begin + count])
            assert piece[1:5] == (1, start, count, OPTIMIZER_FILE) and piece.dtype == "float32"


def test_a_weight_that_is_its_own_master_is_found_in_each_file(tmp_path: Path) -> None:
    """Otherwise, in fp32, where the same memory is saved twice, one of the two kinds would be missing."""
    weight, moment = torch.randn(6, 4), torch.randn(24)
    files = [
        (MODEL_FILE, {"module": {"0.weight": weight}}),
        (OPTIMIZER_FILE, {"fp32": weight.view(-1), "exp_avg": moment}),
    ]
    wanted = [Located(A, WEIGHT, 0, 0, weight), Located(A, MASTER, 0, 0, weight.view(-1))]
    for order in (files, files[::-1]):
        folder = tmp_path / order[0][0]
        pieces = written(folder, order, wanted).pieces["0.weight"]
        assert {piece.kind: piece.file for piece in pieces} == {WEIGHT: MODEL_FILE, MASTER: OPTIMIZER_FILE}
        assert len(pieces) == 2
        assert all(torch.equal(read(folder, piece), weight.view(-1)) for piece in pieces)


def test_a_master_that_only_the_model_file_holds_is_found_there(tmp_path: Path) -> None:
    """In fp32 without ZeRO, the optimizer's file holds only moments; without this, a save would have no masters."""
    weight = torch.randn(6, 4)
    files = [(MODEL_FILE, {"module": {"0.weight": weight}}), (OPTIMIZER_FILE, {"exp_avg": torch.randn(24)})]
    wanted = [Located(A, MASTER, 0, 5, weight.view(-1)[5:10]), Located(A, WEIGHT, 0, 0, weight)]
    master, full = written(tmp_path, files, wanted).pieces["0.weight"]
    assert (master.kind, master.file, master.start, master.numel) == (MASTER, MODEL_FILE, 5, 5)
    assert torch.equal(read(tmp_path, master), weight.view(-1)[5:10])
    assert torch.equal(read(tmp_path, full), weight.view(-1))


def test_unsaved_tensors_are_not_indexed(tmp_path: Path) -> None:
    """Otherwise a weight that is not saved would be read from the location of another tensor."""
    block = torch.randn(100)
    saved = block[40:60]
    files = [(MODEL_FILE, {"w": saved}), (OPTIMIZER_FILE, {"m": torch.randn(20), "none": torch.empty(0)})]
    outside = {
        "before": block[30:40],
        "begins before": block[39:45],
        "ends after": block[50:61],
        "after": block[60:70],
        "elsewhere": torch.randn(5),
        "other dtype": block[40:50].view(torch.int32),
    }
    wanted = [Located((0, name), WEIGHT, 0, 0, tensor) for name, tensor in outside.items()]
    wanted.append(Located(A, WEIGHT, 0, 0, saved[3:20]))
    wanted.append(Located(B, WEIGHT, 0, 0, files[1][1]["m"]))
    record = written(tmp_path, files, wanted)
    assert list(record.pieces) == ["0.weight"]  # weights are located only in the model's files
    assert torch.equal(read(tmp_path, record.pieces["0.weight"][0]), saved[3:20])


def test_a_tensor_saved_under_two_names_is_found_once(tmp_path: Path) -> None:
    """Otherwise a tied embedding would be indexed twice, and the save refused."""
    table = torch.randn(6, 4)
    files = [(MODEL_FILE, {"module": {"embed": table, "empty": table[:0], "head": table}})]
    (piece,) = written(tmp_path, files, [Located(A, WEIGHT, 0, 0, table[2:])]).pieces["0.weight"]
    assert torch.equal(read(tmp_path, piece), table[2:].reshape(-1))


def addresses(snapshot: Snapshot) -> list[int]:
    """Return the addresses of the copies in a snapshot."""

    def of(tree: Any) -> list[int]:
        if isinstance(tree, Tensor):
            return [tree.data_ptr()]
        values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
        return [address for value in values for address in of(value)]

    return of(list(snapshot.files.values()))


def test_memory_is_allocated_once(tmp_path: Path) -> None:
    """Otherwise every save would allocate the memory of a checkpoint, and a later one could fail."""
    memory, live = HostMemory(), LiveRank(SMALL, THREE[0], 2)
    live.set(1, 1)
    assert memory.nbytes == 0
    first = memory.take(live.files(), live.located())
    tensors = [*live.weights.values(), *live.flats.values()]
    assert memory.nbytes == sum(tensor.nbytes for tensor in tensors)
    assert not set(addresses(first)) & {tensor.data_ptr() for tensor in tensors}
    for step in (2, 3):
        live.set(1, step)
        again = memory.take(live.files(), live.located())
        assert addresses(again) == addresses(first) and memory.nbytes == sum(tensor.nbytes for tensor in tensors)
        assert same(dict(live.files()), again.files)


def test_copies_do_not_change_while_training_continues(tmp_path: Path) -> None:
    """Otherwise a checkpoint could hold weights of one step and moments of the next."""
    live = LiveRank(SMALL, THREE[0], 2)
    live.set(1, 1)
    snapshot = HostMemory().take(live.files(), live.located())
    before = {key: tensor.clone() for key, tensor in live.weights.items()}
    flats = {kind: flat.clone() for kind, flat in live.flats.items()}
    for tensor in (*live.weights.values(), *live.flats.values()):
        tensor.fill_(-1)
    write_rank(str(tmp_path), 0, snapshot)
    found = torch.load(tmp_path / MODEL_FILE, weights_only=True)["module"]
    assert same({f"layers.{layer}.{name}": tensor for (layer, name), tensor in before.items()}, found)
    state = torch.load(tmp_path / OPTIMIZER_FILE, weights_only=True)["optimizer_state_dict"]
    assert same([flats[MASTER]], state["single_partition_of_fp32_groups"])
    assert same({kind: flats[kind] for kind in MOMENTS}, state["base_optimizer_state"][0])


@pytest.mark.parametrize("change", ["shape", "dtype", "count"])
def test_memory_adapts_to_the_state_dict(change: str) -> None:
    """Otherwise an old state dict would be saved after a change, as when the first step creates Adam's moments."""
    memory = HostMemory()
    memory.take([("a", {"x": torch.ones(4), "y": torch.ones(2)})], [])
    new: dict[str, Tensor] = {
        "shape": {"x": torch.randn(5), "y": torch.randn(2)},
        "dtype": {"x": torch.randn(4).bfloat16(), "y": torch.randn(2)},
        "count": {"x": torch.randn(4)},
    }[change]
    snapshot = memory.take([("a", new)], [])
    assert same(new, snapshot.files["a"])
    assert memory.nbytes == sum(tensor.nbytes for tensor in new.values())
