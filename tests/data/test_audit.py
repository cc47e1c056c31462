"""The audit of a run folder returns exactly the documents that a step read, token by token."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from built_sources import BATCH, SEQ_LEN, Built, run_on, with_source

from llama_ds.config.run_file import dump
from llama_ds.data.audit import documents_of_step, open_run
from llama_ds.data.building.build import build_source
from llama_ds.data.mixture import STATE, save_state, state_from_json
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
    state = replace(data.state, bad=bad)
    data.order.replace_shards(bad)
    folder = Path(run.run_dir)
    save_state(str(folder / STATE), state)
    (folder / "run.yaml").write_text(dump(run))
    opened = open_run(str(folder))
    for step in (0, 1, 2, 150, 199):
        rows = documents_of_step(opened, step)
        wanted = data.order.at(step)
        assert [row.epoch for row in rows] == wanted.epoch.tolist()
        for row, source, number in zip(rows, wanted.source, wanted.row, strict=True):
            read = data.sources.train[source].row(number).tolist()
            reported = [i for d in row.documents for i in ids[d.place, d.digest][d.first : d.last + 1]]
            assert all(d.length == len(ids[d.place, d.digest]) for d in row.documents)
            assert read == reported + [eos] * (SEQ_LEN + 1 - len(reported))  # the last row of a source is padded
            assert row.shard == f"train-{data.sources.train[source].geometry.locate(number[None])[0][0]:06d}.tar"
    assert not any(row.shard == "train-000001.tar" for row in documents_of_step(opened, 2) if row.source == "prose")
    with pytest.raises(UserError, match="step 200 is not one of the run's steps 0 to 199"):
        documents_of_step(opened, 200)


def test_the_audit_accounts_for_skips(built: Built, tmp_path: Path) -> None:
    """Otherwise the audit of a spike would name documents that the run skipped."""
    data = open_data(run_on(built, tmp_path, skip=[{"at_step": 5, "steps": 7}, {"at_step": 9, "steps": 1}]))
    plain = open_data(run_on(built, tmp_path))
    run = run_on(built, tmp_path, skip=[{"at_step": 5, "steps": 7}, {"at_step": 9, "steps": 1}])
    folder = Path(run.run_dir)
    save_state(str(folder / STATE), data.state)
    (folder / "run.yaml").write_text(dump(run))
    opened = open_run(str(folder))
    for step, read in ((0, 0), (4, 4), (5, 12), (8, 15), (9, 17), (191, 199)):
        assert documents_of_step(opened, step) == documents_of_step(opened._replace(state=plain.state), read)
    assert sum(rows for rows, _ in opened.order.consumed(200).values()) == 200 * BATCH


def test_a_source_that_was_rebuilt_is_refused(built: Built, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise a resumed run reads, and an audit names, documents that its history does not mean."""
    folder, words = tmp_path / "shards" / "prose", Path(built.prose).read_text()
    (tmp_path / "other.jsonl").write_text(words.replace("Chapter 7.", "Chapter 8."))  # as long, and as many rows

    def build(pattern: str, **more: bool) -> None:
        build_source("prose", pattern, built.tokenizer, str(folder.parent), SEQ_LEN, 0.2, 20, **more)  # type: ignore[arg-type]

    build(built.prose)
    run = with_source(run_on(built, tmp_path), 1, path=str(folder))
    data = open_data(run)
    (tmp_path / "run").mkdir()
    save_state(str(tmp_path / "run" / STATE), data.state)
    (tmp_path / "run" / "run.yaml").write_text(dump(run))
    read = documents_of_step(open_run(str(tmp_path / "run")), 3)
    shutil.copytree(folder, tmp_path / "old")

    build(str(tmp_path / "other.jsonl"), append=True)
    grown = open_data(run, data.state, 5, "ckpt")  # a source that grew is the same source
    assert documents_of_step(open_run(str(tmp_path / "run")), 3) == read
    assert len(grown.state.contents["prose"]) == 2 and grown.state.contents["prose"][:1] == data.state.contents["prose"]

    build(str(tmp_path / "other.jsonl"), overwrite=True)
    assert open_data(run).state.segments == data.state.segments
    refusal = r"read source prose with digest (\w{12}) .* now (?!\1)\w{12}: it was rebuilt.* old shards back"
    with pytest.raises(UserError, match="ckpt: has " + refusal):
        open_data(run, data.state, 5, "ckpt")
    with pytest.raises(UserError, match=r"data\.json: has " + refusal):
        documents_of_step(open_run(str(tmp_path / "run")), 3)

    old = tmp_path / "old" / "manifest.json"  # as an older version wrote it: digests come from the checksums
    raw = json.loads(old.read_text())
    del raw["inputs"]
    for split in raw["splits"].values():
        del split["extents"][0]["sha256"]
    old.write_text(json.dumps(raw))
    assert open_data(with_source(run, 1, path=str(old.parent))).state == data.state

    without = json.loads(json.dumps(data.state.as_json()))
    del without["contents"]  # a checkpoint of an older version
    with caplog.at_level("INFO", "llama_ds"):
        open_data(run, state_from_json(without, "ckpt"), 5, "ckpt")
    assert "ckpt: records no digest of source prose; whether it was rebuilt cannot be checked" in caplog.text
    (tmp_path / "run" / STATE).write_text(json.dumps(without))
    assert documents_of_step(open_run(str(tmp_path / "run")), 3)
    (tmp_path / "less.jsonl").write_text("".join(words.splitlines(keepends=True)[:20]))
    build(str(tmp_path / "less.jsonl"), overwrite=True)
    with pytest.raises(UserError, match=r"data\.json: has read source prose of \d+ rows, 20 in a shard, .* rebuilt"):
        documents_of_step(open_run(str(tmp_path / "run")), 3)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.json: cannot be read .*name the folder of a run"):
        open_run(str(tmp_path))
    (tmp_path / STATE).write_text("{")
    with pytest.raises(UserError, match=r"data\.json: cannot be read"):
        open_run(str(tmp_path))
    (tmp_path / STATE).write_text("{}")
    with pytest.raises(UserError, match="holds no state of the data"):
        open_run(str(tmp_path))
