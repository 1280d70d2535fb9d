"""What methods share that train a student to draw in a few steps: config, run, and the sampling of the result.

Such a student predicts clean latents in one step; before each further step its prediction gets new noise. That is how
``LCMScheduler`` samples, at the timesteps of a grid of ``solver_steps``.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from compress.data.samples import SamplesConfig
from compress.distill.training import TrainingConfig, check_examples, check_prompts, check_value
from compress.errors import UserError, bad_value
from compress.stage import StageContext, StageReport, declares

# torch and diffusers are imported in functions, so that checking a config does not load them.
if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from compress.distill.batches import Batch
    from compress.distill.objective import Teacher
    from compress.models.outline import Outline
    from compress.models.schedule import Schedule

USAGE = (
    "It draws in few steps, each one pass without guidance: another scheduler, or a `guidance_scale` outside of what "
    "it was trained for, gives worse images."
)


@dataclass(frozen=True)
class FewStepConfig(TrainingConfig):
    """Keys of methods for few steps.

    Attributes:
        max_examples: At most this many images, chosen at random by the seed; None: all; 0: none.
        samples: Latents that the teacher samples, to train on besides.
        prompt_dropout: Share of captions replaced by the empty prompt, in [0, 1].
        guidance: Lowest and highest guidance scale, at least 1, as in :class:`compress.distill.features.Config`.
        inference_steps: Steps that the checkpoint is drawn with, 1 to ``solver_steps``.
        solver_steps: Timesteps of the grid that those of the inference are taken from; divides the model's number.
    """

    learning_rate: float = 1e-4
    schedule: str = "constant"
    max_examples: int | None = None
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    prompt_dropout: float = 0.0
    guidance: tuple[float, float] = (4.0, 4.0)
    inference_steps: int = 4
    solver_steps: int = 50

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            UserError: A value is out of its range.
        """
        super().__post_init__()
        check_examples(self)
        check_prompts(self)
        check_value(self, "solver_steps", self.solver_steps >= 1, "an integer of at least 1")
        check_value(
            self, "inference_steps", 1 <= self.inference_steps <= self.solver_steps, "an integer of 1 to solver_steps"
        )


@dataclass(frozen=True)
class Scene:
    """What an objective works with.

    Attributes:
        student: The denoiser to train, in float32.
        teacher: Gives the guided prediction.
        schedule: Of the noise.
        times: Timesteps of the inference, from the noisiest.
        grid: Distance of two timesteps of the solver.
        seed: Of the run.
        autocast: Context of a pass.
        device: Where to compute.
    """

    student: "nn.Module"
    teacher: "Teacher"
    schedule: "Schedule"
    times: list[int]
    grid: int
    seed: int
    autocast: Callable[[], Any]
    device: "torch.device"

    def clean(self, model: "nn.Module", noisy: "Tensor", timesteps: "Tensor", batch: "Batch") -> "Tensor":
        """The consistency function of a denoiser (Song et al. 2023): clean latents, those given at timestep 0.

        Args:
            model: A denoiser.
            noisy: ``(b, ...)``.
            timesteps: ``(b,)``.
            batch: With the conditions of b examples.
        """
        import torch

        from compress.distill.objective import predict

        if noisy.ndim == 4:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            output = predict(model, noisy, self.schedule.times(timesteps), batch, torch.float32)
        skip, out = boundary_scalings(timesteps.view(-1, *[1] * (noisy.ndim - 1)))
        found = self.schedule.clean(noisy, output[:, : noisy.shape[1]].float(), timesteps)
        return skip * noisy + out * found


class FewStepObjective(Protocol):
    """An objective of the trainer that looks at every step."""

    names: Sequence[str]

    def follow(self) -> None:
        """Called once a step, when the gradients are finite and the weights have not moved yet."""


def boundary_scalings(timesteps: "Tensor") -> "tuple[Tensor, Tensor]":
    """Factors of the noisy latents and of the clean ones that a prediction implies: 1 and 0 at timestep 0.

    As in ``LCMScheduler``: a standard deviation of the data of 0.5, and timesteps times 10.
    """
    scaled = 10.0 * timesteps.float()
    total = scaled**2 + 0.25
    return 0.25 / total, scaled / total.sqrt()


def check(config: FewStepConfig, denoiser: "nn.Module", outline: "Outline") -> "nn.Module":
    """Refuses a student that cannot follow its teacher with any weights.

    Raises:
        UserError: See :func:`compress.distill.pair.check_pair` and :func:`compress.distill.guidance.check_guidance`.
    """
    from compress.distill.compiled import check_compiler
    from compress.distill.guidance import add_scale_input, check_guidance
    from compress.distill.pair import check_pair

    check_compiler(config.compile)
    teacher = outline.denoiser()
    if teacher is not None:
        check_pair(denoiser, teacher)
        check_guidance(config.guidance, denoiser, teacher)
        add_scale_input(denoiser, config.guidance)
    return denoiser


def check_teacher(config: FewStepConfig, outline: "Outline") -> None:
    """Refuses a teacher whose schedule few steps cannot follow.

    Raises:
        UserError: See :func:`compress.distill.features.check_model`; or it takes no prompt, its noise is that of flow
            matching, or a package or a compiler is missing.
    """
    from compress.distill import features
    from compress.distill.compiled import check_compiler
    from compress.distill.guidance import check_prompted, check_unguided
    from compress.distill.optimizers import check_optimizer
    from compress.models.schedule import schedule_of

    check_prompted(outline)
    features.check_model(outline)
    check_compiler(config.compile)
    check_optimizer(config.optimizer)
    scheduler, teacher = outline.scheduler(), outline.denoiser()
    if scheduler is not None:
        check_schedule(schedule_of(scheduler, teacher), config)
    if teacher is not None:
        check_unguided(config.guidance, teacher)


def check_schedule(schedule: "Schedule", config: FewStepConfig) -> None:
    """Refuses flow matching, and a grid that does not fit.

    Raises:
        UserError: With what would be right.
    """
    from compress.models.schedule import FLOW

    if schedule.prediction_type == FLOW:
        raise UserError("a model of flow matching is not supported here: expected one that predicts noise, v or sample")
    if schedule.steps % config.solver_steps:
        raise bad_value("solver_steps", config.solver_steps, f"a divisor of the model's {schedule.steps} timesteps")


def train(
    pipeline: "DiffusionPipeline",
    config: FewStepConfig,
    context: StageContext,
    make: "Callable[[Scene], nn.Module]",
    draws: int,
    title: str,
    more: int = 0,
) -> StageReport:
    """Trains a pipeline's denoiser for few steps and makes the pipeline draw with them.

    Args:
        pipeline: The student's; called in every process of the run.
        config: Of the method.
        context: Of the stage.
        make: The objective, a :class:`FewStepObjective`.
        draws: How many values ``Batch.timesteps`` has, from 0.
        title: Of the progress bar.
        more: How much further noise a batch has.

    Raises:
        UserError: Student, teacher and data do not match, or the training diverged.
    """
    from compress.distill.batches import Batches
    from compress.distill.compiled import compiled
    from compress.distill.encoded import training_examples
    from compress.distill.forecast import forecast
    from compress.distill.guidance import add_scale_input, check_guidance, empty_prompt, kept_zeros, takes_scale
    from compress.distill.objective import Teacher
    from compress.distill.pair import arranged, check_pair
    from compress.distill.placement import idle_parts, placed
    from compress.distill.trainer import Trainer, autocast, joined
    from compress.distill.validation import drawing
    from compress.models import denoiser
    from compress.models.sampling import Sampling, draw_with
    from compress.models.schedule import schedule_of

    student, teacher = denoiser(pipeline), denoiser(context.teacher)
    check_pair(student, teacher)
    schedule = schedule_of(context.teacher.scheduler, teacher)
    check_schedule(schedule, config)
    check_guidance(config.guidance, student, teacher)
    scheduler = _scheduler(pipeline.scheduler, config)
    examples = training_examples(context, config.max_examples, config.samples)
    add_scale_input(student, config.guidance)
    accelerator, device = joined(context.device)
    cast = autocast(config.mixed_precision, next(student.parameters()).dtype, device)
    batches = Batches(examples, config.batch_size, draws, config.prompt_dropout, context.seed, config.guidance, more)
    grid = schedule.steps // config.solver_steps
    own = Sampling(type(scheduler).__name__, config.inference_steps, config.guidance, not takes_scale(student))
    draw_with(pipeline, scheduler, own)
    images = replace(config.validation, scheduler="checkpoint", steps=config.inference_steps)
    with (
        placed(idle_parts(pipeline, context.teacher), "cpu"),
        arranged(student, teacher, device, config.gradient_checkpointing),
    ):
        ask = Teacher(teacher, {}, {}, cast, empty_prompt(examples.conditions))
        ask.run_in(config.teacher_engine, context.graphs)
        times = scheduler.timesteps.tolist()
        objective: Any = make(Scene(student, ask, schedule, times, grid, context.seed, cast, device))
        keep = bool(declares([*context.before, *context.history], "zeros"))
        zeros = kept_zeros(student, keep, config.guidance)
        trainer = Trainer(
            objective, batches, config, objective.names, accelerator,
            averaged=list(student.parameters()), zeros=zeros, follow=objective.follow, folder=context.folder,
            log=context.log, title=title,
            validate=drawing(pipeline, images, context.seed, context.show, context.folder, config.guidance),
        )  # fmt: skip
        zeros.check()
        with compiled(student, trainer):
            forecast(trainer)
            record = trainer.train()
    details = {
        **record.details(),
        "examples": len(examples.latents),
        "final": {name: points[-1][1] for name, points in record.curves.items()},
        "guidance": list(config.guidance),
        "timesteps": times,
        "autocast": "no" if cast is nullcontext else "bf16",
        "prediction_type": schedule.prediction_type,
        "processes": accelerator.num_processes,
    }
    modules = sum(1 for m in student.modules() if next(m.parameters(recurse=False), None) is not None)
    total = sum(parameter.numel() for parameter in student.parameters())
    coverage = {"params": 1 - zeros.count() / total, "macs": 1.0, "modules": modules, "skipped": {}}
    return StageReport(coverage, details, record.curves)


def _scheduler(own: Any, config: FewStepConfig) -> Any:
    """The ``LCMScheduler`` of a schedule, with the timesteps of the inference."""
    import inspect

    from diffusers import LCMScheduler

    # Without what other schedulers alone know, of which diffusers warns at every load.
    known = inspect.signature(LCMScheduler.__init__).parameters
    kept = {name: value for name, value in own.config.items() if name in known}
    made = LCMScheduler(**kept | {"original_inference_steps": config.solver_steps, "clip_sample": False})
    made.set_timesteps(config.inference_steps)
    return made
