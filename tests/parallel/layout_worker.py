"""One rank of a layout test: trains every given case on the real engines; rank 0 writes the histories as JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ds import log
from llama_ds.checkpoint.weights import DTYPES
from llama_ds.config.context_parallel import cp_sizes
from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.errors import Corruption, UserError
from llama_ds.layout.cp_traffic import cp_traffic, sent_bytes
from llama_ds.layout.optimizer_states import MASTER
from llama_ds.layout.rank_memory import rank_memory
from llama_ds.layout.weights import key_of, weight_of
from llama_ds.model import weight_gradients
from llama_ds.parallel import messages, world
from llama_ds.parallel.context_parallel import GroupContextParallel
from llama_ds.parallel.layer_norms import LayerNorms
from llama_ds.parallel.optimizer_state import fragments
from llama_ds.parallel.temporary import dismantle
from llama_ds.parallel.trace import Trace
from llama_ds.schedules.schedule import defers
from llama_ds.training.engines.build import build_engine
from llama_ds.training.lr_schedule import learning_rate
from llama_ds.training.replica_check import ReplicaCheck
from llama_ds.training.setup import check_same_order
from llama_ds.training.step_checks import StepChecks
from tests.emulated_graphs import EmulatedGraphs
from tests.parallel.engine_series import engines_in_turn
from tests.parallel.layout_cases import (
    GLOBAL_BATCH,
    SEQ_LEN,
    STEPS,
    VALIDATION,
    Case,
    micro_batches,
    reference_model,
    step_batches,
)
from tests.parallel.reduction_order import watched_reductions
from tests.parallel.step_memory import counted_matrices


def train(case: Case) -> tuple[list[tuple[float, float]], float, dict[str, list[float]]]:
    """Return loss and gradient norm of each step, the validation loss after the last, and that step's norms by kind."""
    once = case.steps - 1  # in the step before the last
    every: dict[str, Any] = {"compare_replicas": once, "compare_norms": True}
    if not case.post_validation:
        every |= {"compare_repeats": once, "compare_states": True}
    run = replace(case.run, checkpoint=replace(case.run.checkpoint, **every))
    config, graphs = deepspeed_config(run, case.layout, bf16_native=True), EmulatedGraphs()
    engine = build_engine(run, case.layout, config, torch.device("cpu"), graphs=graphs)
    added: Counter[int] = Counter()
    engine.context.weight_gradients.observers.append(lambda weight, buffer, together: added.update([together]))
    check_initial_weights(case, engine.deepspeed)
    if case.pass_times:
        check_other_orders_are_refused(case)
    batches = micro_batches(case, engine.dp_rank)
    history, results, ledgers = [], [], []
    norms = LayerNorms(engine.deepspeed, run.model)
    here = torch.distributed.get_rank(), ["host"] * case.world, torch.device("cpu")
    checks = StepChecks(run, case.layout, engine, *here)
    # Their rows are too long for any: products for several micro-batches, and for one, within one layer.
    small = patch.object(weight_gradients, "multiplied_jointly", lambda tokens, outputs, inputs, *_: outputs > inputs)
    with small, cp_bytes() as sent, patch.object(checks, "examine", uncounted(sent, checks.examine)):
        for step in range(case.steps):
            if step == case.steps - 1:
                norms.measure()
                if case.muon:
                    engine.trace.start()
            checks.before_step(step + 1)
            counted = case.muon and step >= case.steps - 3
            deferred = reduces_deferred(case) and step == case.steps - 1
            with (
                counted_matrices(engine.deepspeed) if counted else nullcontext() as ledger,
                watched_reductions(engine.deepspeed) if deferred else nullcontext(),
            ):
                results.append(engine.train_step(batches, learning_rate(step, run.optimizer, STEPS)))
            ledgers += [ledger] if ledger else []
            assert checks.lines() == [], "no step is suspicious"
            if not case.post_validation:  # reading settles the step
                history.append(engine.read(results.pop()))
    history += map(engine.read, results)
    layer_check = checks.layer_check
    joint = case.joint_weight_gradients
    assert max(added, default=1) == joint, added  # micro-batches of which gradients were added at once
    if not case.post_validation:
        assert layer_check is not None and layer_check.exact is not None and layer_check.exact.all(), (
            "a CPU repeats all"
        )
    by_weight = norms.sums().wait(history[-1][1])
    if case.cp > 1 and case.recompute == "none":
        check_sent(case, sum(sent))
    if (case.dtype, case.zero, case.decoder_layer) == ("bf16", 1, "manual_backward"):
        # Straight into BF16_Optimizer's fp32 buffers: no matrix has a gradient in bf16.
        assert all(p.grad is None for n, p in engine.deepspeed.module.named_parameters() if "_proj" in n)
    if case.bf16_sums:
        check_bf16_sums(case, engine.deepspeed.optimizer)
    if case.muon:
        check_orthogonalised(case, engine.deepspeed, [norm for _, norm in history])
        check_memory(case, [ledger.most_matrices for ledger in ledgers], history[-1][1])
        if case.pp > 1 and case.schedule != "deepspeed":
            check_order(case, engine.trace, history[-2][1])
    assert bool(graphs.replays) == case.cuda_graphs
    batches = step_batches(case, engine.dp_rank, VALIDATION)
    validation = engine.evaluate(batches, len(batches))
    if case.vocab % case.tp:
        check_padding(case, engine.deepspeed)
    if case.zero < 3 and case.layout.data_axis > 1:
        check_replicas(case, engine.deepspeed, checks.replicas)
    dismantle(engine.deepspeed)
    return history, validation, {kind: list(found.values()) for kind, found in by_weight.items()}


def reduces_deferred(case: Case) -> bool:
    """Return whether our pipeline reduces weight gradients that it has deferred."""
    defers_some = defers(case.schedule, case.joint_weight_gradients)
    return case.pp > 1 and case.layout.data_axis > 1 and case.schedule != "deepspeed" and defers_some


def check_other_orders_are_refused(case: Case) -> None:
    """Check that no rank begins a step if one has read other times of passes: it would wait for ever."""
    check_same_order(case.run, case.layout)
    times = (1, 1, 1, 0) if world.find_rank_info().rank == 2 else case.pass_times
    run = replace(case.run, parallel=replace(case.run.parallel, pass_times=times))
    try:
        check_same_order(run, case.layout)
    except UserError as error:
        assert "ranks 0 and 2 derive different orders of computations" in str(error)
    else:
        raise AssertionError("no rank noticed that the orders differ")


def check_initial_weights(case: Case, engine: Any) -> None:
    """Check that the masters are bit for bit those of plain torch, rounded to the dtype of training."""
    plain = plain_weights(case.reference)
    for fragment in fragments(engine):
        whole, cut = plain[key_of(fragment.name)], weight_of(fragment.name).cut
        shard = whole if cut is None else padded_shard(whole, cut, case.tp, engine.mpu.get_tensor_model_parallel_rank())
        part = shard.flatten()[fragment.start :][: fragment.numel]
        assert torch.equal(fragment.tensors[MASTER].float(), part.to(DTYPES[case.dtype]).float()), fragment.name


@contextmanager
def cp_bytes() -> Iterator[list[int]]:
    """Collect the bytes that this rank hands to its context-parallel groups for other ranks."""
    sent: list[int] = []
    post, exchange = GroupContextParallel.start_pass, GroupContextParallel.all_to_all

    def posted(self: GroupContextParallel, x: Tensor) -> Any:
        sent.append(x.nbytes)
        return post(self, x)

    def exchanged(self: GroupContextParallel, x: Tensor) -> Tensor:
        sent.append(x.nbytes * (len(x) - 1) // len(x))
        return exchange(self, x)

    with patch.multiple(GroupContextParallel, start_pass=posted, all_to_all=exchanged):
        yield sent


def uncounted(sent: list[int], examine: Callable[[], None]) -> Callable[[], None]:
    """Return a comparison of which `sent` keeps nothing: a layer that is computed again sends its messages again."""

    def examined() -> None:
        before = len(sent)
        examine()
        del sent[before:]

    return examined


def check_sent(case: Case, sent: int) -> None:
    """Check the bytes of context parallelism against the formula."""
    tokens, tp, sizes = case.micro_batch * SEQ_LEN // case.cp, case.tp, cp_sizes(case.run)[0]
    traffic = cp_traffic(sizes, tokens, 8 // tp, case.kv_heads // tp, 8)
    wanted = sum(sent_bytes(sizes, traffic, DTYPES[case.dtype].itemsize))
    micro_batches = case.steps * GLOBAL_BATCH // case.dp // case.micro_batch
    assert sent == wanted * micro_batches * case.layers // case.pp > 0, (sent, wanted)


@cache
def plain_weights(case: Case) -> dict[str, Tensor]:
    """Return the initial weights in plain torch."""
    return {key_of(name): weight.detach() for name, weight in reference_model(case).named_parameters()}


def check_orthogonalised(case: Case, engine: Any, norms: list[float]) -> None:
    """Check that all ranks together orthogonalised each of the seven matrices of a layer once a step.

    Our pipeline does it early, and in vain, where a step is clipped after one that was not.
    """
    muon = getattr(engine.optimizer, "optimizer", engine.optimizer)
    every = world.gather((muon.orthogonalised, muon.discarded))
    layer, wrong = 7 * case.layers, 0
    if case.pp > 1 and case.schedule != "deepspeed":
        wrong = sum(before <= case.clip < norm for before, norm in pairwise(norms))
    assert [sum(column) for column in zip(*every, strict=True)] == [layer * case.steps, layer * wrong], every


def check_memory(case: Case, counted: list[int], norm: float) -> None:
    """Check that Muon's steps held as many bytes as the plan says of the fullest rank of each stage, plus a few flags.

    Where our pipeline did not clip, it held no clipped gradient, which the plan counts. On a busy machine a thread of
    gloo may hold what it has sent for longer, so only one of the steps has to keep within the plan.
    """
    every = world.gather((case.layout.coords(torch.distributed.get_rank()).pp, counted))
    element_bytes = DTYPES[case.dtype].itemsize
    for position, held in enumerate(rank_memory(case.run, case.layout, element_bytes)):
        sizes = [max(step) for step in zip(*(own for stage, own in every if stage == position), strict=True)]
        exact = case.pp == 1 or case.schedule == "deepspeed" or norm > case.clip
        assert (0.7 if exact is False else 1) * held.matrices <= max(sizes), (sizes, held)
        assert min(sizes) <= held.matrices + 8, (sizes, held)


def check_bf16_sums(case: Case, optimizer: Any) -> None:
    """Check that a reduction rounds the sum of each group of neighbours once, and adds these in fp32."""
    ranks, own = case.dp * case.cp, torch.distributed.get_rank(optimizer.dp_process_group)
    every = [torch.randn(ranks, 50, generator=torch.Generator().manual_seed(rank)) for rank in range(ranks)]
    found = every[own].clone()
    optimizer.start_reduction(found, found[own], torch.bfloat16)()
    sums = torch.stack([whole[own] for whole in every]).view(-1, case.bf16_sums, 50).sum(1)
    assert torch.equal(found[own], sums.bfloat16().float().sum(0))


def check_order(case: Case, trace: Trace, norm_before: float) -> None:
    """Check that the last step, if the one before was not clipped, orthogonalised in its waits for gradients."""
    events = [what for what, *_ in trace._events]
    work = [i for i, what in enumerate(events) if what == "orthogonalise"]
    assert events.count("wait norm") == 1 and work, events
    if norm_before <= case.clip:
        reductions = [i for i, what in enumerate(events) if what == "wait reduction"]
        if len(work) > 1:  # while matrices travel, those of the layer before them are orthogonalised
            assert work[0] < reductions[-1], (events, "the first matrices do not wait for all gradients")
        assert work[-1] < events.index("wait norm"), "no matrix waits for the norm"
    else:
        assert work[0] > events.index("wait norm")


def check_replicas(case: Case, engine: Any, check: ReplicaCheck) -> None:
    """Check that replicas compare equal, and that one flipped bit of a weight names its rank, of two ranks both."""
    rank, groups = torch.distributed.get_rank(), case.layout.groups("dp", "cp")
    check.before_save(case.steps)
    bad = groups[-1][-1]
    if rank == bad:
        flat = list(engine.module.parameters())[-1].data.view(-1)
        bits = flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)
        bits[len(bits) // 2] ^= 1  # the least significant bit
    with pytest.raises(Corruption) as raised:
        check.before_save(case.steps)
    assert raised.value.ranks == ([bad] if len(groups[-1]) > 2 else groups[-1])


def padded_shard(whole: Tensor, dim: int, tp: int, rank: int) -> Tensor:
    """Return a rank's part of a matrix whose rows are padded with zeros to a multiple of tp."""
    missing = -len(whole) % tp
    return F.pad(whole, (0, 0, 0, missing) if missing else ()).chunk(tp, dim)[rank]


def check_padding(case: Case, engine: Any) -> None:
    """Check that the padding of the vocabulary and its moments are zero after training."""
    rank, padding = engine.mpu.get_tensor_model_parallel_rank(), 0
    for fragment in fragments(engine):
        own = weight_of(fragment.name).own_numel(case.run.model, rank, case.tp)
        for tensor in fragment.tensors.values():
            tail = tensor[max(own - fragment.start, 0) :]
            assert not tail.any(), fragment.name
            padding += len(tail)
    assert padding or rank < case.tp - 1 or case.dp > 1, "each stage has a table, of which the last part is padded"


def main() -> None:
    cases_file, out = sys.argv[1:]
    rank_info = world.find_rank_info()
    log.setup(quiet=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(cases_file) as file:
        cases = [Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in c.items()}) for c in json.load(file)]
    with world.failing_together(), engines_in_turn() as series:
        world.join(rank_info)
        histories = []
        for case in cases:
            staged = patch.object(messages, "_through_host", lambda *_, case=case: case.through_host)
            with series.engine(), staged:
                histories.append(train(case))
            if rank_info.rank == 0:
                print(case.name, histories[-1][0][0], histories[-1][0][-1], flush=True)
        if rank_info.rank == 0:
            with open(out, "w") as file:
                json.dump(histories, file)


if __name__ == "__main__":
    main()
