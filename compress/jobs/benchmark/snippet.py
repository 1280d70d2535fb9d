"""Diffusers code that runs a pipeline as a row did."""

from compress.config.values import PRECISIONS
from compress.jobs.benchmark.config import Choices
from compress.models import ModelConfig
from compress.models.folder import code_files
from compress.models.schedulers import SCHEDULERS


def snippet(
    model: ModelConfig,
    choices: Choices,
    device: str,
    denoiser: str,
    guidance: float,
    size: dict[str, int],
    embeddings: tuple[str, ...] = (),
) -> str:
    """Code that loads the model, applies the row's choices and samples an image.

    Args:
        model: The model.
        choices: The row's choices.
        device: Where it ran.
        denoiser: Name of the denoiser, ``unet`` or ``transformer``.
        guidance: Classifier-free guidance scale.
        size: ``height`` and ``width`` in pixels if they are not the model's own.
        embeddings: Names of the results of ``encode_prompt`` if prompts are reused; see
            :func:`compress.jobs.benchmark.prompt.embedding_names`.
    """
    source = model.path if model.folder is None else str(model.folder)
    options = {"revision": model.revision, "variant": model.variant}
    loading = "".join(f', {name}="{value}"' for name, value in options.items() if value is not None)
    if model.folder is not None and code_files(model.folder):
        loading += ", trust_remote_code=True"
    loading += f", torch_dtype=torch.{PRECISIONS[choices.dtype]}"
    body = [f'pipeline = DiffusionPipeline.from_pretrained("{source}"{loading})']
    imports = ["DiffusionPipeline"]
    scheduler = SCHEDULERS[choices.scheduler]
    if scheduler.kind is not None:
        imports.append(scheduler.kind)
        body.append(scheduler.code)
    body += _attention(choices, denoiser) + _memory(choices, device, denoiser)
    if choices.engine != "eager":
        body.append(f'pipeline = compress.accelerate(pipeline, "{choices.engine}")')
    lines = ["import compress"] * (choices.engine != "eager")
    lines += ["import torch", f"from diffusers import {', '.join(sorted(imports, key=str.lower))}"]
    if choices.attention == "plain":
        lines.append("from diffusers.models.attention_processor import AttnProcessor")
    return "\n".join([*lines, "", *body, *_draw(choices, device, guidance, size, embeddings)]) + "\n"


def _attention(choices: Choices, denoiser: str) -> list[str]:
    lines = {
        "sdpa": [],
        "plain": [f"pipeline.{denoiser}.set_attn_processor(AttnProcessor())"],
        "xformers": [f"pipeline.{denoiser}.enable_xformers_memory_efficient_attention()"],
    }.get(choices.attention, [f'pipeline.{denoiser}.set_attention_backend("{choices.attention}")'])
    return [*lines, "pipeline.enable_attention_slicing()"] if choices.attention_slicing else lines


def _memory(choices: Choices, device: str, denoiser: str) -> list[str]:
    lines = []
    if choices.channels_last:
        lines += [f"pipeline.{part}.to(memory_format=torch.channels_last)" for part in (denoiser, "vae")]
    lines += ["pipeline.vae.enable_slicing()"] if choices.vae_slicing else []
    lines += ["pipeline.vae.enable_tiling()"] if choices.vae_tiling else []
    if choices.offload != "none":
        lines.append(f'pipeline.enable_{choices.offload}_cpu_offload(device="{device}")')
    elif device != "cpu":
        lines.append(f'pipeline.to("{device}")')
    return [*lines, f"pipeline.{denoiser}.compile()"] if choices.compile else lines


def _draw(
    choices: Choices, device: str, guidance: float, size: dict[str, int], embeddings: tuple[str, ...]
) -> list[str]:
    sizes = "".join(f", {name}={side}" for name, side in size.items())
    settings = f"num_inference_steps={choices.steps}, guidance_scale={guidance:g}{sizes}"
    prompts = ["a prompt"] if choices.batch_size == 1 else [f"prompt {index}" for index in range(choices.batch_size)]
    lines = [
        f"prompts = {prompts}".replace("'", '"'),
        "noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]",
    ]
    text = "prompts"
    if choices.reuse_prompt:
        names = ", ".join(f'"{name}"' for name in embeddings)
        asked = f'device="{device}", num_images_per_prompt=1, do_classifier_free_guidance={guidance > 1}'
        lines += [
            f"embeddings = pipeline.encode_prompt(prompt=prompts, {asked})  # once for many images",
            f"embedded = dict(zip([{names}], embeddings))",
        ]
        text = "**embedded"
    return [*lines, f"images = pipeline({text}, generator=noise, {settings}).images"]
