"""Writing torchtitan's checkpoints of a LLaMA 3, as `torchtitan` describes them, with the names of its present code.

Each weight is a file of its own, in one block. A run in whose checkpoint folder `step-0` lies loads the model from it
and nothing else; torchtitan/components/checkpointer/dcp.py calls such a step model_only.
"""

from __future__ import annotations

import os

from llama_ds.checkpoint.carried import carried_files
from llama_ds.checkpoint.choices import SHARDED
from llama_ds.checkpoint.formats.dcp import METADATA
from llama_ds.checkpoint.formats.dcp_writing import metadata_of
from llama_ds.checkpoint.formats.hf_settings import TOKEN_IDS
from llama_ds.checkpoint.formats.meta import HEAD, meta_name
from llama_ds.checkpoint.formats.meta_params import PARAMS, params_of
from llama_ds.checkpoint.formats.plan import DCP_SUFFIX, OutputFile, OutputTensor, Plan, Target, as_json
from llama_ds.checkpoint.formats.views import ROTATED, RotaryReordered
from llama_ds.checkpoint.weights import DTYPES, ModelFiles, Readable
from llama_ds.errors import UserError
from llama_ds.layout.weights import EMBEDDING_KEY

STEP = "step-0"
PRESENT = {HEAD: "lm_head.weight", ".attention.w": ".attention.qkv_linear.w"}  # since 2026-04-16
OUTPUT = ".attention.wo."  # not one of the three in qkv_linear


def plan_torchtitan(files: ModelFiles, target: Target) -> Plan:
    """Return the plan: a checkpoint of weights alone, and beside it the params.json by which it can be read again.

    Raises:
        UserError: torchtitan's Llama 3 does not compute the model, or the target is sharded.
    """
    if (target.tp, target.pp) != (1, 1):
        raise UserError(
            f"command line: --tp and --pp apply only to {SHARDED}; leave them out for torchtitan, which loads its "
            "checkpoints on any number of ranks"
        )
    model = files.model
    params = {"rope_theta": model.rope_theta, "use_scaled_rope": False, **params_of(model, files.path)}
    params["max_seq_len"] = files.seq_len
    outputs = tuple(
        OutputFile(f"{STEP}/__0_{number}{DCP_SUFFIX}", (OutputTensor(name, tensor.shape, tensor),))
        for number, (name, tensor) in enumerate(_tensors(files).items())
    )
    dtype = DTYPES[target.dtype]

    def finish(folder: str) -> None:
        content = metadata_of({file.tensors[0].name: os.path.join(folder, file.name) for file in outputs})
        with open(os.path.join(folder, STEP, METADATA), "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())

    dropped = [f"{key} {files.hf_config[key]}" for key in TOKEN_IDS if files.hf_config.get(key) is not None]
    tied = ", enable_weight_tying" if model.tie_word_embeddings else ""
    note = (
        f"torchtitan loads it with checkpoint.initial_load_path set to the absolute path of {STEP}, in a configuration "
        f"of this shape ({PARAMS}{tied}, hidden_dim {model.intermediate_size}); code before 2026-04-16 has other names"
    )
    return Plan(
        "torchtitan",
        dtype,
        outputs,
        {PARAMS: as_json(params)},
        carried_files(files.path),
        dropped=tuple(dropped),
        notes=(note,),
        finish=finish,
    )


def _tensors(files: ModelFiles) -> dict[str, Readable]:
    """Return the weights by torchtitan's names; a tied head is there twice, as in its state dict."""
    model = files.model
    found: dict[str, Readable] = {}
    for (layer, name), tensor in files.tensors.items():
        own = RotaryReordered(tensor, model.head_dim, to_halves=False) if name in ROTATED else tensor
        found[_present(meta_name(layer, name, model.num_hidden_layers))] = own
    if model.tie_word_embeddings:
        found[_present(HEAD)] = files.tensors[EMBEDDING_KEY]
    return found


def _present(name: str) -> str:
    """Return the present name of a weight with the name of Meta's code."""
    if OUTPUT in name:
        return name
    for old, new in PRESENT.items():
        name = name.replace(old, new)
    return name
