"""The model of a folder, for `model.from` in run files. Torch is imported only when a folder is read."""

from __future__ import annotations

from llama_ds.config.model_source import read_models_by
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError


def read_models() -> None:
    """Let run files take their model from a folder in any format that `open_model` reads."""
    read_models_by(model_in)


def model_in(path: str) -> ModelConfig:
    """Return the model of a run, a checkpoint, a Hugging Face or a Meta folder.

    Of a Hugging Face model, config.json suffices.

    Raises:
        UserError: the folder holds no model, or this machine lacks torch, with which folders are read.
    """
    try:
        from llama_ds.checkpoint.formats.hf_config import model_of, read_config
        from llama_ds.checkpoint.load_model import kind_of, open_as_found
    except ImportError as error:
        raise UserError(
            f"model.from = {path}: cannot be read here ({error}); write the model's keys into the run file instead, "
            "from run.yaml of the run or config.json of the model"
        ) from None
    kind = kind_of(path)
    return model_of(path, read_config(path))[0] if kind == "hf" else open_as_found(path, kind=kind).model
