"""Applies a row's choices to a pipeline, or says why that is not possible."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from compress.errors import UserError
from compress.jobs.benchmark.config import Choices
from compress.jobs.benchmark.prompt import embedding_names
from compress.models import denoiser
from compress.models.schedulers import SCHEDULERS
from compress.runtime import Engines, accelerate, resolve

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def refusal(
    pipeline: "DiffusionPipeline", choices: Choices, device: torch.device, size: tuple[int, int], folder: Path | None
) -> str | None:
    """Why this pipeline on this device cannot apply the row's choices, or why they would change nothing.

    Args:
        pipeline: The pipeline.
        choices: The row's choices.
        device: Where it would run.
        size: Height and width of the images in pixels.
        folder: The pipeline's files, for its model card; None if unknown.

    Returns:
        A reason in one sentence; None if the choices can be applied.
    """
    model, vae = denoiser(pipeline), getattr(pipeline, "vae", None)
    if reason := _engine_refusal(choices.engine, device):
        return reason
    if choices.offload != "none" and device.type == "cpu":
        return "offloading moves models from an accelerator to the CPU, and this device is the CPU"
    if choices.vae_slicing and choices.batch_size == 1:
        return "decoding images one by one changes nothing at batch 1"
    if (choices.vae_slicing or choices.vae_tiling) and not hasattr(vae, "enable_tiling"):
        return f"{type(vae).__name__} has no slicing and tiling"
    if choices.vae_tiling and max(size) <= (tile := getattr(vae, "tile_sample_min_size", 0)):
        return f"images of {size[1]}x{size[0]} px are not larger than a tile of {tile} px"
    if choices.attention_slicing and not any(hasattr(module, "set_attention_slice") for module in model.modules()):
        return f"{type(model).__name__} has no sliceable attention"
    if choices.reuse_prompt and not embedding_names(type(pipeline)):
        return f"{type(pipeline).__name__} does not embed prompts as Stable Diffusion and SDXL do"
    return _attention_refusal(model, choices.attention, device) or _scheduler_refusal(pipeline, choices, folder)


def _engine_refusal(engine: str, device: torch.device) -> str | None:
    try:
        resolve(engine, device)
    except UserError as error:
        return str(error)
    return None


def _attention_refusal(model: torch.nn.Module, attention: str, device: torch.device) -> str | None:
    if attention == "sdpa":
        return None
    if attention == "xformers" and importlib.util.find_spec("xformers") is None:
        return "the package xformers is not installed"
    if attention == "xformers" and device.type != "cuda":
        return "xformers needs a CUDA device"
    if attention in ("plain", "xformers"):
        processors = getattr(model, "attn_processors", {}).values()
        if not processors or not all(isinstance(processor, AttnProcessor2_0) for processor in processors):
            return f"{type(model).__name__} has other attention processors than AttnProcessor2_0"
        return None
    if not any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in model.modules()):
        return f"the attention of {type(model).__name__} cannot switch backends: use sdpa, plain or xformers"
    return None


def _scheduler_refusal(pipeline: "DiffusionPipeline", choices: Choices, folder: Path | None) -> str | None:
    own, kind = pipeline.scheduler, SCHEDULERS[choices.scheduler].kind
    if kind is None or type(own).__name__ == kind:
        return None
    # LCM's scheduler declares no compatible schedulers, but takes the same settings as DDIM's.
    family = "DDIMScheduler" if choices.scheduler == "lcm" else kind
    if getattr(diffusers, family) not in own.compatibles:
        return f"the model's {type(own).__name__} cannot be exchanged for a {kind}"
    if choices.scheduler == "lcm" and not _is_consistency_model(pipeline, folder):
        return "LCM needs a model distilled for it: no time_cond_proj_dim, and no model card that mentions it"
    return None


def _is_consistency_model(pipeline: "DiffusionPipeline", folder: Path | None) -> bool:
    if getattr(denoiser(pipeline).config, "time_cond_proj_dim", None) is not None:
        return True
    card = folder / "README.md" if folder else None
    text = card.read_text(encoding="utf-8", errors="replace").lower() if card and card.is_file() else ""
    return "latent consistency" in text or "latent-consistency" in text


def apply(pipeline: "DiffusionPipeline", choices: Choices, device: torch.device) -> "DiffusionPipeline":
    """Applies the row's choices, in place but for the engine. The pipeline already has the row's dtype.

    Args:
        pipeline: On the CPU; afterwards on ``device``, or moved there in parts when it is called.
        choices: Choices that :func:`refusal` accepts.
        device: Where it runs.

    Returns:
        What is to be called: the pipeline, or its twin in the engine.
    """
    model: Any = denoiser(pipeline)
    scheduler = SCHEDULERS[choices.scheduler]
    if scheduler.kind is not None:
        kind = getattr(diffusers, scheduler.kind)
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **scheduler.changes)
    if choices.channels_last:
        model.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if choices.attention == "plain":
        model.set_attn_processor(AttnProcessor())
    elif choices.attention == "xformers":
        model.enable_xformers_memory_efficient_attention()
    elif choices.attention != "sdpa":
        model.set_attention_backend(choices.attention)
    if choices.attention_slicing:
        pipeline.enable_attention_slicing()
    if choices.vae_slicing:
        pipeline.vae.enable_slicing()
    if choices.vae_tiling:
        pipeline.vae.enable_tiling()
    if choices.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif choices.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
    if choices.compile:
        model.compile()
    return accelerate(pipeline, Engines(choices.engine, choices.engine))
