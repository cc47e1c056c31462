"""One rank of the self-test's tests: runs every given test with a fault planted; rank 0 writes the outcomes as JSON."""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from deepspeed import comm

from llama_ds import log
from llama_ds.config.document_marks import LLAMA_MARKS
from llama_ds.errors import UserError
from llama_ds.model import embedding
from llama_ds.parallel import pipeline_optimizer, world
from llama_ds.parallel.context_parallel import GroupContextParallel
from llama_ds.parallel.matrix_exchange import MatrixExchange
from llama_ds.parallel.point_to_point import PipelineComm
from llama_ds.parallel.tensor_parallel import GroupTensorParallel
from llama_ds.training.self_test import check
from llama_ds.training.self_test.check import self_test
from tests.parallel.engine_series import engines_in_turn
from tests.parallel.layout_cases import Case

SCALE = 1.1


def scaled_sum(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the sum over tensor-parallel ranks with a wrong scale."""

    def start(self: Any, *rest: Any) -> Callable[[], torch.Tensor]:
        pending = original(self, *rest)
        return lambda: pending() * SCALE

    return start


def scaled_activations(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the pipeline's send with a wrong scale of activations."""

    def send(self: Any, message: Any, tensors: list[torch.Tensor]) -> None:
        hidden, *rest = tensors
        original(self, message, [hidden * SCALE if message.kind == "activation" else hidden, *rest])

    return send


def scaled_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return DeepSpeed's all-reduce with a wrong scale, where several ranks take part in one of gradients."""

    def all_reduce(tensor: torch.Tensor, *rest: Any, **options: Any) -> Any:
        several = torch.distributed.get_world_size(options.get("group")) > 1 and tensor.numel() > 1000
        return original(tensor.mul_(SCALE) if several else tensor, *rest, **options)

    return all_reduce


def scaled_parts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the pipelines' reduce-scatter of gradients with a wrong scale, where several ranks take part."""

    def start(whole: torch.Tensor, own: torch.Tensor, group: Any, *rest: Any) -> Any:
        several = torch.distributed.get_world_size(group) > 1
        return original(whole.mul_(SCALE) if several else whole, own, group, *rest)

    return start


def turned_matrices(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return Muon's gather of whole matrices with their rows in a wrong order, where several ranks take part."""

    def start_gather(self: Any, *rest: Any) -> Any:
        wait, several = original(self, *rest), torch.distributed.get_world_size() > 1
        return lambda: [(matrix, whole.roll(1, 0) if several else whole) for matrix, whole in wait()]

    return start_gather


def stale_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the ring's message with the keys of this rank in place of those of the previous one."""

    def start(self: Any, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        pending, own = original(self, x), x.clone()
        return lambda: (pending(), own)[1]

    return start


def reversed_parts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the all-to-all with the parts of ranks in a wrong order."""
    return lambda self, x: original(self, x).flip(0)


FAULTS: dict[str, Callable[[], Any]] = {
    "mask": lambda: patch.object(
        embedding, "document_starts", lambda ids, marks: torch.zeros(ids.shape, dtype=torch.int32)
    ),
    "pp": lambda: patch.object(PipelineComm, "send", scaled_activations(PipelineComm.send)),
    "dp": lambda: patch.object(comm, "all_reduce", scaled_gradients(comm.all_reduce)),
    "pp dp": lambda: patch.object(
        pipeline_optimizer, "start_reduce_scatter", scaled_parts(pipeline_optimizer.start_reduce_scatter)
    ),
    "cp ring": lambda: patch.object(GroupContextParallel, "start_pass", stale_keys(GroupContextParallel.start_pass)),
    "cp all_to_all": lambda: patch.object(
        GroupContextParallel, "all_to_all", reversed_parts(GroupContextParallel.all_to_all)
    ),
    "muon": lambda: patch.object(MatrixExchange, "start_gather", turned_matrices(MatrixExchange.start_gather)),
    "tp": lambda: patch.object(GroupTensorParallel, "reduce_tokens", scaled_sum(GroupTensorParallel.reduce_tokens)),
}


def tensors() -> set[int]:
    """Return the identities of all tensors that Python knows of."""
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}


def left_over(case: Case, folder: str, rank_info: world.RankInfo) -> int:
    """Return the number of tensors that a self-test leaves on this or another rank. Collective."""
    before = tensors()
    self_test(
        replace(case.run, output_dir=folder), case.layout, case.dtype, LLAMA_MARKS, rank_info, torch.device("cpu")
    )
    return max(world.gather(len(tensors() - before)))


def crash(case: Case, folder: str, rank_info: world.RankInfo) -> list[str]:
    """Return what is logged where the comparison itself fails."""
    with patch.object(check, "compare", side_effect=RuntimeError), patch.object(check.logger, "error") as said:
        try:
            self_test(replace(case.run, output_dir=folder), case.layout, case.dtype, LLAMA_MARKS, rank_info,
                      torch.device("cpu"))  # fmt: skip
        except RuntimeError:
            return [said.call_args.args[0] % said.call_args.args[1:]]
    return []


def outcome(fault: str, case: Case, folder: str, rank_info: world.RankInfo) -> str:
    """Return the error of the self-test of a case with a fault, "" if it passes; assert that all ranks raise it."""
    run = replace(case.run, output_dir=folder)
    with FAULTS[fault]():
        try:
            self_test(run, case.layout, case.dtype, LLAMA_MARKS, rank_info, torch.device("cpu"))
            text = ""
        except UserError as error:
            text = str(error)
    assert len(set(world.gather(text))) == 1, "ranks disagree"
    return text


def main() -> None:
    cases_file, folder, out = sys.argv[1:]
    rank_info = world.find_rank_info()
    log.setup(quiet=True)
    log.silence_libraries()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(cases_file) as file:
        request = json.load(file)
    found: dict[str, Any] = {"outcomes": []}
    with world.failing_together():
        world.join(rank_info)
        with engines_in_turn():
            for fault, keys in request["faults"]:
                found["outcomes"].append(outcome(fault, Case(**keys), folder, rank_info))
        found["left"] = [left_over(Case(**keys), folder, rank_info) for keys in request["sound"]]
        found["crash"] = crash(Case(**request["faults"][0][1]), folder, rank_info)
        if rank_info.rank == 0:
            with open(out, "w") as file:
                json.dump(found, file)


if __name__ == "__main__":
    main()
