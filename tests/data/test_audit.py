"""The audit of a run folder returns exactly the documents that a step read, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
from built_sources import BATCH, SEQ_LEN, Built, run_on

from llama_ds.config.run_file import dump
from llama_ds.data.audit import documents_of_step, open_run
from llama_ds.data.mixture import STATE, DataState, save_state
from llama_ds.data.order import BadShard
from llama_ds.data.stream import open_data
from llama_ds.data.text.corpus import documents
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError


def texts(built: Built) -> dict[tuple[str, str], list[int]]:
    """Return the ids of every document, by file and digest."""
    import hashlib

    tokenizer, found = Tokenizer(built.tokenizer), {}
    for pattern, cut in ((built.code, 2000), (built.prose, 0)):
        for document in documents(pattern, cut):
            digest = hashlib.sha256(document.text.encode()).hexdigest()[:32]
            found[document.path, digest] = [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]
    return found


def test_a_step_is_traced_to_its_documents(built: Built, tmp_path: Path) -> None:
    run = run_on(built, tmp_path)
    data, ids, eos = open_data(run), texts(built), Tokenizer(built.tokenizer).eos_id
    bad = (BadShard(2, "prose", 1, "as if"),)
    state = DataState(data.state.rows_per_shard, data.state.segments, bad)
    data.order.replace_shards(bad)
    folder = Path(run.run_dir)
    save_state(str(folder / STATE), state)
    (folder / "run.yaml").write_text(dump(run))
    opened, order = open_run(str(folder))
    for step in (0, 1, 2, 150, 199):
        rows = documents_of_step(opened, order, step)
        wanted = data.order.at(step)
        assert [row.epoch for row in rows] == wanted.epoch.tolist()
        for row, source, number in zip(rows, wanted.source, wanted.row, strict=True):
            read = data.sources.train[source].row(number).tolist()
            reported = [i for d in row.documents for i in ids[d.place, d.digest][d.first : d.last + 1]]
            assert all(d.length == len(ids[d.place, d.digest]) for d in row.documents)
            assert read == reported + [eos] * (SEQ_LEN + 1 - len(reported))  # the last row of a source is padded
            assert row.shard == f"train-{data.sources.train[source].geometry.locate(number[None])[0][0]:06d}.tar"
    assert not any(
        row.shard == "train-000001.tar" for row in documents_of_step(opened, order, 2) if row.source == "prose"
    )
    with pytest.raises(UserError, match="step 200 is not one of the run's steps 0 to 199"):
        documents_of_step(opened, order, 200)


def test_the_audit_accounts_for_skips(built: Built, tmp_path: Path) -> None:
    """Otherwise the audit of a spike would name documents that the run skipped."""
    data = open_data(run_on(built, tmp_path, skip=[{"at_step": 5, "steps": 7}, {"at_step": 9, "steps": 1}]))
    plain = open_data(run_on(built, tmp_path))
    run = run_on(built, tmp_path, skip=[{"at_step": 5, "steps": 7}, {"at_step": 9, "steps": 1}])
    folder = Path(run.run_dir)
    save_state(str(folder / STATE), data.state)
    (folder / "run.yaml").write_text(dump(run))
    opened, order = open_run(str(folder))
    for step, read in ((0, 0), (4, 4), (5, 12), (8, 15), (9, 17), (191, 199)):
        assert documents_of_step(opened, order, step) == documents_of_step(opened, plain.order, read)
    assert sum(rows for rows, _ in order.consumed(200).values()) == 200 * BATCH


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.json: cannot be read .*name the folder of a run"):
        open_run(str(tmp_path))
    (tmp_path / STATE).write_text("{")
    with pytest.raises(UserError, match=r"data\.json: cannot be read"):
        open_run(str(tmp_path))
    (tmp_path / STATE).write_text("{}")
    with pytest.raises(UserError, match="holds no state of the data"):
        open_run(str(tmp_path))
