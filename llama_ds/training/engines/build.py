"""Builds the engine that a run requires."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import deepspeed
import torch

from llama_ds.config.document_marks import LLAMA_MARKS, DocumentMarks
from llama_ds.config.schema import RunConfig
from llama_ds.config.section_rules import STOCK_ENGINE
from llama_ds.errors import UserError
from llama_ds.job.devices import BACKEND
from llama_ds.layout.layout import Layout
from llama_ds.log import logger
from llama_ds.model.graphs import CudaGraphs, Graphs
from llama_ds.parallel.backend import backend
from llama_ds.parallel.deepspeed_check import check_device, check_values, refusals
from llama_ds.parallel.initial_weights import broadcast_in_buckets
from llama_ds.parallel.lean_imports import leave_out_compiler
from llama_ds.training.engines.interface import Engine
from llama_ds.training.engines.layer_parts import layer_parts
from llama_ds.training.engines.pipelined import build_pipelined
from llama_ds.training.engines.single_stage import build_single_stage
from llama_ds.training.engines.stock import build_stock
from llama_ds.training.host_memory import keep_freed_memory


def build_engine(
    run: RunConfig,
    layout: Layout,
    config: dict[str, Any],
    device: torch.device,
    marks: DocumentMarks = LLAMA_MARKS,
    trains: bool = True,
    graphs: Graphs | None = None,
) -> Engine:
    """Build and partition this rank's layers and initialise DeepSpeed with the merged `config`. Collective.

    Args:
        marks: those of the tokenizer.
        trains: False: the engine evaluates only. Without ZeRO-3 it then has neither masters nor gradients.
        graphs: makes graphs for `parallel.cuda_graphs`; None: those of CUDA, and none on a CPU.

    Raises:
        UserError: DeepSpeed refuses the configuration.
    """
    leave_out_compiler()
    check_values(run.deepspeed_path, config)
    check_device(run.deepspeed_path, config, device.type)
    if layout.pp > 1 and run.parallel.schedule == STOCK_ENGINE and device.type == "cuda" and backend() == "gloo":
        raise UserError(
            f"parallel.schedule = {STOCK_ENGINE}: DeepSpeed's pipeline passes messages between GPUs by NCCL only, and "
            f"{BACKEND} chooses gloo; use another schedule, or one rank on each GPU"
        )
    # Otherwise DeepSpeed compiles its shared-memory all-reduce at startup, which only inference uses. Reading the table
    # that it asks would probe every op of DeepSpeed, by setuptools and a C compiler.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(verbose=False)  # adopts the process group of world.join
    if device.type == "cpu":
        keep_freed_memory()
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    parts = layer_parts(run, layout, dtype, device, marks)
    if run.parallel.cuda_graphs and trains:
        parts = replace(parts, graphs=graphs or _graphs_of(device))
    # DeepSpeed prints its topology and seeds to stdout, which is reserved for the run's own lines.
    with redirect_stdout(io.StringIO()), refusals(run.deepspeed_path), broadcast_in_buckets():
        if layout.pp == 1:
            return build_single_stage(run, layout, config, parts, device, trains)
        if run.parallel.schedule == STOCK_ENGINE:
            return build_stock(run, layout, config, parts)
        return build_pipelined(run, layout, config, parts, trains)


def _graphs_of(device: torch.device) -> Graphs | None:
    if device.type == "cuda":
        return CudaGraphs()
    logger.info("parallel.cuda_graphs: not on a %s, where decoder layers compute the same without", device.type)
    return None
