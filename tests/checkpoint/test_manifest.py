"""Any damage to a checkpoint's files is detected and named, and no code in them is ever executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from commit_contents import KINDS, MOMENTS, SMALL, THREE, check_checkpoint, description, elements, ranks, save
from pickled_call import PickledCall

from llama_ds.checkpoint import store
from llama_ds.checkpoint.attempt import SaveAttempt, new_id
from llama_ds.checkpoint.manifest import (
    DESCRIPTION,
    FORMAT,
    INDEX,
    WEIGHT,
    Record,
    StoredPiece,
    check_present,
    checksum,
    describe,
    hash_of,
    read_tensors,
    verify,
    write_manifest,
)
from llama_ds.checkpoint.stored import torch_tensors
from llama_ds.checkpoint.weights import open_checkpoint
from llama_ds.checkpoint.writing import commit
from llama_ds.errors import UserError
from llama_ds.layout.optimizer_states import ADAMW, EXP_AVG, EXP_AVG_SQ, MASTER
from llama_ds.layout.weights import Role, weight_of, weight_shapes

DATA = [
    "mp_rank_00_model_states.pt",
    "mp_rank_01_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero_pp_rank_0_mp_rank_01_optim_states.pt",
    "zero_pp_rank_1_mp_rank_00_optim_states.pt",
]
FILES = [*DATA, INDEX, "tokenizer.model"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("saved")
    (root / "any.model").write_bytes(bytes(range(256)))
    run = ranks(str(root / "checkpoints"), THREE, str(root / "any.model"))
    for step in (1, 2):
        save(run, 1, step)
    return root / "checkpoints"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of one checkpoint that a test may damage."""
    return Path(shutil.copytree(saved / store.tag_of(2), tmp_path / store.tag_of(2)))


def examine(folder: Path) -> None:
    """Check a checkpoint as a run does before loading it."""
    found = describe(str(folder))
    check_present(str(folder), found)
    verify(str(folder), found, found.files)


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_a_checkpoint_describes_itself(folder: Path) -> None:
    """Otherwise run, data and files of a checkpoint would be unknown, or only this code could verify its checksums."""
    examine(folder)
    found = describe(str(folder))
    assert sorted(found.files) == sorted(FILES) and set(os.listdir(folder)) == {*FILES, DESCRIPTION}
    for name, entry in found.files.items():
        content = (folder / name).read_bytes()
        assert entry.size == len(content)
        assert entry.checksum == checksum(str(folder / name)) == xxhash.xxh3_128(content).hexdigest()
    assert [found.files[name].rank for name in DATA] == [0, 1, 0, 1, 2]
    assert (found.step, found.tokens, found.layout["tp"], found.optimizer_steps) == (2, 256, 2, 2)
    assert (found.data, found.rng) == ({"life": 1, "rows": 8}, {"seed": 1})
    assert found.config_hash == hash_of(found.run) != hash_of({**found.run, "seed": 2})
    assert found.model == SMALL


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, empty, lengthen, Path.unlink, link_to_itself, folder_instead])
def test_an_incomplete_file_is_named_before_anything_is_read(
    folder: Path, damage: Callable[[Path], None], name: str
) -> None:
    """Otherwise a run would fail hours later, or load only some of its weights."""
    damage(folder / name)
    with pytest.raises(UserError, match=rf"{folder / name}: is .*damaged; copy it again, or use another") as error:
        check_present(str(folder), describe(str(folder)))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=rf"{folder / name}: .*damaged"):
        verify(str(folder), describe(str(folder)), [name])


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found(folder: Path, name: str) -> None:
    """Otherwise a weight could silently be wrong by any factor."""
    path = folder / name
    size = path.stat().st_size
    for bit in (0, 8 * size - 1, *random.Random(1).sample(range(8 * size), 20)):
        flip(path, bit)
        check_present(str(folder), describe(str(folder)))
        with pytest.raises(UserError, match=rf"{path}: its bytes have checksum [0-9a-f]{{32}}, not .*damaged"):
            verify(str(folder), describe(str(folder)), FILES)
        verify(str(folder), describe(str(folder)), [other for other in FILES if other != name])
        flip(path, bit)
    examine(folder)


@pytest.mark.parametrize("name", DATA)
def test_the_same_file_of_another_step_is_found(saved: Path, folder: Path, name: str) -> None:
    """Otherwise an interrupted copy that was resumed from another checkpoint would mix two steps."""
    shutil.copy(saved / store.tag_of(1) / name, folder / name)
    check_present(str(folder), describe(str(folder)))
    with pytest.raises(UserError, match=rf"{folder / name}: its bytes have checksum"):
        examine(folder)


def test_a_flipped_bit_in_the_description_is_found_or_harmless(folder: Path) -> None:
    """Otherwise damage to the step, the data state or the checksums themselves would go unnoticed."""
    path = folder / DESCRIPTION
    wanted, harmless = describe(str(folder)), 0
    for bit in random.Random(2).sample(range(8 * path.stat().st_size), 2000):
        flip(path, bit)
        try:
            found = describe(str(folder))
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert found == wanted
            harmless += 1
        flip(path, bit)
    assert harmless < 20  # for example, 1e-05 and 1E-05 are the same number
    assert describe(str(folder)) == wanted


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty, "damaged"),
        (cut, "damaged"),
        (Path.unlink, "contains no llama_ds.json, so it is not a complete checkpoint"),
        (link_to_itself, "contains no llama_ds.json, so it is not a complete checkpoint"),
        (folder_instead, r"damaged \(.*Is a directory"),
        (lambda path: path.write_text("[1]"), "damaged"),
        (lambda path: path.write_text("7"), "damaged"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "damaged"),
    ],
)
def test_a_damaged_description_is_named(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    """Otherwise the user would see a traceback instead of the damaged checkpoint's name."""
    damage(folder / DESCRIPTION)
    with pytest.raises(UserError, match=rf"{folder}.*{message}") as error:
        describe(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", [1, FORMAT + 1, "next"])
def test_another_format_is_refused_by_its_number(folder: Path, version: object) -> None:
    """Otherwise an older version would call a newer checkpoint damaged, or load it wrongly."""
    content = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps({**content, "format": version, "what": "is new"}))
    with pytest.raises(UserError, match=rf"checkpoint format {version}, this version reads {FORMAT}; .*convert"):
        describe(str(folder))


def store_changed(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the description of a checkpoint, and its checksum as if it had been written so."""
    content = json.loads((folder / DESCRIPTION).read_text())
    del content["checksum"]
    change(content)
    content["checksum"] = xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / DESCRIPTION).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(files={"a": 7}), r"files\.a = 7 is not a list"),
        (lambda c: c.update(files={"a": ["x", "", 0]}), r"files\.a\.0 = 'x' is not an integer"),
        (lambda c: c.update(files={"a": [1, ""]}), r"files\.a = \[1, ''\] has 2 entries, not 3"),
        (lambda c: c.update(files=[1]), r"files = \[1\] is not a mapping"),
        (lambda c: c.update(step=None), "step = None is not an integer"),
        (lambda c: c.pop("tokens"), "tokens is missing, the checkpoint is damaged"),
        (lambda c: c.update(run=7), "run = 7 is not a mapping"),
        (lambda c: c.update(layout={"tp": [2]}), r"layout\.tp = \[2\] is not an integer"),
        (lambda c: c.update(rewinds={}), r"rewinds = {} is not a list"),
        (lambda c: c["run"].update(model=[]), r"run\.model = \[\] is not a section of keys"),
        (
            lambda c: c["run"]["model"].update(num_hidden_layers="x"),
            r"run\.model\.num_hidden_layers = 'x' is not an integer",
        ),
    ],
)
def test_a_wrong_type_in_the_description_is_named(folder: Path, change: Callable[[dict], object], message: str) -> None:
    """Otherwise the user would see a traceback of whatever uses the value first."""
    store_changed(folder, change)
    with pytest.raises(UserError, match=f"{folder / DESCRIPTION}: {message}") as error:
        describe(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [7, {}, {"seq_len": "x"}, {"seq_len": 64, "document_mask": 2}])
def test_a_wrong_type_in_the_run_is_named(folder: Path, data: object) -> None:
    store_changed(folder, lambda content: content["run"].update(data=data))
    with pytest.raises(UserError, match=rf"{folder / DESCRIPTION}: run\.data\.\w+ = .* is not "):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("column", "value"),
    [(0, "w"), (1, 10**12), (1, -1), (2, 1), (2, "x"), (3, 0), (4, None), (5, -8), (5, "x"), (6, "zeros"), (6, 4)],
)
def test_a_wrong_location_in_the_index_is_named(folder: Path, column: int, value: object) -> None:
    """Otherwise other bytes would be read as a weight, or a part number would allocate all memory."""
    rows = json.loads((folder / INDEX).read_text())
    next(row for row in rows["1.mlp.up_proj.weight"] if row[0] == WEIGHT)[column] = value
    (folder / INDEX).write_text(json.dumps(rows))
    with pytest.raises(UserError, match=rf"{folder / INDEX}: cannot be read \(.+\); use another checkpoint"):
        read_tensors(str(folder), describe(str(folder)), [WEIGHT])


def test_no_code_is_executed(folder: Path, tmp_path: Path) -> None:
    """Otherwise anyone who can write or send a checkpoint could execute code on every node."""
    mark, name = tmp_path / "executed", DATA[2]
    size = (folder / name).stat().st_size
    torch.save({"optimizer_state_dict": PickledCall(os.mkdir, str(mark))}, folder / name)
    with open(folder / name, "ab") as file:
        file.write(bytes(size - file.tell()))
    with pytest.raises(UserError, match=f"{name}: its bytes have checksum"):
        examine(folder)
    for spreads in read_tensors(str(folder), describe(str(folder)), KINDS).values():
        for spread in spreads.values():
            spread.whole()
    for plain in (folder / name, folder / DATA[0]):
        plain.write_bytes(pickle.dumps(PickledCall(os.mkdir, str(mark))))
        with pytest.raises(UserError, match="cannot be read as a file of torch tensors"):
            torch_tensors(str(plain))
    torch.save({"w": PickledCall(os.mkdir, str(mark))}, folder / name)
    with pytest.raises(UserError, match="neither a tensor nor plain data, and nothing in a file is executed"):
        torch_tensors(str(folder / name))
    assert not mark.exists()
    torch.load(folder / name, weights_only=False)
    assert mark.exists()  # an unsafe load does execute it


@pytest.fixture
def records(folder: Path) -> list[Record]:
    """Return the records of the checkpoint's ranks."""
    rows = json.loads((folder / INDEX).read_text())
    found = [Record(rank) for rank in range(len(THREE))]
    files = describe(str(folder)).files
    for name in DATA:
        found[files[name].rank].files[name] = files[name]
    for weight, pieces in rows.items():
        for piece in (StoredPiece(*row) for row in pieces):
            found[files[piece.file].rank].pieces.setdefault(weight, []).append(piece)
    return found


def test_records_make_the_same_checkpoint_again(folder: Path, records: list[Record]) -> None:
    """Otherwise records that lose information on disk would lead to an unreadable checkpoint."""
    assert [Record.from_json(record.as_json()) for record in records] == records
    (folder / DESCRIPTION).unlink()
    (folder / INDEX).unlink()
    write_manifest(str(folder), description(SMALL, THREE, 1, 2), records)
    assert check_checkpoint(str(folder.parent), folder.name) == (1, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", ["0.weight", "1.self_attn.o_proj.weight", "2.norm.weight"])
@pytest.mark.parametrize("change", ["lost", "short", "twice", "shifted", "other part"])
def test_a_save_that_lacks_elements_is_not_committed(
    folder: Path, records: list[Record], kind: str, weight: str, change: str
) -> None:
    """Otherwise a bug in the locations of tensors would be found only when the checkpoint is needed."""
    (folder / DESCRIPTION).unlink()
    pieces, index = next(
        (record.pieces[weight], i)
        for record in records
        for i, piece in enumerate(record.pieces.get(weight, []))
        if piece.kind == kind
    )
    piece = pieces.pop(index)
    pieces += {
        "lost": [],
        "short": [piece._replace(numel=piece.numel - 1)],
        "twice": [piece, piece],
        "shifted": [piece._replace(start=piece.start + 1)],
        "other part": [piece._replace(part=piece.part + 1)],
    }[change]
    with pytest.raises(ValueError, match=rf"^{weight}: .*{kind}"):
        write_manifest(str(folder), description(SMALL, THREE, 1, 2), records)
    assert not (folder / DESCRIPTION).exists()


def without_second_moments(records: list[Record], role: Role) -> None:
    for record in records:
        for name, pieces in record.pieces.items():
            if weight_of(name).role is role:
                record.pieces[name] = [piece for piece in pieces if piece.kind != EXP_AVG_SQ]


def test_a_save_holds_the_optimizer_states_of_each_role(
    folder: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an optimizer with different states for some weights could not save, or its saves would be unchecked."""
    given = description(SMALL, THREE, 1, 2)
    (folder / DESCRIPTION).unlink()
    monkeypatch.setitem(ADAMW.moments, Role.HIDDEN_MATRIX, (EXP_AVG,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^1\.self_attn\.q_proj.*: 2 parts of its exp_avg_sq were written, not 0"):
        write_manifest(str(folder), given, records)
    without_second_moments(records, Role.HIDDEN_MATRIX)
    write_manifest(str(folder), given, records)
    found = read_tensors(str(folder), describe(str(folder)), KINDS)
    shapes = weight_shapes(SMALL)
    assert {kind: list(tensors) for kind, tensors in found.items()} == {
        kind: [key for key in shapes if kind != EXP_AVG_SQ or weight_of(key[1]).role is not Role.HIDDEN_MATRIX]
        for kind in KINDS
    }
    assert all(torch.equal(s.whole(), elements(SMALL, k, EXP_AVG_SQ, 1, 2)) for k, s in found[EXP_AVG_SQ].items())
    (folder / DESCRIPTION).unlink()
    without_second_moments(records, Role.NORM)
    with pytest.raises(ValueError, match=r"^1\.input_layernorm.*: 0 parts of its exp_avg_sq were written, not 1"):
        write_manifest(str(folder), given, records)
    assert not (folder / DESCRIPTION).exists()


def test_a_save_without_weights_is_not_committed(folder: Path) -> None:
    """Otherwise an empty checkpoint would be committed."""
    (folder / DESCRIPTION).unlink()
    with pytest.raises(ValueError, match=r"^0\.weight: 0 parts of its weight were written, not 2"):
        write_manifest(str(folder), description(SMALL, THREE, 1, 2), [Record(0)])
    assert not (folder / DESCRIPTION).exists()


@pytest.mark.parametrize("kinds", [(WEIGHT,), (MASTER, "exp_avg"), (WEIGHT, *MOMENTS)])
def test_a_run_commits_only_resumable_checkpoints(saved: Path, records: list[Record], kinds: tuple[str, ...]) -> None:
    """Otherwise a run could not resume from its only checkpoint. Only conversions write weights-only checkpoints."""
    for record in records:
        record.pieces = {weight: [p for p in rows if p.kind in kinds] for weight, rows in record.pieces.items()}
    before = sorted(os.listdir(saved))
    with pytest.raises(ValueError, match=rf"^step 2: no .*{(set(KINDS) - set(kinds) - {WEIGHT}).pop()}.* was written"):
        commit(SaveAttempt(str(saved), new_id()), description(SMALL, THREE, 1, 2), records, "", store.Retention())
    assert sorted(os.listdir(saved)) == before


@pytest.mark.parametrize("kinds", [(WEIGHT,), (MASTER,), (WEIGHT, MASTER)])
def test_weights_alone_are_a_checkpoint(folder: Path, records: list[Record], kinds: tuple[str, ...]) -> None:
    """Otherwise a model could not be converted, or its description would not survive a round trip."""
    for record in records:
        record.pieces = {weight: [p for p in rows if p.kind in kinds] for weight, rows in record.pieces.items()}
    state = {"rows": [1, 2**70], "text": "Größe 🦙", "none": None, "small": 1e-300}
    given = replace(description(SMALL, THREE, 1, 2), data=state, optimizer_steps=None)
    written = write_manifest(str(folder), given, records)
    found = describe(str(folder))
    assert found == written == replace(given, files=found.files, config_hash=hash_of(given.run))
    tensors = read_tensors(str(folder), found, KINDS)
    assert list(tensors) == list(kinds)
    for kind, spreads in tensors.items():
        for key, spread in spreads.items():
            assert torch.equal(spread.whole(), elements(SMALL, key, kind, 1, 2))
