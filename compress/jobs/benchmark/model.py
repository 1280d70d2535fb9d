"""The pipeline of a benchmark: any model, or a checkpoint of a run, which may be quantized."""

import json
from typing import TYPE_CHECKING, Any

import compress.models
from compress.errors import UserError, bad_value
from compress.models import ModelConfig
from compress.models.call import refusal
from compress.models.folder import DENOISERS
from compress.run.output import model_folder
from compress.store import checkpoint

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def check_model(model: ModelConfig) -> None:
    """Checks that the model is complete, without loading a weight.

    Raises:
        UserError: It is missing or incomplete.
    """
    if _is_checkpoint(model):
        assert model.folder is not None
        checkpoint.verify_checkpoint(model.folder)
    else:
        compress.models.check(model)


def check_text(model: ModelConfig) -> None:
    """Checks that the pipeline needs text only; of a model on the hub only the index is downloaded.

    Raises:
        UserError: It takes no text, or needs more.
    """
    if why := refusal(pipeline_class(model)):
        raise bad_value("model.path", model.path, f"a text-to-image pipeline; {why}")


def load_model(model: ModelConfig, dtype: "torch.dtype") -> "DiffusionPipeline":
    """Loads the pipeline onto the CPU, frozen.

    Raises:
        UserError: It cannot be loaded.
    """
    if _is_checkpoint(model):
        assert model.folder is not None
        return checkpoint.load_checkpoint(model.folder, "cpu", dtype)
    return compress.models.load_teacher(model, "cpu", dtype)


def denoiser_of(model: ModelConfig) -> str:
    """Name of the pipeline's denoiser, ``unet`` or ``transformer``, from its index."""
    index = _index(model)
    return next(name for name in DENOISERS if index.get(name, [None])[0])


def pipeline_class(model: ModelConfig) -> type:
    """The pipeline's class, from its index.

    Raises:
        UserError: This version of diffusers has no such class.
    """
    import diffusers

    name = str(_index(model)["_class_name"])
    found = getattr(diffusers, name, None)
    if found is None:
        raise UserError(f"model.path={model.path}: is a {name}, which diffusers {diffusers.__version__} does not have")
    return found


def _index(model: ModelConfig) -> dict[str, Any]:
    return json.loads((model_folder(model) / "model_index.json").read_text(encoding="utf-8"))


def _is_checkpoint(model: ModelConfig) -> bool:
    return model.folder is not None and (model.folder / checkpoint.INFO).is_file()
