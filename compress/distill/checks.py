"""Whether student, teacher, examples and scheduler can work together."""

from typing import Any

from diffusers import DDPMScheduler

from compress.data.examples import Examples
from compress.errors import UserError


def check_pair(student: Any, teacher: Any, examples: Examples) -> None:
    """Checks that student, teacher and examples can work together.

    Raises:
        UserError: They cannot; the message says why.
    """
    if student is teacher:
        raise UserError("student and teacher are the same module; load the teacher separately or copy it")
    for name, model in (("student", student), ("teacher", teacher)):
        if not hasattr(model, "down_blocks") or "cross_attention_dim" not in getattr(model, "config", {}):
            raise UserError(f"method features distills UNet2DConditionModel; the {name} is a {type(model).__name__}")
        extra = [
            key
            for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
            if model.config.get(key)
        ]
        if extra:
            raise UserError(f"method features does not know the {name}'s further inputs ({', '.join(extra)})")
        for key, given in (
            ("in_channels", examples.latents.shape[1]),
            ("cross_attention_dim", examples.embeddings.shape[2]),
        ):
            if model.config[key] != given:
                raise UserError(f"the {name} has {key}={model.config[key]}, but the examples have {given}")
    if student.config["out_channels"] != teacher.config["out_channels"]:
        ours, theirs = student.config["out_channels"], teacher.config["out_channels"]
        raise UserError(f"the student has out_channels={ours}, its teacher {theirs}")
    if teacher.config["out_channels"] != examples.latents.shape[1]:
        raise UserError("a denoiser that predicts a variance too (out_channels is not in_channels) is not supported")


def noise_schedule(scheduler: Any) -> DDPMScheduler:
    """The schedule of noise and the prediction type, whatever the sampler around them.

    Raises:
        UserError: The scheduler is of another kind, such as flow matching.
    """
    kind = scheduler.config.get("prediction_type", None)
    if "beta_schedule" not in scheduler.config or kind not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            "method features needs a scheduler with a beta schedule and prediction_type epsilon, v_prediction or "
            f"sample; got {type(scheduler).__name__} with {kind}"
        )
    return DDPMScheduler.from_config(scheduler.config)
