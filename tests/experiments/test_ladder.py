"""Ladders: run files from depth and budget, runs that go on after a kill, refusals, and the fitted law."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from llama_ds.config.run_file import dump, load_run
from llama_ds.errors import UserError
from llama_ds.experiments.ladder import results
from llama_ds.experiments.ladder.execute import Start, execute, places
from llama_ds.experiments.ladder.law import Fit, Law, cheapest, fit_law
from llama_ds.experiments.ladder.page import write_report
from llama_ds.experiments.ladder.plan import plan, write_plan
from llama_ds.experiments.ladder.results import fitted, predict_first, predictions
from llama_ds.experiments.ladder.spec import Ladder, read_ladder
from llama_ds.launch.hostfile import parse_hostfile
from llama_ds.layout.flops import flops_per_token

ROOT = Path(__file__).resolve().parents[2]
TRUTH = Law(E=1.7, A=400.0, B=410.0, alpha=0.34, beta=0.28)
LADDER = """
name: small
depths: [1, 2, 3, 4]
predict: [5]
tokens_per_parameter: [1, 2]
width_per_layer: 32
head_dim: 32
parallel: {micro_batch: 4}
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Ladder]:
    """Return a function that reads LADDER with changes, with data that exists and a folder of its own."""
    for name in ("code", "prose"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"ids")
    text = (ROOT / "ds_configs/quickstart.yaml").read_text()
    text = text.replace("runs/quickstart/data/shards", str(tmp_path)).replace("runs/quickstart/data", str(tmp_path))
    (tmp_path / "base.yaml").write_text(text.replace("zero1_auto.json", str(ROOT / "ds_configs/zero1_auto.json")))

    def made(*changes: tuple[str, str], name: str = "ladder.yaml") -> Ladder:
        content = f"{LADDER}base: {tmp_path}/base.yaml\nfolder: {tmp_path}/ladder\n"
        for old, new in changes:
            assert old in content
            content = content.replace(old, new)
        (tmp_path / name).write_text(content)
        return read_ladder(str(tmp_path / name))

    return made


def trained(ladder: Ladder, fail_at: int | None = None) -> Start:
    """Return a stub of training: it writes the records that the law gives; call number `fail_at` is killed midway."""
    calls = []

    def start(command: list[str], log: str, variables: Mapping[str, str]) -> int:
        run = load_run(next(word for word in command if word.endswith(".yaml")))
        calls.append(run.name)
        folder = Path(run.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(dump(run))
        killed = len(calls) == fail_at
        size = next(rung.parameters for rung in plan(ladder) if rung.name == run.name)
        noise = np.random.default_rng(size).normal(0, 1e-3)
        with (folder / "metrics.jsonl").open("a") as file:
            for step in range(1, run.training.steps // 2 if killed else run.training.steps + 1):
                tasks = {"tasks/piqa": 1 - 0.5 / step} if step % 8 == 0 else {}
                file.write(json.dumps({"step": step, "loss": 8 / step**0.1, **tasks}) + "\n")
            if not killed:
                loss = TRUTH.loss(size, run.training.tokens) * (1 + noise)
                file.write(json.dumps({"step": run.training.steps, "val_loss": loss}) + "\n")
        return 137 if killed else 0

    return start


def finish(ladder: Ladder, start: Start) -> None:
    rungs = plan(ladder)
    paths = dict(zip((rung.name for rung in rungs), write_plan(ladder, rungs), strict=True))
    for predicted in (False, True):
        part = [rung for rung in rungs if rung.predicted is predicted]
        if predicted:
            predict_first(ladder, rungs)
        execute(ladder, part, [paths[rung.name] for rung in part], start, lambda text: None)


def test_depth_gives_whole_run_files(make: Callable[..., Ladder]) -> None:
    ladder = make()
    rungs = plan(ladder)
    assert [(rung.depth, rung.budget) for rung in rungs] == [
        *((depth, tokens) for depth in (1, 2, 3, 4) for tokens in (1.0, 2.0)),
        (5, 2.0),
    ]
    for rung, path in zip(rungs, write_plan(ladder, rungs), strict=True):
        run = load_run(path)
        assert run.model.num_hidden_layers == rung.depth
        assert run.model.hidden_size == 32 * rung.depth == 32 * run.model.num_attention_heads
        batch = run.training.global_batch * run.data.seq_len
        assert 0 <= rung.budget * rung.parameters - run.training.tokens < batch
        assert run.optimizer.warmup_steps == run.training.steps // 10
        assert run.evaluation.interval == run.training.steps  # the loss of the last step is what the law needs
    rates = [rung.run.optimizer.lr for rung in rungs if rung.budget == 2.0]
    assert rates == sorted(rates, reverse=True)


def test_overrides_change_the_base(make: Callable[..., Ladder]) -> None:
    ladder = make(("predict:", "overrides: {training.global_batch: 4, optimizer.lr: 1e-3}\npredict:"))
    for rung in plan(ladder):
        assert rung.run.training.global_batch == 4
        assert rung.run.optimizer.lr == pytest.approx(1e-3 * (32 * rung.depth / 256) ** -0.5, rel=1e-3)


def test_equal_flops_and_sweeps(make: Callable[..., Ladder]) -> None:
    budget = 5e12
    alone = ("predict: [5]", "predict: []")
    for rung in plan(make(("tokens_per_parameter: [1, 2]", f"flops: [{budget}]"), alone)):
        step = flops_per_token(rung.run.model, 256) * rung.run.training.global_batch * 256
        assert 0 <= budget - rung.flops < step
    text = "tokens_per_parameter: [2]\nsweep: {key: optimizer.lr, values: [1e-3, 2e-3]}"
    sweep = plan(make(("tokens_per_parameter: [1, 2]", text), alone))
    assert [rung.run.optimizer.lr for rung in sweep[:4]] == [1e-3, 2e-3] * 2
    text = text.replace("optimizer.lr, values: [1e-3, 2e-3]", "training.global_batch, values: [8, 32]")
    batches = plan(make(("tokens_per_parameter: [1, 2]", text), alone))
    assert [rung.run.training.global_batch for rung in batches[:2]] == [8, 32]
    # More rows are fewer steps: runs that are compared read the same tokens, but for less than a batch.
    assert batches[0].run.training.steps // 4 == batches[1].run.training.steps


def test_seeds_are_runs_of_their_own_but_no_more_points_of_the_law(make: Callable[..., Ladder]) -> None:
    ladder = make(("predict: [5]", "predict: [5]\nseeds: [3, 7]"))
    rungs = plan(ladder)
    assert [(rung.name, rung.run.seed) for rung in rungs[:3]] == [("d01_1_s3", 3), ("d01_1_s7", 7), ("d01_2_s3", 3)]
    assert [rung.run.seed for rung in rungs if rung.predicted] == [3, 7]
    with pytest.raises(UserError, match=r"predict needs 6 different runs .* give 3 of 3 and 3"):
        plan(make(("predict: [5]", "predict: [5]\nseeds: [3, 7]"), ("[1, 2, 3, 4]", "[1, 2, 3]"), ("[1, 2]", "[1]")))


def test_runs_are_side_by_side_on_whole_hosts(make: Callable[..., Ladder], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\nc slots=4\nd slots=2\n")
    beside = ("parallel:", f"ranks: 4\nhostfile: {tmp_path}/hosts\nparallel:")
    ladder = make(beside)
    rungs, both, seen = plan(ladder), Barrier(2, timeout=60), list[tuple[str, str]]()
    train = trained(ladder)

    def start(command: list[str], log: str, variables: Mapping[str, str]) -> int:
        seen.append((command[command.index("--hostfile") + 1], log))
        if len(seen) <= 2:
            both.wait()  # a run alone would wait for ever
        return train(command, log, variables)

    execute(ladder, rungs, write_plan(ladder, rungs), start, lambda text: None)
    assert {hostfile for hostfile, _ in seen[:2]} == {f"{ladder.root}/hosts/{n}" for n in (1, 2)}
    assert [parse_hostfile(f"{ladder.root}/hosts/{n}") for n in (1, 2)] == [{"a": 2, "b": 2}, {"c": 4}]
    assert sorted(log for _, log in seen) == sorted(f"{ladder.root}/logs/{rung.name}.log" for rung in rungs)
    refused = ((3, "ranks = 3 ends within b, as a and b of .* have 4 slots"), (16, "more than the 10 slots"))
    for ranks, message in refused:
        with pytest.raises(UserError, match=message):
            plan(make((beside[0], beside[1].replace("ranks: 4", f"ranks: {ranks}"))))


def test_runs_at_once_have_cores_and_devices_of_their_own(
    make: Callable[..., Ladder], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    ladder = make(("parallel:", "ranks: 2\nat_once: 2\nparallel:"), ("[1, 2, 3, 4]", "[1, 2, 3]"))
    rungs, both, seen = plan(ladder), Barrier(2, timeout=60), list[Mapping[str, str]]()
    train = trained(ladder)

    def start(command: list[str], log: str, variables: Mapping[str, str]) -> int:
        seen.append(variables)
        if len(seen) <= 2:
            both.wait()
        return train(command, log, variables)

    execute(ladder, rungs, write_plan(ladder, rungs), start, lambda text: None)
    assert {one["OMP_NUM_THREADS"] for one in seen} == {"2"}
    assert {one["CUDA_VISIBLE_DEVICES"] for one in seen[:2]} == {"4,5", "6,7"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        places(ladder)


def test_planner_gives_layouts(make: Callable[..., Ladder]) -> None:
    ladder = make(("parallel: {micro_batch: 4}", "gpu: a100-80gb\nranks: 2"), ("[1, 2, 3, 4]", "[2]"), ("[5]", "[]"))
    rungs = plan(ladder)
    assert [load_run(path).name for path in write_plan(ladder, rungs)] == [rung.name for rung in rungs]


@pytest.mark.slow
def test_killed_ladder_gives_the_same_figures(make: Callable[..., Ladder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "fit_law", partial(fit_law, samples=20))
    whole = make(("/ladder\n", "/whole\n"))
    finish(whole, trained(whole))
    cut = make()
    with pytest.raises(UserError, match="exit code 137; see its message; run again to go on"):
        finish(cut, trained(cut, fail_at=3))
    with pytest.raises(UserError, match="fit: 2 runs"):
        fitted(plan(cut))
    finish(cut, trained(cut))
    pictures = [write_report(ladder, plan(ladder))[0] for ladder in (whole, cut)]
    assert [Path(path).name for path in pictures[0]] == [
        *("figure1.svg", "loss_over_flops.svg", "figure2.svg", "ladder.html")
    ]
    for one, other in zip(*pictures, strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()
    page = Path(pictures[0][-1]).read_text()
    assert page.count("<svg") == 3
    assert "src=" not in page
    (loss, low, high) = predictions(whole)["d05_2"]
    rung = plan(whole)[-1]
    assert low < loss < high
    assert low < TRUTH.loss(rung.parameters, rung.run.training.tokens) < high


def test_changed_ladders_and_data_are_refused(make: Callable[..., Ladder], tmp_path: Path) -> None:
    """Once a run has begun; before, a plan may be made again."""
    ladder = make()
    write_plan(ladder, plan(ladder))
    changed = make(("[1, 2]", "[1, 3]"))
    paths = write_plan(changed, plan(changed))
    assert sorted(paths) == sorted(str(path) for path in (tmp_path / "ladder/run_files").glob("*.yaml"))
    write_plan(ladder, plan(ladder))
    begun = tmp_path / "ladder/runs/d01_1/metrics.jsonl"
    begun.parent.mkdir(parents=True)
    begun.touch()
    with pytest.raises(UserError, match="changed since its runs began"):
        write_plan(changed, plan(changed))
    (tmp_path / "tokenizer.model").write_bytes(b"other ids")
    with pytest.raises(UserError, match="changed since its runs began"):
        write_plan(ladder, plan(ladder))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[1, 2, 3, 4]", "[]", "depths is empty"),
        ("[1, 2, 3, 4]", "[1, 1]", "depths holds a value twice"),
        ("[1, 2, 3, 4]", "[5]", "depth 5 is in depths and in predict"),
        ("[1, 2]", "[1, 2]\ntokens: [1000]", "tokens_per_parameter and tokens; set one of"),
        ("tokens_per_parameter: [1, 2]", "", "sets no budget"),
        ("[1, 2]", "[0.001]", "below one batch of 4,096"),
        ("[1, 2]", "[-1]", "tokens_per_parameter = -1 is not positive"),
        ("head_dim: 32", "head_dim: 33", "head_dim = 33 is odd"),
        ("micro_batch: 4", "micro_batch: 5", "micro_batch = 5 does not divide"),
        ("micro_batch: 4", "tp: 2", "does not divide|not divisible|not a multiple"),
        ("micro_batch: 4", "micro_bach: 4", "did you mean"),
        ("predict:", "predicts:", "is not a known key"),
        ("[1, 2]", "[1]", "predict needs 6 different runs .* give 4 of 4 and 4; add some"),
        ("[1, 2]", "[1.00000001, 1.00000002]", "2 runs have the name d01_1; budgets must differ in six digits"),
        ("predict:", "sweep: {key: optimizer.lr, values: [1]}\npredict:", "sets predict and sweep"),
        ("predict: [5]", "sweep: {key: training.steps, values: [1]}", "training.steps follows from depth and budget"),
        ("predict: [5]", "sweep: {key: training.global_batch, values: [1.5]}", "1.5 is no number of rows"),
        ("predict:", "hostfile: hosts\nat_once: 2\npredict:", "sets hostfile and at_once"),
        ("predict:", "at_once: 0\npredict:", "at_once = 0 is not positive"),
        ("predict: [5]", "overrides: {training.steps: 10}", "overrides sets training.steps, which follows from depth"),
        ("predict: [5]", "overrides: {training.global_bach: 4}", "ladder small: .*did you mean .*global_batch"),
    ],
)
def test_bad_input_is_one_error(make: Callable[..., Ladder], old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(make((old, new)))


def synthetic(seed: int, noise: float, samples: int = 40) -> Fit:
    sizes, tokens = np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(2e8, 2e10, 4))
    n, d = sizes.ravel().tolist(), tokens.ravel().tolist()
    random = np.random.default_rng(seed)
    losses = [TRUTH.loss(*pair) * np.exp(random.normal(0, noise)) for pair in zip(n, d, strict=True)]
    return fit_law(n, d, losses, samples=samples, seed=seed)


def test_fit_recovers_known_constants() -> None:
    exact = synthetic(0, 0.0, samples=1).law
    # L-BFGS ends in a flat valley, in which the constants trade places within these bounds.
    assert abs(exact.E - TRUTH.E) < 0.01 * TRUTH.E
    assert (exact.alpha, exact.beta) == pytest.approx((TRUTH.alpha, TRUTH.beta), rel=0.02)
    size, tokens = exact.optimal(1e21)
    assert 6 * size * tokens == pytest.approx(1e21)
    nearby = [exact.loss(size * factor, tokens / factor) for factor in (0.9, 1.1)]
    assert exact.loss(size, tokens) < min(nearby)


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    fits = [synthetic(seed, 0.003) for seed in range(8)]
    for name in ("E", "alpha", "beta"):
        within = [low <= getattr(TRUTH, name) <= high for low, high in (fit.interval(name) for fit in fits)]
        # 95% intervals: fewer than 5 of 8 would have a chance of 1 in 2,000.
        assert sum(within) >= 5, name
    ahead = [fit.prediction(4e9, 8e10) for fit in fits]
    assert sum(low <= TRUTH.loss(4e9, 8e10) <= high for _, low, high in ahead) >= 5


def test_too_few_or_too_similar_runs_are_not_fitted() -> None:
    for n, d in (([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]), ([1, 1, 2, 2, 3, 3], [1, 2, 1, 2, 1, 2])):
        with pytest.raises(UserError, match="do not determine the law's 5 constants"):
            fit_law(n, d, [3.0] * len(n))


def test_inference_makes_smaller_models_cheaper() -> None:
    sizes = [cheapest(TRUTH, 2.3, queries)[0] for queries in (0, 1e11, 1e13)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.2 * sizes[2]
    size, tokens = cheapest(TRUTH, 2.3, 0)
    # Without inference it is the compute-optimal model of that budget; the search steps by 0.1% of a size.
    assert size == pytest.approx(TRUTH.optimal(6 * size * tokens)[0], rel=0.01)
    with pytest.raises(UserError, match="irreducible loss"):
        cheapest(TRUTH, 1.6, 0)
