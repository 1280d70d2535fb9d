"""What a pipeline's call needs besides a prompt, by the signature of its class, before any weight is loaded."""

import copy
import inspect
import typing
from typing import Any

from compress.errors import UserError, bad_value

# Arguments that pipelines need although their signature has a default.
INPUTS = ("image", "control_image", "gligen_phrases", "gligen_boxes")
ALWAYS = ("mask_image",)
# Pipelines whose image of a single step is the scheduler's second output, as distilled models have it.
TAKES_SECOND = ("PixArtAlphaPipeline",)


def needs(pipeline_class: type) -> list[str]:
    """The arguments that a pipeline's call needs besides the prompt."""
    return [
        name
        for name, parameter in inspect.signature(pipeline_class.__call__).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in ("self", "prompt")
        and (
            parameter.default is parameter.empty
            or name in ALWAYS
            or (name in INPUTS and type(None) not in typing.get_args(parameter.annotation))
        )
    ]


def refusal(pipeline_class: type) -> str | None:
    """Why a pipeline cannot draw images from prompts alone; None if it can."""
    parameters = inspect.signature(pipeline_class.__call__).parameters
    if missing := needs(pipeline_class):
        return f"{pipeline_class.__name__} needs {' and '.join(missing)} besides the prompt"
    if "prompt" not in parameters:
        return f"{pipeline_class.__name__} takes no prompt"
    return f"{pipeline_class.__name__} draws videos" if "num_frames" in parameters else None


def check_draws(pipeline_class: type | None, images: int) -> None:
    """Refuses to sample images from a pipeline that needs more than prompts; None is an unknown class.

    Raises:
        UserError: ``images`` is not 0.
    """
    if images and pipeline_class is not None and (why := refusal(pipeline_class)):
        raise UserError(f"evaluate.images={images}: {why}, so no images can be sampled: use evaluate=cost")


def check_call(pipeline_class: type | None, path: str) -> None:
    """Refuses a pipeline that cannot be called, so that nothing shows what it gives its denoiser.

    Args:
        pipeline_class: None is a class not known here.
        path: ``model.path``, for the message.

    Raises:
        UserError: It needs more than a prompt, or an image and a mask.
    """
    if pipeline_class is None:
        return
    missing = needs(pipeline_class)
    if "mask_image" in missing:
        missing = [name for name in missing if name not in ("image", "mask_image")]
    if missing:
        raise UserError(
            f"model.path={path}: {pipeline_class.__name__} needs {' and '.join(missing)} besides the prompt: expected "
            "a pipeline that draws from a prompt alone, from nothing, or from an image with a mask"
        )


def check_steps(kind: str, scheduler: Any, steps: int, key: str) -> None:
    """Refuses a single step where the pipeline takes more of its scheduler than this one gives.

    Args:
        kind: Class of the pipeline.
        scheduler: The one that it draws with; None where it is not known.
        steps: How many are asked for.
        key: Of the config, for the message.

    Raises:
        UserError: With what would do.
    """
    import torch

    if steps > 1 or kind not in TAKES_SECOND or scheduler is None:
        return
    twin, latents = copy.deepcopy(scheduler), torch.zeros(1, 1, 1, 1)
    twin.set_timesteps(1)
    if len(twin.step(latents, twin.timesteps[0], latents, return_dict=False)) < 2:
        expected = f"at least 2: {kind} draws no image in one step with {type(scheduler).__name__}"
        raise bad_value(key, steps, expected)
