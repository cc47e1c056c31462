"""The planner against published runs: its errors stay within those in docs/planner.md; bad rows are refused."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from published import DATA, HEADER, MACHINES, checked, times

from llama_ds.errors import UserError
from llama_ds.layout.axes import Axes
from llama_ds.perf.plan.fit import BOUNDS, fit, loss, usable
from llama_ds.perf.plan.kernel_speeds import FLASH_1, FLASH_2, relative_speed
from llama_ds.perf.plan.likely import SPANS
from llama_ds.perf.plan.memory import VISIBLE, layer_activations, needed_memory, published_memory
from llama_ds.perf.plan.program import (
    AUTOGRAD,
    LLAMA,
    MEGATRON,
    MEGATRON_BF16,
    MEGATRON_LM,
    MEGATRON_LM_BF16,
    NEMO,
    NEMO_GPT,
    NEOX,
    ZERO3_2021,
    Program,
)
from llama_ds.perf.plan.program_options import (
    with_attention,
    with_bf16_states,
    with_biases,
    with_broadcasts,
    with_cast_norms,
    with_copies,
    with_deepspeed,
    with_fused_head,
    with_fused_loss,
    with_fused_optimizer,
    with_fused_swiglu,
    with_gradient_buffers,
    with_megatron,
    with_own_sums,
    with_plain_norms,
    with_plain_optimizer,
    with_plain_rotation,
    with_recomputed_norms,
    with_recomputed_swiglu,
    with_separate_gate,
    with_small_gradients,
    with_small_logits,
    with_sums_beside_weights,
    with_transformers,
    with_waiting_reduction,
    without_flash,
)
from llama_ds.perf.plan.row_programs import program_of
from llama_ds.perf.plan.rows import KINDS, Row, read_rows, stages_of
from llama_ds.perf.plan.step import step_time
from llama_ds.perf.plan.tables import errors
from llama_ds.perf.plan.validate import (
    Checked,
    assumptions,
    check,
    fits,
    groups,
    likely_runs,
    measured_spread,
    predict,
    quantile,
    spans,
    stated_flops,
    summary,
)

FILES = ("published_runs.csv", "held_out_runs.csv", "a100_single_node_runs.csv")
GOOD = "x,Somebody 2026,GPT,4096,32,32,32,16384,50257,2048,A100-80GB,8,1,1,8,1,0,full,1,4,64,iteration_s,10.0,"


@pytest.fixture(scope="module")
def published() -> list[Checked]:
    return checked("published_runs.csv")


@pytest.fixture(scope="module")
def single_node() -> list[Checked]:
    return checked("a100_single_node_runs.csv", every=5)


def test_a100_runs_with_a_stated_layout_are_predicted_within_bounds(published: list[Checked]) -> None:
    found = summary(times(published, "a100"))
    assert found["rows"] >= 190
    assert found["median"] < 0.05
    assert found["p90"] < 0.16


def test_small_models_on_one_node_are_predicted_within_bounds(single_node: list[Checked]) -> None:
    found = summary(single_node)
    assert found["rows"] == 288
    assert found["median"] < 0.085
    assert found["p90"] < 0.22


def test_h100_runs_are_predicted_within_bounds(published: list[Checked]) -> None:
    found = summary([c for c in times(published, "h100") if "mosaicml" in c.row.source])
    assert found["rows"] >= 30
    assert found["median"] < 0.06


def test_memory_is_predicted_within_bounds(published: list[Checked]) -> None:
    found = summary([c for c in published if c.row.kind == "peak_mem_gib" and c.row.gpu.startswith("a100")])
    assert found["rows"] >= 40
    assert found["median"] < 0.07


def test_every_source_is_in_the_table_once(published: list[Checked]) -> None:
    tables = groups(published)
    assert sum(map(len, tables.values())) == len(published)
    assert any("Korthikanti" in name for name in tables)


def test_the_planner_says_which_runs_fit() -> None:
    rows = [row for name in ("published_runs.csv", "a100_single_node_runs.csv") for row in read_rows(DATA / name)]
    found = fits(rows, MACHINES)
    assert found and (found.ran, found.failed) == (1804, 8)
    assert found.said_to_fail >= 6, "184B with tp 4, pp 6 is predicted at 79 GiB and 206B with tp 4, pp 12 at 59"
    larger = fits(rows[: len(read_rows(DATA / "published_runs.csv"))], MACHINES)
    assert larger and min(found.agreement, larger.agreement) >= 0.98, "13B, 405B and 530B are said not to fit, but ran"
    assert fits([], MACHINES) is None


def test_the_likely_interval_is_that_of_the_measured_runs() -> None:
    """llama_ds/perf/plan/likely.py holds what all A100 rows of docs/calibration give."""
    checked, _ = check([row for name in FILES for row in read_rows(DATA / name)], MACHINES)
    found = spans(checked)
    assert found.keys() == SPANS.keys()
    for kind, span in found.items():
        assert (round(span.low, 3), round(span.high, 3), span.runs, round(span.covered, 3)) == SPANS[kind]
        assert span.low < 1 < span.high
        assert span.covered >= 0.8, "of a source's runs by the interval that the other sources give"
    inside, runs = likely_runs(checked)
    assert runs == sum(span.runs for span in found.values())
    assert 0.8 * runs < inside < runs


def test_kernels_of_attention_differ_by_device_and_head() -> None:
    assert relative_speed(FLASH_2, "A100", 128) == 1
    assert relative_speed(FLASH_1, "A100", 128) < relative_speed("Triton", "A100", 128) < 1
    assert relative_speed(FLASH_1, "A100", 128) < relative_speed(FLASH_1, "A100", 64)
    assert relative_speed("cuDNN", "H100", 128) > 1 == relative_speed("cuDNN", "A100", 128)


@pytest.mark.parametrize(
    ("note", "program", "flash"),
    [
        ("flash attn", with_plain_norms(LLAMA), True),
        ("flash attn; RMSNorm kernel", LLAMA, True),
        ("PyTorch FSDP", AUTOGRAD, True),
        ("nanotron v0.5", with_gradient_buffers(AUTOGRAD), True),
        ("torchtitan, RMSNorm by torch's operations", with_plain_norms(AUTOGRAD), True),
        ("FSDP; kernels for RMSNorm and loss", with_fused_loss(AUTOGRAD), True),
        ("HSDP; torch.compile; gradients in bf16", with_small_gradients(AUTOGRAD), True),
        ("NeMo 24.09", NEMO, True),
        ("Transformer Engine, kernel for RMSNorm", with_fused_swiglu(LLAMA), True),
        ("kernel for RMSNorm; rotary embedding by operations", with_plain_rotation(LLAMA), True),
        ("DeepSpeed; kernel for RMSNorm", with_deepspeed(LLAMA), True),
        ("Megatron-LM; kernel for RMSNorm", with_megatron(LLAMA), True),
        ("kernels for RMSNorm, of fp32 copies", with_cast_norms(LLAMA), True),
        ("HSDP, by broadcasts of whole tensors", with_broadcasts(AUTOGRAD), True),
        ("RMS kernel; gate and up in separate products", with_separate_gate(LLAMA), True),
        ("transformers' layer, RMS kernel", with_transformers(LLAMA), True),
        ("RMS kernel, rows unpadded around attention", with_copies(LLAMA, 18, 22), True),
        ("RMS kernel, keys and values repeated to all heads", with_copies(LLAMA, 4, 4), True),
        ("RMS kernel, keys and values repeated before rotation", with_copies(LLAMA, 36, 46), True),
        ("RMS kernel; each with its own sum of input gradients", with_own_sums(LLAMA), True),
        ("RMS kernel; each sum of input gradients beside a weight gradient", with_sums_beside_weights(LLAMA), True),
        ("RMS kernel; sharding stage 2", with_waiting_reduction(LLAMA), True),
        ("RMS kernel; norms computed again in the backward", with_recomputed_norms(LLAMA), True),
        ("RMS kernel; AdamW by operations", with_plain_optimizer(LLAMA), True),
        ("RMS kernel and biases", with_biases(LLAMA), True),
        ("kernel for RMSNorm; gradients in fp16", with_small_gradients(LLAMA), True),
        ("kernel for RMSNorm; reduction beside the backward", AUTOGRAD, True),
        ("kernel for RMSNorm; FlashAttention-1", with_attention(LLAMA, FLASH_1), True),
        ("kernel for RMSNorm; FlashAttention-2", LLAMA, True),
        ("kernel for RMSNorm; flash_attn v1.0.9", with_attention(LLAMA, FLASH_1), True),
        ("kernel for RMSNorm; flash attention 2.3", LLAMA, True),
        ("flash attn, without a kernel for RMSNorm", with_plain_norms(LLAMA), True),
        ("FSDP; unfused RMSNorm", with_plain_norms(AUTOGRAD), True),
        ("no fused RMSNorm; flash attn 2", with_plain_norms(LLAMA), True),
        ("no compiler: kernel for RMSNorm without overlap", LLAMA, True),
        ("kernel for RMSNorm; loss by operations", LLAMA, True),
        ("RMS kernel; loss of 16-bit logits", with_small_logits(LLAMA), True),
        ("RMS kernel; fused AdamW", with_fused_optimizer(LLAMA), True),
        ("kernels for RMSNorm and SwiGLU", with_fused_swiglu(LLAMA), True),
        ("kernels for RMSNorm; SwiGLU by operations", LLAMA, True),
        ("weights and states in bf16, RMS kernel; fused AdamW", with_fused_optimizer(with_bf16_states(LLAMA)), True),
        ("RMS kernel; SwiGLU's result computed again", with_recomputed_swiglu(LLAMA), True),
        ("RMS kernel; head and loss in one kernel by parts", with_fused_head(LLAMA), True),
        ("transformers' layer, RMS kernel; kernel for the loss", with_fused_loss(with_transformers(LLAMA)), True),
        ("torch attention", without_flash(with_plain_norms(LLAMA), False), False),
        ("Megatron attention, RMS kernel", without_flash(LLAMA, True), False),
        ("RMS kernel; attention kernel: torch", without_flash(LLAMA, False), False),
        ("kernel=megatron; RMS kernel", without_flash(LLAMA, True), False),
    ],
)
def test_a_llama_program_is_that_of_the_note(note: str, program: Program, flash: bool) -> None:
    found = program_of({"note": note, "model": "LLaMA-13B"})
    assert found is program and found.flash is flash


def test_a_gpt_program_is_that_of_the_note() -> None:
    assert program_of({"note": "NeMo 24.09; flash; bf16", "model": "GPT-175B"}) is NEMO_GPT
    found = [
        program_of({"note": note, "model": "GPT-175B", "source": source})
        for note, source in (
            ("DeepSpeed ZeRO-3 of 2021", ""),
            ("as NeoX; FlashAttention-2", ""),
            ("Megatron-DeepSpeed, fp16", "Somebody 2026"),
            ("bf16", "BigScience chronicles"),
            ("fp16", "Somebody 2026"),
            ("bf16", "Somebody 2026"),
        )
    ]
    expected = ZERO3_2021, with_attention(NEOX, FLASH_2), MEGATRON, MEGATRON_BF16, MEGATRON_LM, MEGATRON_LM_BF16
    assert found == list(expected)


def test_it_is_said_what_rows_leave_open(tmp_path: Path) -> None:
    """A run read as another program than it was would be blamed on the planner."""
    stated = GOOD.replace(",8,1,1,8,1,0,full,1,4,64,", ",16,2,1,8,1,1,full,1,4,64,").replace("GPT,", "LLaMA,")
    open_ = stated.replace(",1,1,full,1,", ",1,,,,").replace(",50257,", ",,")
    note = '"kernel for RMSNorm; flash_attn 2; no overlap; 400 Gbps"'
    (tmp_path / "mine.csv").write_text("\n".join([HEADER, stated + note, open_, GOOD + "FSDP", ""]))
    rows = read_rows(tmp_path / "mine.csv")
    assert rows[0].assumed == rows[2].assumed == ()
    words = "a vocabulary of 50,257", "no recompute", "no ZeRO", "no sequence parallelism"
    kernels = "attention by FlashAttention-2", "norms by operations", "gradients reduced behind the last backward"
    assert rows[1].assumed == (*words, "the network of the machine's description", *kernels)
    assert assumptions([*rows, rows[1]], MACHINES) == dict.fromkeys(rows[1].assumed, 2)
    data, text = errors(check(rows, MACHINES)[0], {}, {}, None, each=False)
    stated = data["overall"]["all A100, network stated | time"]
    assert (data["overall"]["all A100 | time"]["rows"], stated["rows"]) == (3, 2) and "network stated" in text


def test_norms_by_operations_and_scores_take_time_and_memory(tmp_path: Path) -> None:
    """The same run with each program: time and memory grow with what its kernels move and keep."""
    notes = ("PyTorch FSDP", "RMSNorm kernel", "", "torch attention")
    row = GOOD.replace("GPT,", "LLaMA,").replace(",1,0,full,", ",1,0,none,")
    (tmp_path / "mine.csv").write_text("\n".join([HEADER, *(row + note for note in notes)]) + "\n")
    read = read_rows(tmp_path / "mine.csv")
    times = [item.predicted for item in check(read, MACHINES)[0]]
    assert times == sorted(set(times))
    held = [published_memory(row.job, reserved=False) for row in read if row.job]
    assert held[0] == held[1] < held[2] < held[3]


def test_a_fused_loss_and_16_bit_gradients_take_less_time_and_memory(tmp_path: Path) -> None:
    row = GOOD.replace("GPT,", "LLaMA,").replace(",1,0,full,1,", ",1,0,none,3,")
    notes = ("FSDP", "FSDP; kernels for RMSNorm and loss", "FSDP; gradients in bf16")
    (tmp_path / "mine.csv").write_text("\n".join([HEADER, *(row + note for note in notes)]) + "\n")
    read = read_rows(tmp_path / "mine.csv")
    plain, fused, small = (item.predicted for item in check(read, MACHINES)[0])
    assert fused < plain and small < plain
    held = [needed_memory(row.job) for row in read if row.job]
    assert max(held[1:]) < held[0]


def test_steps_of_zero_3_in_2021_are_bound_by_one_link_of_a_node(published: list[Checked]) -> None:
    """Narayanan et al., table 2: on 768 and 1,536 GPUs 174.6B takes the same time, though each computes half as much.

    A ring over one of eight links moves the weights three times in no less than 3 x 2 bytes x 174.6e9 / 25 GB/s = 42 s.
    """
    found = {c.row.id: c for c in published if c.row.id.startswith("nar_zero3")}
    assert len(found) == 6 and all(abs(c.error) < 0.3 for c in found.values())
    rates = [found[f"nar_zero3_175b_{n}"].predicted for n in (768, 1536)]
    assert rates[0] / rates[1] == pytest.approx(2, rel=0.05)
    seconds = 96 * 2048 * 96 * 12288**2 * (1 + 2048 / 6 / 12288) / rates[1] / 1e12
    assert seconds > 42
    gpu = MACHINES["a100-80gb"].with_links(None, 200.0)
    for job in (c.row.job for c in found.values() if c.row.job):
        assert step_time(gpu, replace(job, program=MEGATRON)).seconds < step_time(gpu, job).seconds / 1.2


def test_what_the_allocator_keeps_is_more_than_a_run_needs(published: list[Checked]) -> None:
    """fp32 copies of 16-bit gradients exist when the activations have gone, but in blocks of their own."""
    for job in (c.row.job for c in published if c.row.job and c.row.job.whole_model):
        used = needed_memory(job) * VISIBLE  # the rest of a device is the driver's
        assert published_memory(job, reserved=False) < used <= published_memory(job, reserved=True)


def test_the_spread_of_ranks_is_that_of_runs_repeated_on_more_gpus() -> None:
    """The default of `Hardware.rank_spread`: the median over the series, to its three digits."""
    found = measured_spread(read_rows(DATA / "published_runs.csv"), MACHINES)
    assert len(found) >= 7 and "nemo_l31_70b_64" in found
    assert round(statistics.median(found.values()), 3) == MACHINES["a100-80gb"].rank_spread


def test_layouts_that_ran_out_of_memory_are_predicted_not_to_fit(published: list[Checked]) -> None:
    """BigScience's layouts that ran out of 80 GB (docs/calibration/CONVENTIONS.md, section 3), by a similar row."""
    near = next(c.row.job for c in published if c.row.id == "bs_181b_h14336_tp8pp12dp4_mb1_gbs2048_a64_0221")
    assert near is not None

    def gib(tp: int, pp: int, dp: int, micro: int) -> float:
        stages = stages_of(72, pp, "full")
        job = replace(
            near, axes=Axes(pp=pp, dp=dp, tp=tp), micro_batch=micro, micro_batches=2048 // dp // micro, stages=stages
        )
        return published_memory(job, reserved=True) / 2**30

    assert gib(8, 12, 4, 1) < 80
    assert gib(8, 1, 48, 1) > 80
    assert gib(2, 6, 32, 1) > 80
    assert gib(2, 6, 32, 2) > gib(2, 6, 32, 1)


def test_activations_follow_korthikanti(published: list[Checked]) -> None:
    """arXiv 2205.05198: equation 2 with tp, equation 4 with sequence parallelism, 34 s b h / t with selective."""
    row = next(c.row for c in published if c.row.id == "korth_22b_selsp")
    assert row.job is not None
    model, t = row.job.model, row.job.tp
    sbh = row.job.tokens * model.hidden_size
    scores = 5 * model.num_attention_heads * row.job.seq_len / model.hidden_size
    assert layer_activations(row.job, "selective") == pytest.approx(34 * sbh / t)
    assert layer_activations(row.job, "none") == pytest.approx(sbh / t * (34 + scores))
    plain = replace(row.job, sequence_parallel=False)
    assert layer_activations(plain, "none") == pytest.approx(sbh * (10 + 24 / t + scores / t))
    assert layer_activations(plain, "full") == 2 * sbh


def test_flops_are_counted_as_in_the_sources(published: list[Checked]) -> None:
    """Korthikanti's 1.10 s for the 22B model are 41.5% MFU and 43.7% HFU (table 5)."""
    row = next(c.row for c in published if c.row.id == "korth_22b_selsp")
    assert row.job is not None
    per_second = row.job.rows * row.job.seq_len / 1.10 / 8 / MACHINES["a100-80gb"].peak
    assert stated_flops(row.job, hardware=False) * per_second == pytest.approx(0.415, abs=0.004)
    assert stated_flops(row.job, hardware=True) * per_second == pytest.approx(0.437, abs=0.004)
    predicted = {kind: predict(replace(row, kind=kind), MACHINES["a100-80gb"]) for kind in KINDS[:-1]}
    assert predicted["tflops_per_gpu_hw"] == pytest.approx(predicted["hfu_pct"] * 3.12)
    assert predicted["tflops_per_gpu_model"] == pytest.approx(predicted["mfu_pct"] * 3.12)


def test_a_row_becomes_the_job_that_it_states(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    note = '"flash attn; 400 Gbps"'
    bare = GOOD.replace("full", "none").replace(",8,1,1,8,", ",8,,,,")
    path.write_text(f"{HEADER}\n{GOOD}{note}\n{bare}\n")
    stated, unstated = read_rows(path)
    assert stated.job is not None
    assert (stated.job.dp, stated.job.micro_batches, stated.job.stages) == (8, 2, ((("full", 32),),))
    assert stated.links == (None, 50.0, None)
    assert unstated.job is None and unstated.skipped == "tp, pp, dp not stated"
    checked, skipped = check([stated, unstated], MACHINES)
    assert len(checked) == 1 and skipped == {"tp, pp, dp not stated": 1}


def test_a_row_may_state_shared_rows_copies_of_shards_recompute_of_some_layers_and_ties(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    llama = GOOD.replace("GPT,", "LLaMA,")
    shared = llama.replace(",8,1,1,8,", ",16,1,1,8,") + "cp 2; FSDP"
    hybrid = llama.replace(",8,1,1,8,", ",32,1,1,32,").replace(",full,1,4,", ",op,3,2,") + "HSDP"
    half = llama.replace("full", "full:1/3") + "FSDP"
    pairs = llama.replace(",8,1,1,8,", ",32,2,1,16,") + "HSDP"
    tied = llama + "weights of embedding and head tied"
    path.write_text("\n".join([HEADER, shared, hybrid, half, shared.replace("cp 2", "cp 3"), pairs, tied]) + "\n")
    rows = read_rows(path)
    jobs = [row.job for row in rows]
    assert jobs[0] and jobs[0].axes.cp == 2 and jobs[0].sharing.size == 2 and jobs[0].state_group.size == 16
    assert rows[4].job and rows[4].job.state_group.size == 4, "a node of 8 GPUs holds four pairs"
    assert [job.model.tie_word_embeddings for job in jobs if job] == [False, False, False, False, True]
    assert jobs[1] and jobs[1].state_group.size == 8 and jobs[1].stages == ((("op", 32),),)
    assert jobs[2] and jobs[2].stages == ((("full", 10), ("none", 22)),)
    assert rows[3].skipped == "tp 1 * pp 1 * cp 3 * dp 8 is not n_gpus 16"
    # Copies on other nodes save the gathers between nodes, and take memory.
    flat = replace(jobs[1], state_ranks=0)
    gpu = MACHINES["a100-80gb"].with_links(None, 25.0)
    assert step_time(gpu, jobs[1]).seconds < step_time(gpu, flat).seconds
    assert needed_memory(jobs[1]) > needed_memory(flat)
    times = [step_time(gpu, replace(flat, stages=(((name, 32),),))).seconds for name in ("none", "op", "full")]
    assert times == sorted(set(times))


def test_machines_for_export_have_eight_links(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("\n".join([HEADER, *(GOOD.replace("A100", name) for name in ("A100", "A800", "H800"))]) + "\n")
    rows = read_rows(path)
    assert [row.gpu for row in rows] == ["a100-80gb", "a100-80gb", "h100-80gb-2023"]
    own = [MACHINES[row.gpu].links.nvlink_gb_s for row in rows]
    assert rows[0].links == (None, None, None)
    assert rows[1].links[0] == pytest.approx(own[1] * 8 / 12)
    assert rows[2].links[0] == pytest.approx(own[2] * 8 / 18)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{HEADER}\n{GOOD.replace('10.0', 'ten')}\n", ":2: value = 'ten' is not a number"),
        (f"{HEADER}\n{GOOD}\n{GOOD.replace('10.0', '-1')}\n", ":3: value = '-1' is neither a positive number nor OOM"),
        (f"{HEADER}\n{GOOD.replace('10.0', 'nan')}\n", ":2: value = 'nan' is not a number"),
        (f"{HEADER}\n{GOOD.replace('4096,32', '4096,0')}\n", ":2: layers = 0 is not a positive whole number"),
        (f"{HEADER}\n{GOOD.replace('4096,32', '4096,1.5')}\n", ":2: layers = 1.5 is not a positive whole number"),
        (f"{HEADER}\n{GOOD.replace('iteration_s', 'hours')}\n", ":2: measured_kind = 'hours' is not one of"),
        (f"{HEADER}\n{GOOD.replace('full', 'some')}\n", ":2: recompute = 'some' is not one of"),
        (f"{HEADER}\n{GOOD.replace(',1,0,full', ',1,on,full')}\n", ":2: sequence_parallel = 'on' is not 0 or 1"),
        (f"{HEADER}\n{GOOD}\n{GOOD}\n", ":3: repeats line 2"),
        (f"{HEADER}\n{GOOD}rings of 1.2.3 GB/s\n", ":2: note: the number at 'rings of' is not one"),
        (f"{HEADER}\n{GOOD}0 Gbps\n", ":2: note: the number at 'Gbps' is not one"),
        (f"{HEADER}\n{GOOD}{'1' * 400} Gbps\n", ":2: note: the number at 'Gbps' is not one"),
        (f"{HEADER}\n{GOOD}nodes of 0 GPUs\n", ":2: note: the number at 'nodes of' is not one"),
        (f"{HEADER}\n{GOOD}cp 0\n", ":2: note: cp 0 is not from 1"),
        (f"{HEADER}\n{GOOD}x\n".replace("iteration_s,10.0", "mfu_pct,150"), ":2: value = 150 is above 100 percent"),
        (f"{HEADER}\n{GOOD}a kernel for RMSNorm, 400 Gbps\n", ":2: has more fields than the header"),
        ("id,source\nx,y\n", ":1: column model is missing"),
        ("", ":1: column id is missing"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert words in str(error.value)


def test_files_of_spreadsheets_and_data_frames_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    sharded = GOOD.replace(",8,1,1,8,1,0,", ",8,2,1,4,1,1,")
    words = [sharded.replace(",4,1,1,full", f",4,1,{word},full") for word in ("True", "1.0", "FALSE", "")]
    path.write_text("\ufeff" + "\r\n".join([HEADER, sharded, *words]) + "\r\n")
    assert [row.job and row.job.sequence_parallel for row in read_rows(path)] == [True, True, True, False, False]


def test_a_batch_that_ranks_cannot_share_is_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    memory = GOOD.replace(",64,iteration_s,10.0", ",60,peak_mem_gib,40.0")
    path.write_text("\n".join([HEADER, GOOD.replace(",64,", ",60,"), memory, memory.replace(",60,", ",16,")]) + "\n")
    rows = read_rows(path)
    assert rows[0].skipped == "global_batch_seqs 60 is no multiple of dp 8 * micro_batch 4"
    assert rows[1].job and rows[1].job.micro_batches == 1, "peak memory needs no whole number"
    assert rows[2].skipped == "global_batch_seqs 16 is no multiple of dp 8 * micro_batch 4"


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv: cannot be read"):
        read_rows("nowhere.csv")


def test_the_fit_recovers_the_constants_behind_the_rows() -> None:
    """The model itself generates the rows; from a wrong ceiling, the fit returns to the true one."""
    machine = MACHINES["a100-80gb"]
    rows = [row for row in usable(read_rows(DATA / "published_runs.csv"), {"a100-80gb": machine}, 1) if row.job][::20]
    checked, _ = check(rows, MACHINES)
    generated: list[Row] = [replace(c.row, value=c.predicted) for c in checked]
    wrong = replace(machine.calibration, gemm_ceiling=0.6)
    found = fit(generated, {"a100-80gb": machine}, wrong, free=("gemm_ceiling",), rounds=7)
    assert found.gemm_ceiling == pytest.approx(machine.calibration.gemm_ceiling, rel=0.02)
    assert loss(generated, {"a100-80gb": machine}, found) < 0.01


@pytest.mark.parametrize("name", ["a100-80gb", "a100-40gb", "a100-64gb", "h100-80gb", "h100-80gb-2023", "h200"])
def test_constants_are_within_physical_bounds(name: str) -> None:
    for constant, (low, high) in BOUNDS.items():
        assert low <= getattr(MACHINES[name].calibration, constant) <= high, constant
    assert MACHINES[name].calibration.sources


def test_layers_are_spread_evenly_with_fewer_on_the_end_stages() -> None:
    assert [sum(n for _, n in stage) for stage in stages_of(30, 8, "none")] == [3, 4, 4, 4, 4, 4, 4, 3]
    assert stages_of(70, 72, "full")[0] == () and stages_of(70, 72, "full")[-1] == ()


def test_quantiles_are_interpolated() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 1.0], 0.9) == pytest.approx(0.9)
    assert quantile([5.0], 0.9) == 5.0


@pytest.mark.parametrize(
    ("note", "gb_s"),
    [("1600 Gbps", 200.0), ("1,600 Gbps", 200.0), ("62.5 Gbps", 7.8125), ("8x200 Gbps", 200.0), ("8 x 200Gbps", 200.0)],
)
def test_a_note_s_bandwidth_is_read_whole(tmp_path: Path, note: str, gb_s: float) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(f'{HEADER}\n{GOOD}"{note}"\n')
    assert read_rows(file)[0].links[1] == gb_s


@pytest.mark.parametrize("name", ["zb_v", "ZB-V", "zb_h1", "V-Half", "v_min", "dualpipe_v", "DualPipe"])
def test_a_schedule_that_rows_cannot_state_is_not_planned_as_1f1b(tmp_path: Path, name: str) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(f"{HEADER}\n{GOOD.replace(',8,1,1,8,', ',8,1,2,4,')}{name}\n")
    assert read_rows(file)[0].skipped == f"schedule {name}, of which rows state ZB-1p and ZB-2p only"
