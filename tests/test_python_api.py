"""The Python API: the snippets of docs/python.md run, models print their shapes, wrong input gives a one-line error."""

from __future__ import annotations

import io
import json
import re
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from written_ranks import build, write_rank

from llama_ds.checkpoint import store
from llama_ds.checkpoint.carried import TOKENIZER
from llama_ds.checkpoint.load_model import load_model
from llama_ds.checkpoint.manifest import Description, write_manifest
from llama_ds.config.run_file import load_run, resolved
from llama_ds.config.schema import RunConfig
from llama_ds.data.building.build import build_source
from llama_ds.data.stream import Dataset, Reader, open_data
from llama_ds.data.text.tokenizer import train_tokenizer
from llama_ds.errors import UserError
from llama_ds.layout.layout import Layout
from llama_ds.model.build import build_model
from llama_ds.model.llama import Llama, layer_context
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.tensor_parallel import SingleRank
from llama_ds.perf.plan.estimate import estimate
from llama_ds.perf.plan.hardware import load
from llama_ds.perf.plan.search import search

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("argparse", "ast", "inspect", "mailbox", "pdb", "tarfile", "turtle", "typing")
SNIPPET = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make the working directory look like a checkout after `make quickstart`, with less text and initial weights."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "ds_configs").symlink_to(ROOT / "ds_configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        build_data(load_run("ds_configs/quickstart.yaml"))
        write_checkpoint(load_run("ds_configs/quickstart.yaml"))
        yield root


def build_data(run: RunConfig) -> None:
    """Train the run's tokenizer and build its sources at their configured paths."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    Path("code").mkdir()
    for module in MODULES:
        shutil.copy(stdlib / f"{module}.py", "code")
    texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    Path("prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    patterns = {"code": "code", "prose": "prose.jsonl"}
    Path(run.data.tokenizer).parent.mkdir(parents=True)
    tokenizer = train_tokenizer(
        list(patterns.values()), run.data.tokenizer.removesuffix(".model"), run.model.vocab_size
    )
    for source in run.data.sources:
        out = str(Path(source.path).parent)
        build_source(source.name, patterns[source.name], tokenizer, out, run.data.seq_len, 0.1, document_chars=4000)


def write_checkpoint(run: RunConfig) -> None:
    """Write a checkpoint of the run's initial weights, as saved by a single rank."""
    folder = Path(run.run_dir, "checkpoints", store.tag_of(1))
    folder.mkdir(parents=True)
    record = write_rank(run, str(folder), 0, 1, True, "fp32")
    shutil.copyfile(run.data.tokenizer, folder / TOKENIZER)
    description = Description(1, 4096, 1, "fp32", Layout(micro_batch=8).as_data(), resolved(run), optimizer_steps=1)
    write_manifest(str(folder), description, [record])
    (folder.parent / store.LATEST).write_text(folder.name)


@pytest.fixture(scope="module")
def model() -> Llama:
    return build_model("quickstart")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return open_data(load_run("ds_configs/quickstart.yaml"))


@pytest.mark.slow
def test_snippets_print_what_the_page_shows() -> None:
    snippets = SNIPPET.findall((ROOT / "docs/python.md").read_text())
    assert len(snippets) == 5
    names: dict[str, Any] = {}
    for code, shown in snippets:
        assert len(code.splitlines()) <= 10
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == shown or not shown
        assert printed.getvalue().strip()


def test_a_shape_by_name_run_or_config_is_what_training_starts_from(model: Llama) -> None:
    run = load_run("ds_configs/quickstart.yaml")
    context = layer_context(run, SingleRank(), "cpu", torch.float32)
    trained = Llama(context, NextTokenLoss(context.tp), policies=["none"] * run.model.num_hidden_layers).state_dict()
    for built in (model, build_model(run), build_model(run.model, seed=run.seed)):
        found = built.state_dict()
        assert found.keys() == trained.keys() and all(torch.equal(found[name], trained[name]) for name in trained)
    other = build_model(run.model).state_dict()  # seed 0
    assert not torch.equal(other["layers.0.weight"], trained["layers.0.weight"])
    assert next(build_model(run.model, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_a_loaded_model_is_ready_to_evaluate(model: Llama) -> None:
    loaded = load_model("runs/quickstart")
    assert not loaded.training and str(loaded) == str(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_loaded_model_masks_documents_as_it_was_trained(checkout: Path) -> None:
    write_checkpoint(load_run("ds_configs/quickstart.yaml", ["name=masked", "data.document_mask=true"]))
    packed, alone = [[1, 50, 60, 1, 70, 80]], [[1, 70, 80]]
    for options, stays_inside in (({}, True), ({"document_mask": False}, False)):
        loaded = load_model("runs/masked", **options)
        assert torch.allclose(loaded.logits(packed)[:, 3:], loaded.logits(alone), atol=1e-5) == stays_inside


def test_logits_take_ids_in_any_form_and_have_no_gradients(model: Llama) -> None:
    ids = [[1, 22, 333], [4, 5, 4095]]
    expected = model(torch.tensor(ids))
    assert expected.requires_grad and expected.shape == (2, 3, 4096)
    for form in (ids, np.array(ids, np.uint16), torch.tensor(ids, dtype=torch.int32)):
        found = model.logits(form)
        assert torch.equal(found, expected) and not found.requires_grad


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], r"ids: torch.int64 of shape \[2\] .*put a single row into brackets"),
        ([[1, 2], [3]], "ids: not rows of one length"),
        ([["a"]], "ids: not rows of one length"),
        ([[1.5]], "ids: torch.float64 .* are not integers"),
        ([[]], "1 to 256 tokens in a row"),
        (np.zeros((1, 257), int), r"ids: torch.int64 of shape \[1, 257\]"),
        ([[4096]], "ids: 4096 to 4096 are not all in the vocabulary of 4096"),
        ([[-1, 3]], "ids: -1 to 3 are not all"),
    ],
)
def test_ids_that_a_model_cannot_take_are_refused(model: Llama, ids: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.logits(ids)


def test_a_printed_model_shows_what_a_rank_holds() -> None:
    run = load_run("ds_configs/quickstart.yaml", ["model.num_hidden_layers=12", "model.tie_word_embeddings=true"])
    part = build(run, rank=1, size=2)
    lines = str(part).splitlines()
    own = sum(weight.numel() for weight in part.parameters())
    assert f"{sum(w.numel() for w in build(run).parameters()):,} parameters, {own:,} on this rank of tp 2" in lines[1]
    assert len(lines) == 26 and "    (1-12): 12 x DecoderLayer(" in lines
    shown = {line.split(":")[0].strip(" ()"): line.strip() for line in lines}
    assert "[688, 256], [344, 256] on this rank: dim 0 cut over tp 2, float32" in shown["gate_proj"]
    assert "[256, 688], [256, 344] on this rank: dim 1 cut over tp 2, float32" in shown["down_proj"]
    assert shown["norm"] == "(norm): RMSNorm([256], float32, eps 1e-05)"
    for weight in part.parameters():  # partitioned as under ZeRO-3
        weight.ds_shape = weight.shape  # type: ignore[attr-defined]
        weight.data = torch.empty(0)
    assert str(part).splitlines() == lines


def test_rows_are_those_that_steps_train_on(data: Dataset) -> None:
    rows = list(data.rows(40, 40))
    assert [row.number for row in rows] == list(range(40, 80)) and [row.step for row in rows] == [
        number // 16 for number in range(40, 80)
    ]
    for row in rows:
        source = data.sources.train[data.order.names.index(row.source)]
        assert row.epoch == 0 and row.ids.dtype == np.int32 and np.array_equal(row.ids, source.row(row.row))
    assert rows[0].text == data.sources.tokenizer.decode(rows[0].ids) and len(rows[0].text) > 100
    step = np.concatenate(list(Reader(data, range(3, 4), micro_batch=4).batches()))
    assert sorted(row.ids.tobytes() for row in rows if row.step == 3) == sorted(row.tobytes() for row in step)


def test_rows_end_with_the_run(data: Dataset) -> None:
    assert [row.number for row in data.rows(start=200 * 16 - 2)] == [3198, 3199]
    assert next(data.rows()).number == 0 and list(data.rows(7, 0)) == []
    for start, count in ((-1, 3), (3199, 2), (0, -1), (3201, None)):
        with pytest.raises(UserError, match="the run has the rows 0 to 3200"):
            data.rows(start, count)


def test_a_reader_is_iterated_without_further_ado(data: Dataset) -> None:
    batches = list(Reader(data, range(5, 7)).batches())
    assert len(batches) == 2 * 16 and all(batch.shape == (1, 257) for batch in batches)
    second = list(Reader(data, range(5, 7), dp_rank=1, dp_size=2, micro_batch=4).batches())
    assert np.array_equal(np.concatenate(second), np.concatenate([*batches[8:16], *batches[24:]]))


@pytest.mark.parametrize("share", [(2, 2, 1), (-1, 2, 1), (0, 3, 1), (0, 2, 16), (0, 1, 0)])
def test_rows_that_cannot_be_shared_out_are_refused(data: Dataset, share: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match=r"Reader: dp_rank .* must be a multiple of dp_size"):
        Reader(data, range(1), *share)


def test_a_damaged_shard_is_named(checkout: Path, tmp_path: Path) -> None:
    shutil.copytree(checkout / "runs/quickstart/data/shards", tmp_path / "shards")
    for shard in (tmp_path / "shards" / "code").glob("train-*.tar"):
        shard.write_bytes(shard.read_bytes()[:600])
    run = load_run("ds_configs/quickstart.yaml", [f"data.sources.0.path={tmp_path}/shards/code"])
    with pytest.raises(UserError, match=r"shards/code/train-.*copy the shard again, or exclude it"):
        list(islice(open_data(run).rows(), 10))


def test_what_cannot_be_built_or_planned_is_one_sentence() -> None:
    run, gpu = load_run("ds_configs/llama_7b.yaml"), load("a100-80gb")
    for call, message in (
        (lambda: build_model("66b"), r"66b: no such model \(did you mean '65b'\?\)"),
        (lambda: build_model("quickstart", seq_len=0), "seq_len 0: a row has one token at least"),
        (lambda: build_model("quickstart", device="gpu"), "device 'gpu': not available here"),
        (lambda: load_model("runs/nowhere"), "runs/nowhere: no such folder"),
        (lambda: estimate(run, 0, gpu), "world size 0 is not a multiple of"),
        (lambda: search(run, 0, gpu), "0 GPUs: the number of GPUs is not positive"),
        (lambda: load("a100"), "a100: not a described machine"),
    ):
        with pytest.raises(UserError, match=message):
            call()
