"""Which parts a shard is cut from, where a part ends exactly at a shard's end."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llama_ds.data.building.shard_writer import Span
from llama_ds.data.building.split_stream import ShardForm, SplitStream

SEQ_LEN, ROWS = 4, 2


def stream_of(folder: Path, *ids: int) -> SplitStream:
    """Return the whole stream of parts with so many ids."""
    stream = SplitStream(ShardForm(str(folder), str(folder), SEQ_LEN, ROWS, "<u2", eos_id=2), "train", None)
    for number, count in enumerate(ids):
        stream.add(Span(number, stream.ids, count, np.empty(0, np.int64), ()), documents=1)
    stream.end()
    return stream


def test_the_last_label_of_a_shard_comes_from_the_part_that_begins_there(tmp_path: Path) -> None:
    """The row would end with the filling id instead of the next document's first one."""
    stream = stream_of(tmp_path, SEQ_LEN * ROWS, 5)
    first, second = stream.next_task(), stream.next_task()
    assert first and second and stream.next_task() is None
    assert [span.number for span in first.spans] == [0, 1]
    assert [span.number for span in second.spans] == [1]


def test_a_part_of_one_id_more_than_a_shard_fills_no_second_one(tmp_path: Path) -> None:
    """The stream's last id is a label only: a row that begins with it would have nothing to predict."""
    stream = stream_of(tmp_path, SEQ_LEN * ROWS + 1)
    first = stream.next_task()
    assert first and (first.rows, first.spans[0].ids) == (ROWS, SEQ_LEN * ROWS + 1)
    assert stream.next_task() is None
