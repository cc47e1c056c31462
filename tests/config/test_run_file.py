"""Run files: keys that may be omitted, the reach of overrides, and the error for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ds.config.run_file import dump, load_resolved, load_run, path_variables, resolved
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout

RUN = """\
name: tiny
seed: 7
output_dir: runs
deepspeed: ds.json
model:
  vocab_size: 512
  hidden_size: 64
  intermediate_size: 96
  num_hidden_layers: 4
  num_attention_heads: 8
data:
  tokenizer: tok.model
  seq_len: 32
  sources:
    - {name: code, path: shards/code, weight: 0.7}
    - {name: prose, path: shards/prose, weight: 0.3}
training:
  global_batch: 16
  steps: 100
optimizer:
  lr: 1e-3
  warmup_steps: 10
parallel:
  pp: 1
"""
DEEPSPEED = '{"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tiny.yaml and ds.json, made the current one so that messages name bare files."""
    tmp_path.joinpath("tiny.yaml").write_text(RUN)
    tmp_path.joinpath("ds.json").write_text(DEEPSPEED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(*overrides: str) -> RunConfig:
    return load_run("tiny.yaml", overrides)


def test_what_is_left_out_is_derived(folder: Path) -> None:
    run = load()
    assert (run.model.num_key_value_heads, run.model.head_dim) == (8, 8)
    assert (run.training.steps, run.training.tokens) == (100, 100 * 16 * 32)
    assert (run.zero_stage, run.run_dir, run.deepspeed_path) == (1, "runs/tiny", "ds.json")


def test_seed_and_output_dir_have_defaults(folder: Path) -> None:
    folder.joinpath("tiny.yaml").write_text(RUN.replace("seed: 7\noutput_dir: runs\n", ""))
    assert (load().seed, load().output_dir) == (0, "runs")


@pytest.mark.parametrize("text", ["4194304", "4_194_304", "4.194304M", "4194.304K", "4.194304e6", "4.194304e+6"])
def test_integers_may_be_written_the_way_papers_do(folder: Path, text: str) -> None:
    assert load(f"training.tokens={text}").training.tokens == 4_194_304


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "'1e-5'", "10e-6"])
def test_floats_may_have_exponents(folder: Path, text: str) -> None:
    assert load(f"model.rms_norm_eps={text}").model.rms_norm_eps == 1e-5


def test_tokens_are_rounded_up_to_whole_steps(folder: Path) -> None:
    run = load("training.tokens=51_201")  # 100 steps of 512 tokens and one token more
    assert (run.training.steps, run.training.tokens) == (101, 51_201)


def test_overrides_reach_lists_the_json_and_missing_sections(folder: Path) -> None:
    run = load(
        "data.sources.0.weight=0.5",
        "data.sources.1.weight=0.5",
        "deepspeed.zero_optimization.stage=2",
        "parallel.partition=[1, 3]",
        "parallel.pp=2",
        "checkpoint.resume=never",
    )
    assert [source.weight for source in run.data.sources] == [0.5, 0.5]
    assert run.zero_stage == 2
    assert (run.parallel.partition, run.checkpoint.resume) == ((1, 3), "never")


def test_override_can_name_another_deepspeed_file(folder: Path) -> None:
    folder.joinpath("other.json").write_text('{"zero_optimization": {"stage": 3}}')
    assert load("deepspeed=other.json").zero_stage == 3


def test_deepspeed_file_is_found_next_to_the_run_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert load_run(str(folder / "tiny.yaml")).deepspeed_path == str(folder / "ds.json")


def test_home_is_expanded_in_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    run = load(
        *("data.tokenizer=~/t.model", "data.sources.0.path=~/code", "data.cache_dir=~/cache", "output_dir=~/runs"),
        *("checkpoint.start_from=~/model", "deepspeed=~/ds.json"),
    )
    found = (
        run.data.tokenizer,
        run.data.sources[0].path,
        run.data.cache_dir,
        run.output_dir,
        run.checkpoint.start_from,
    )
    assert found == tuple(f"{folder}/{name}" for name in ("t.model", "code", "cache", "runs", "model"))
    assert (run.data.sources[1].path, run.deepspeed_path) == ("shards/prose", f"{folder}/ds.json")


def test_variables_are_expanded_in_paths_and_go_to_the_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks on other hosts expand the paths again: without the variables they would end, or save somewhere else."""
    for name, value in (("SCRATCH", str(folder)), ("USER_1", "me"), ("DISK", "/disk"), ("TOK", "t.model")):
        monkeypatch.setenv(name, value)
    overrides = [
        *("output_dir=$SCRATCH/${USER_1}/runs", "data.cache_dir=$DISK/cache", "data.tokenizer=$TOK"),
        *("data.sources.0.path=pipe:cat $NOT_OURS/{}", "deepspeed=$SCRATCH/ds.json", "optimizer.lr=2"),
        "deepspeed.zero_optimization.stage=2",
    ]
    run = load(*overrides)
    found = (run.output_dir, run.data.cache_dir, run.data.tokenizer, run.data.sources[0].path, run.deepspeed_path)
    assert found == (
        *(f"{folder}/me/runs", "/disk/cache", "t.model", "pipe:cat $NOT_OURS/{}"),
        f"{folder}/ds.json",
    )
    assert path_variables("tiny.yaml", overrides) == ["SCRATCH", "TOK", "USER_1"]
    assert path_variables("tiny.yaml") == []


def test_last_override_wins(folder: Path) -> None:
    assert load("optimizer.lr=1", "optimizer.lr=2").optimizer.lr == 2.0


def test_a_source_may_wait_for_a_later_stage(folder: Path) -> None:
    stages = "data.mixture=[{at_tokens: 20K, weights: {code: 0.4, prose: 0.6}}, {at_tokens: 30K, weights: {prose: 1}}]"
    run = load("data.sources.0.weight=1", "data.sources.1.weight=0", stages)
    assert [(stage.at_tokens, stage.weights) for stage in run.data.mixture] == [
        (20_000, {"code": 0.4, "prose": 0.6}), (30_000, {"prose": 1.0})
    ]  # fmt: skip
    folder.joinpath("a.yaml").write_text(dump(run))
    assert load_resolved("a.yaml") == run


def test_skips_and_a_rewind_are_asked_for_on_the_command_line(folder: Path) -> None:
    run = load("checkpoint.rewind_to=40", "data.skip=[{at_step: 0, steps: 1}, {at_step: 40, steps: 3}]")
    assert [(skip.at_step, skip.steps) for skip in run.data.skip] == [(0, 1), (40, 3)]
    assert (run.checkpoint.rewind_to, run.checkpoint.rewind_id) == (40, 0)
    folder.joinpath("a.yaml").write_text(dump(run))
    assert load_resolved("a.yaml") == run
    with pytest.raises(UserError) as error:
        load("checkpoint.rewind_to=40", "checkpoint.resume=never")
    assert str(error.value).startswith(
        "tiny.yaml: checkpoint.rewind_to = 40 resumes from a checkpoint, which checkpoint.resume"
    )


def test_resolved_run_reads_back_the_same(folder: Path) -> None:
    run = load("model.rope_scaling={factor: 8, low_freq_factor: 1, high_freq_factor: 4, "
               "original_max_position_embeddings: 8192}", "name=1e5-steps")  # fmt: skip
    folder.joinpath("a.yaml").write_text(dump(run))
    folder.joinpath("b.json").write_text(json.dumps(resolved(run)))
    assert load_resolved("a.yaml") == run
    assert load_resolved("b.json") == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "command line: optimizer.lrr is not a known key (did you mean 'lr'?)"),
        ("optimiser.lr=1", "command line: optimiser is not a known key (did you mean 'optimizer'?)"),
        ("path=x", "command line: path is not a known key"),
        ("data.sources.0.wieght=1", "command line: data.sources.0.wieght is not a known key (did you mean 'weight'?)"),
        (
            "data.sources.2.weight=1",
            "command line: data.sources.2 counts into a list of 2; use 0 to 1 or give the whole list",
        ),
        ("name.first=x", "command line: name.first is inside name = 'tiny', which has no keys"),
        ("steps", "command line: 'steps' is not an override; write section.key=value (optimizer.lr=1e-4)"),
        ("optimizer.lr=[1", "command line: optimizer.lr:1: not valid YAML: "
         "expected ',' or ']', but got '<stream end>'"),
        (
            "parallel.tp=2.5",
            "command line: parallel.tp = 2.5 is not an integer (4194304, 4_194_304, 4M, 1.4T and 1.4e12 are)",
        ),
        (
            "parallel.tp=true",
            "command line: parallel.tp = True is not an integer (4194304, 4_194_304, 4M, 1.4T and 1.4e12 are)",
        ),
        ("optimizer.lr=fast", "command line: optimizer.lr = 'fast' is not a finite number"),
        ("optimizer.lr=.nan", "command line: optimizer.lr = nan is not a finite number"),
        ("data.document_mask=yes", "command line: data.document_mask = 'yes' is not true or false"),
        ("optimizer.betas=[0.9]", "command line: optimizer.betas = [0.9] has 1 entries, not 2"),
        ("model=7B", "command line: model = '7B' is not a section of keys"),
        ("optimizer.schedule=cosin", "tiny.yaml: optimizer.schedule = 'cosin' is not cosine, linear, "
         "inverse_sqrt, wsd or constant (did you mean 'cosine'?)"),
        ("parallel.recompute=all", "tiny.yaml: parallel.recompute = 'all' is not none, selective or full, "
         "a list of these for each stage, or {budget: 20 GiB}, auto or {auto: 80 GiB}"),
        ("optimizer.lr=0", "tiny.yaml: optimizer.lr = 0.0 is not positive"),
        ("training.steps=0", "command line: training.steps = 0 is not positive"),
        ("evaluation.rows=-1", "tiny.yaml: evaluation.rows = -1 is negative"),
        ("name=a/b", "tiny.yaml: name = 'a/b' names the run's folder: letters, digits, '_', '-' and '.' only"),
        (
            "model.num_key_value_heads=3",
            "tiny.yaml: model.num_key_value_heads = 3 does not divide model.num_attention_heads = 8; use 1, 2, 4 or 8",
        ),
        (
            "model.num_attention_heads=6",
            "command line: model.num_attention_heads = 6 does not divide model.hidden_size = 64; "
            "use 1, 2, 4 or 8, or set model.head_dim",
        ),
        ("model.head_dim=5", "tiny.yaml: model.head_dim = 5 is odd; rotary embeddings rotate pairs; use an even one"),
        ("parallel.tp=16", "tiny.yaml: parallel.tp = 16 does not divide model.num_attention_heads = 8; "
         "use 1, 2, 4 or 8"),
        ("parallel.sequence_parallel=true", "tiny.yaml: parallel.sequence_parallel = true shares rows over tp ranks "
         "and tp is 1; set it to false"),
        ("parallel.tp_chunks=4", "tiny.yaml: parallel.tp_chunks = 4 overlaps the collectives of tp ranks and tp is 1; "
         "set it to 1"),
        ("parallel.pp=5", "tiny.yaml: parallel.pp = 5 is more than model.num_hidden_layers = 4; use 4 or fewer"),
        ("parallel.partition=[2, 2]", "tiny.yaml: parallel.partition = [2, 2] has 2 entries, not pp = 1"),
        ("parallel.schedule=1f1", "tiny.yaml: parallel.schedule = '1f1' is not 1f1b, interleaved, zb_h1, dualpipe_v, "
         "zb_v, v_half, v_min or deepspeed (did you mean '1f1b'?)"),
        ("parallel.pass_times=[1, 1, 1, 0]", "tiny.yaml: parallel.pass_times orders schedule zb_v, v_half or v_min; "
         "leave it out with 1f1b"),
        ("parallel.post_validation=true", "tiny.yaml: parallel.post_validation = true is for pp > 1 and schedule "
         "dualpipe_v, zb_v, v_half or v_min, whose first rank has embedding and loss; set it to false with pp 1 and "
         "1f1b"),
        ("parallel.joint_weight_gradients=2", "tiny.yaml: parallel.joint_weight_gradients = 2 is for pp > 1 and this "
         "stack's own schedules; use 1 with pp 1 and 1f1b"),
        ("parallel.gradient_neighbours=2", "tiny.yaml: parallel.gradient_neighbours = 2 is for pp > 1 and this "
         "stack's own schedules; use 1 with pp 1 and 1f1b"),
        ("parallel.virtual_stages=2", "tiny.yaml: parallel.virtual_stages = 2 cuts what pipeline ranks hold and pp is "
         "1; use 1"),
        ("parallel.extra_warmup=-1", "tiny.yaml: parallel.extra_warmup = -1 is negative"),
        ("parallel.partition=[3]", "tiny.yaml: parallel.partition = [3] sums to 3, not model.num_hidden_layers = 4; "
         "leave it out to balance by cost"),
        ("data.sources.1.weight=0.2", "tiny.yaml: data.sources: the weights 0.7 + 0.2 sum to 0.9, not 1; "
         "divide each by 0.9"),
        ("data.sources.1.name=code", "tiny.yaml: data.sources.1.name = 'code' is also source 0's"),
        ("data.sources.1.weight=0", "tiny.yaml: data.sources.1.weight = 0.0 is below 1e-06; leave the source out"),
        ("logging.trace_steps=0", "tiny.yaml: logging.trace_steps = 0 is not positive"),
        ("logging.profile_ranks=[1]", "tiny.yaml: logging.profile_ranks = [1] requires logging.trace_step, the "
         "first step to record; set it, or leave out profile_ranks"),
        ("data.check_interval=0", "tiny.yaml: data.check_interval = 0 is not positive"),
        ("data.max_bad_shards=-1", "tiny.yaml: data.max_bad_shards = -1 is negative"),
        ("data.mixture=[{at_tokens: 10, weight: 1}]", "command line: data.mixture.0.weight is not a known key "
         "(did you mean 'weights'?)"),
        ("data.mixture=[{at_tokens: 1K, weights: [1]}]", "command line: data.mixture.0.weights = [1] is not a mapping"),
        ("data.mixture=[{at_tokens: 1K, weights: {code: a}}]", "command line: data.mixture.0.weights.code = 'a' is not "
         "a finite number"),
        ("data.mixture=[{at_tokens: 1K, weights: {cod: 1}}]", "tiny.yaml: data.mixture.0.weights.cod is not one of "
         "data.sources (did you mean 'code'?)"),
        ("data.mixture=[{at_tokens: 1K, weights: {code: 0.9}}]", "tiny.yaml: data.mixture.0.weights: the weights 0.9 "
         "sum to 0.9, not 1; divide each by 0.9"),
        ("data.mixture=[{at_tokens: 1K, weights: {code: 1, prose: 0}}]", "tiny.yaml: data.mixture.0.weights.prose = 0.0"
         " is below 1e-06; leave the source out"),
        ("data.mixture=[{at_tokens: 51200, weights: {code: 1}}]", "tiny.yaml: data.mixture.0.at_tokens = 51200 is not "
         "between 0, where the stage before it begins, and the run's 51200 tokens"),
        ("data.mixture=[{at_tokens: 1030, weights: {code: 1}}, {at_tokens: 1031, weights: {code: 1}}]", "tiny.yaml: "
         "data.mixture.1.at_tokens = 1031 is in the same step of 512 tokens as 1030"),
        ("data.skip=[{at_step: 4}]", "command line: data.skip.0.steps is missing and has no default"),
        ("data.skip=[{at_step: 4, steps: 0}]", "tiny.yaml: data.skip.0.steps = 0 is not positive; leave the entry out"),
        ("data.skip=[{at_step: 4, steps: 1}, {at_step: 4, steps: 2}]", "tiny.yaml: data.skip.1.at_step = 4 is not in "
         "5..99: entries stand in the order of their steps, one for each, within the run"),
        ("data.skip=[{at_step: 100, steps: 1}]", "tiny.yaml: data.skip.0.at_step = 100 is not in 0..99: entries stand "
         "in the order of their steps, one for each, within the run"),
        ("data.skip=[{at_step: -1, steps: 1}]", "tiny.yaml: data.skip.0.at_step = -1 is not in 0..99: entries stand "
         "in the order of their steps, one for each, within the run"),
        ("checkpoint.rewind_to=-4", "tiny.yaml: checkpoint.rewind_to = -4 is negative"),
        ("checkpoint.rewind_to=100", "tiny.yaml: checkpoint.rewind_to = 100 is not below training.steps = 100; name an "
         "earlier step"),
        ("data.sources=[]", "tiny.yaml: data.sources is empty; name at least one source with name, path and weight"),
        ("optimizer.warmup_steps=100", "tiny.yaml: optimizer.warmup_steps = 100 is not below training.steps = 100"),
        ("optimizer.schedule=wsd", "tiny.yaml: optimizer.decay_steps = 0 is not in 1..90 = "
         "training.steps 100 - warmup_steps 10, as schedule wsd needs"),
        ("optimizer.decay_steps=5", "tiny.yaml: optimizer.decay_steps = 5 is for schedule wsd; "
         "leave it out with cosine"),
        ("optimizer.muon_lr=0.02", "tiny.yaml: optimizer.muon_lr = 0.02 is for Muon; set optimizer.name = muon, or "
         "leave it out"),
        ("optimizer.momentum=1", "tiny.yaml: optimizer.momentum = 1.0 is not below 1; Muon's usual one is 0.95"),
        ("optimizer={lr: 1e-4, name: lion, eps: 1e-6}", "tiny.yaml: optimizer.eps = 1e-06 is for AdamW's second "
         "moment; leave it out with lion"),
        ("optimizer.state_dtype=int8", "tiny.yaml: optimizer.state_dtype = int8: torchao and bitsandbytes scale blocks "
         "of a rank's buffer, so that a run's numbers would depend on its layout; use bf16"),
        ("optimizer.state_dtype=bf8", "tiny.yaml: optimizer.state_dtype = 'bf8' is not fp32 or bf16"),
        ("optimizer.decay_shape=linear", "tiny.yaml: optimizer.decay_shape = linear is for schedule wsd; "
         "leave it out with cosine"),
        ("deepspeed=gone.json", "gone.json: cannot be read: No such file or directory; "
         "give the path of an existing file"),
        ("deepspeed=3", "command line: deepspeed = 3 names no DeepSpeed JSON; write deepspeed: zero1_auto.json"),
        ("deepspeed.zero_optimisation.stage=2", "ds.json: zero_optimisation is not a known key "
         "(did you mean 'zero_optimization'?)"),
        ("deepspeed.zero_optimization.stag=2", "ds.json: zero_optimization.stag is not a known key "
         "(did you mean 'stage'?)"),
    ],
)  # fmt: skip
def test_wrong_value_is_told(folder: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(override)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.virtual_stages=3", "parallel.schedule=interleaved"], "parallel.virtual_stages = 3 * pp 2 = 6 "
         "stages do not divide model.num_hidden_layers = 4; use virtual_stages 1 or 2, or a smaller pp"),
        (["parallel.virtual_stages=2", "parallel.schedule=interleaved", "model.num_hidden_layers=7"],
         "parallel.virtual_stages = 2 * pp 2 = 4 stages do not divide model.num_hidden_layers = 7; use "
         "parallel.partition with 4 entries"),
        (["parallel.extra_warmup=2", "parallel.schedule=deepspeed"], "parallel.extra_warmup = 2 is for pp > 1 and this "
         "stack's own schedules; use 0 with pp 2 and deepspeed"),
        (["parallel.extra_warmup=2", "parallel.pp=1"], "parallel.extra_warmup = 2 is for pp > 1 and this stack's own "
         "schedules; use 0 with pp 1 and 1f1b"),
        (["parallel.virtual_stages=2", "parallel.partition=[2, 2]"], "parallel.partition = [2, 2] has 2 entries, "
         "not pp * virtual_stages = 4"),
        (["parallel.virtual_stages=2", "parallel.schedule=deepspeed"], "parallel.virtual_stages = 2: DeepSpeed's own "
         "engine has one stage on a rank; use 1"),
        (["parallel.schedule=zb_h1", "compute.decoder_layer=autograd"], "parallel.schedule = zb_h1 defers weight "
         "gradients, which compute.decoder_layer = autograd cannot; use manual_backward, or schedule 1f1b or "
         "interleaved"),
        (["parallel.schedule=dualpipe_v", "parallel.virtual_stages=2", "compute.decoder_layer=autograd"],
         "parallel.schedule = dualpipe_v defers weight gradients, which compute.decoder_layer = autograd cannot; use "
         "manual_backward, or schedule 1f1b or interleaved"),
        (["parallel.joint_weight_gradients=2", "compute.decoder_layer=autograd"],
         "parallel.joint_weight_gradients = 2 defers weight gradients, which compute.decoder_layer = autograd cannot; "
         "use manual_backward, or 1"),
        (["parallel.recompute=[none, full]", "compute.decoder_layer=autograd"], "parallel.recompute = none,full "
         "requires compute.decoder_layer = manual_backward; autograd supports none or full"),
        (["parallel.recompute=auto", "compute.decoder_layer=autograd"], "parallel.recompute = auto requires "
         "compute.decoder_layer = manual_backward; autograd supports none or full"),
    ],
)  # fmt: skip
def test_schedule_that_cannot_be_is_told(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load("parallel.pp=2", *overrides)
    assert str(error.value) == f"tiny.yaml: {message}"


@pytest.mark.parametrize("size", ["num_attention_heads = 2", "num_key_value_heads = 2", "intermediate_size = 98"])
def test_tp_divides_all_that_it_cuts(folder: Path, size: str) -> None:
    """Else the ranks would hold other parts of the weights than checkpoints and counts say."""
    with pytest.raises(UserError, match=f"parallel.tp = 4 does not divide model.{size}; use 1 or 2"):
        load("parallel.tp=4", f"model.{size.replace(' ', '')}")


def test_tp_need_not_divide_the_vocabulary(folder: Path) -> None:
    """Embedding and head are padded; only a rank that would hold nothing but padding is refused."""
    assert resolve_layout(load("parallel.tp=4", "model.vocab_size=511"), 4).tp == 4
    with pytest.raises(UserError, match=r"tp = 4 leaves a rank without rows of model\.vocab_size = 6; use 1, 2 or 3"):
        resolve_layout(load("parallel.tp=4", "model.vocab_size=6"), 4)


def test_sequence_parallel_needs_a_divisible_row(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data.seq_len = 33 is not a multiple of parallel.tp = 2"):
        load("parallel.tp=2", "parallel.sequence_parallel=true", "data.seq_len=33")


def test_chunks_need_the_manual_backward_and_a_divisible_row(folder: Path) -> None:
    cut = "parallel.tp=2", "parallel.sequence_parallel=true", "data.seq_len=48", "parallel.tp_chunks=5"
    with pytest.raises(UserError, match=r"tp_chunks = 5 does not divide the 24 tokens of a row .* has; use 1, 2"):
        load(*cut)
    with pytest.raises(UserError, match=r"tp_chunks = 4 needs compute.decoder_layer = manual_backward; set it to 1"):
        load(*cut[:3], "parallel.tp_chunks=4", "compute.decoder_layer=autograd")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tp=2"], "needs parallel.tp = 1, not 2: collectives"),
        (["parallel.cp=2"], "needs parallel.cp = 1, not 2: messages"),
        (["data.document_mask=true"], "needs data.document_mask = false, not true: documents have other lengths"),
        (["compute.fp8=current", "model.intermediate_size=128"], "needs compute.fp8 = off, not current: weights in"),
        (["compute.decoder_layer=autograd"], "needs compute.decoder_layer = manual_backward, not autograd: autograd"),
        (["parallel.pp=2", "parallel.schedule=deepspeed"], "is not for parallel.schedule = deepspeed"),
        (["deepspeed.zero_optimization.stage=3"], "needs weights that stay in place, and ZeRO-3"),
    ],
)
def test_graphs_need_layers_that_repeat_the_same_work(folder: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=rf"^tiny.yaml: parallel\.cuda_graphs = true {words}.*set .* to false$"):
        load("parallel.cuda_graphs=true", *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "2 add gradients that travel in bf16, and the DeepSpeed JSON has no communication_data_type = bf16"),
        (
            ["deepspeed.communication_data_type=bf16", "deepspeed.data_types={grad_accum_dtype: bf16}"],
            "2 add gradients in fp32, and data_types.grad_accum_dtype sums them in bf16 first",
        ),
    ],
)
def test_neighbours_add_in_fp32_what_travels_in_bf16(folder: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=rf"parallel\.gradient_neighbours = {words}"):
        load_run(str(folder / "tiny.yaml"), ["parallel.pp=2", "parallel.gradient_neighbours=2", *overrides])


def test_every_stage_needs_a_layer(folder: Path) -> None:
    with pytest.raises(UserError, match=r"partition = \[4, 0\]: every stage needs a decoder layer"):
        load("parallel.pp=2", "parallel.partition=[4, 0]")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  lr: 1e-3\n", "", "tiny.yaml: optimizer.lr is missing and has no default"),
        ("name: tiny\n", "", "tiny.yaml: name is missing and has no default"),
        ("  vocab_size: 512\n", "", "tiny.yaml: model.vocab_size is missing and has no default"),
        ("  global_batch: 16\n", "", "tiny.yaml: training.global_batch is missing and has no default"),
        ("deepspeed:", "deepsped:", "tiny.yaml: deepsped is not a known key (did you mean 'deepspeed'?)"),
        ("weight: 0.7", "wait: 0.7", "tiny.yaml: data.sources.0.wait is not a known key (did you mean 'weight'?)"),
        ("deepspeed: ds.json\n", "", "tiny.yaml: deepspeed = None names no DeepSpeed JSON; "
         "write deepspeed: zero1_auto.json"),
        ("  steps: 100\n", "", "tiny.yaml: training says how long to train: "
         "steps and tokens are both missing; set one"),
        ("  steps: 100\n", "  steps: 100\n  tokens: 1M\n", "tiny.yaml: training says how long to train: "
         "steps and tokens are both set; keep one"),
        ("  lr: 1e-3\n", "  lr: 1e-3\n  lr: 2e-3\n", "tiny.yaml:22: key 'lr' is set twice, first in line 21; keep one"),
        ("  lr: 1e-3\n", "\tlr: 1e-3\n", "tiny.yaml:21: not valid YAML: "
         "found character '\\t' that cannot start any token"),
        (RUN, "- a list\n", "tiny.yaml: holds no sections; a run file is a YAML mapping "
         "(see ds_configs/quickstart.yaml)"),
        (RUN, "", "tiny.yaml: holds no sections; a run file is a YAML mapping (see ds_configs/quickstart.yaml)"),
        ("seed: 7", "seed: \0", "tiny.yaml: not valid YAML: it holds characters that YAML forbids"),
    ],
)  # fmt: skip
def test_wrong_file_is_told(folder: Path, old: str, new: str, message: str) -> None:
    assert old in RUN
    folder.joinpath("tiny.yaml").write_text(RUN.replace(old, new))
    with pytest.raises(UserError) as error:
        load()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "bf16" {}\n}', "ds.json:2: not valid JSON: Expecting ':' delimiter (column 10)"),
        ('{"bf16": {}, "bf16": {}}', "ds.json: key 'bf16' is set twice; keep one"),
        ("[]", "ds.json: holds no JSON object; a DeepSpeed file is one, such as {}"),
    ],
)
def test_wrong_json_is_told(folder: Path, text: str, message: str) -> None:
    folder.joinpath("ds.json").write_text(text)
    with pytest.raises(UserError) as error:
        load()
    assert str(error.value) == message


def test_byte_order_marks_and_other_line_ends_are_read(folder: Path) -> None:
    expected = load()
    for path in (folder / "tiny.yaml", folder / "ds.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load() == expected


def test_binary_run_file_is_told(folder: Path) -> None:
    folder.joinpath("tiny.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match=r"^tiny.yaml: is not UTF-8 text; save it as UTF-8$"):
        load()


def test_missing_run_file_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^gone.yaml: cannot be read: No such file or directory"):
        load_run("gone.yaml")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["compute.fp8=current", "compute.decoder_layer=autograd"], "requires compute.decoder_layer = manual_backward"),
        (["compute.fp8=current", "model.intermediate_size=88"], "model.intermediate_size / tp = 88 is not a multiple"),
        (["compute.fp8=delayed", "model.num_attention_heads=1", "model.num_key_value_heads=1", "model.head_dim=24"],
         "model.num_attention_heads * head_dim / tp = 24 is not a multiple of 16"),
        (["compute.fp8=current", "compute.fp8_weight_gradients=true"], "needs compute.fp8 = delayed, not current"),
        (["compute.fp8_weight_gradients=true"], "needs compute.fp8 = delayed, not off"),
        (["compute.fp8=delayed", "compute.fp8_weight_gradients=true", "data.seq_len=24"],
         "parallel.micro_batch * data.seq_len / cp = 24 is not a multiple of 16"),
    ],
)  # fmt: skip
def test_what_float8_cannot_take_is_refused_before_the_start(folder: Path, overrides: list[str], words: str) -> None:
    shape = ("model.hidden_size=64", "model.intermediate_size=96", "model.num_attention_heads=4", "model.head_dim=16")
    with pytest.raises(UserError) as error:
        load_run("tiny.yaml", [*shape, *overrides])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.name=muon", "optimizer.name = adamw, not muon"),
        ("optimizer.state_dtype=bf16", "optimizer.state_dtype = fp32, not bf16"),
        ("compute.fp8=current", "compute.fp8 = off, not current"),
        ("checkpoint.compare_states=true", "checkpoint.compare_states = false, not true"),
        ("checkpoint.compare_repeats=10", "checkpoint.compare_repeats = 0, not 10"),
        ("logging.check_finite=true", "logging.check_finite = false, not true"),
    ],
)
def test_a_step_before_its_norm_needs_what_can_be_undone(folder: Path, override: str, words: str) -> None:
    pipeline = ("parallel.pp=2", "parallel.schedule=zb_v", "parallel.virtual_stages=2", "parallel.post_validation=true")
    load(*pipeline)
    with pytest.raises(UserError) as error:
        load(*pipeline, override)
    assert f"parallel.post_validation = true needs {words}; change one of them" in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "model.head_dim=12",
            "model.head_dim = 12: flash_attn takes multiples of 8 up to 256; change it or use compute",
        ),
        ("model.head_dim=264", "model.head_dim = 264: flash_attn takes multiples of 8 up to 256"),
        ("deepspeed.bf16.enabled=false", "flash_attn computes in bf16 and the DeepSpeed JSON has bf16.enabled = false"),
    ],
)
def test_what_flash_attn_cannot_take_is_refused_before_the_start(folder: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_run("tiny.yaml", ["compute.attention_backend=flash_attn", override])
    assert words in str(error.value)
