"""Images drawn during a training, so that one sees what it does."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from compress.distill.guidance import takes_scale
from compress.distill.placement import idle_parts, placed
from compress.distill.training import Validation
from compress.evaluate.sample import sample, to_pil
from compress.models import denoiser
from compress.models.sampling import Sampling
from compress.system.files import replace_with

Show = Callable[[Tensor, Sequence[str], int], None]


def drawing(
    pipeline: DiffusionPipeline,
    config: Validation,
    seed: int,
    show: Show | None,
    folder: Path,
    trained: tuple[float, float] | None = None,
) -> Callable[[int], None] | None:
    """A function that draws the prompts' images with the weights that the pipeline has when it is called.

    Args:
        pipeline: The student's; its denoiser may be in training and in float32 beside others in half precision.
        config: Prompts, and how to sample.
        seed: Image i starts from the noise of ``seed + i``.
        show: Takes uint8 images ``(n, 3, h, w)``, their prompts and the number of steps done; None: files in
            ``folder/validation``.
        folder: Of the stage.
        trained: Lowest and highest guidance scale that the student learns to give in one pass; None: none.

    Returns:
        Called with the number of steps done; None if there are no prompts.
    """
    if not config.prompts:
        return None
    show = show or partial(write_row, folder / "validation" / "step")
    seeds = [seed + i for i in range(len(config.prompts))]

    def draw(step: int) -> None:
        model = denoiser(pipeline)
        own = Sampling(guidance=trained, unguided=trained is not None and not takes_scale(model))
        settings = replace(config, guidance=own.argument(config.guidance)).sampling()
        training = model.training
        model.eval()
        half = next((part.dtype for part in pipeline.components.values() if _is_half(part)), None)
        with (
            torch.autocast(model.device.type, half, enabled=half is not None),
            placed(idle_parts(pipeline), model.device),
        ):
            images = sample(pipeline, config.prompts, seeds, settings)
        model.train(training)
        show(images, config.prompts, step)

    return draw


def write_row(beginning: Path, images: Tensor, prompts: Sequence[str], step: int) -> None:
    """Writes images side by side to ``<beginning>-<step>.png``; the prompts stand in the file's metadata."""
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_itxt("prompts", "\n".join(prompts))
    beginning.parent.mkdir(parents=True, exist_ok=True)
    with replace_with(beginning.with_name(f"{beginning.name}-{step:06d}.png")) as beside:
        to_pil(torch.cat(list(images), dim=2)).save(beside, pnginfo=about)


def _is_half(part: object) -> bool:
    return isinstance(part, torch.nn.Module) and getattr(part, "dtype", None) in (torch.bfloat16, torch.float16)
