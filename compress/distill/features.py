"""Method ``features``: distillation by noise, output and features, as in BK-SDM, LAPTOP-Diff and KOALA.

Kim et al. 2023, "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion", https://arxiv.org/abs/2305.15798.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config.values import nearest
from compress.data.samples import SamplesConfig
from compress.distill.lora import Lora, adapted, check_lora
from compress.distill.training import TrainingConfig, check_examples, check_prompts, check_value
from compress.errors import UserError, bad_value
from compress.stage import Stage, StageContext, StageReport, declares

# torch and diffusers are imported in functions, so that checking a config does not load them.
if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from compress.data.examples import Examples
    from compress.distill.alignment import Alignment
    from compress.distill.batches import Batches
    from compress.distill.losses import Loss
    from compress.distill.objective import Teacher
    from compress.models.outline import Outline
    from compress.models.schedule import Schedule

STAGE = Stage(version=2, distributed=True, by_names=True, any_steps=True, tag="distillation")

TIMESTEP_SAMPLINGS = ("uniform", "weighted", "logit_normal")

LOSSES = {"noise": 1.0, "output": 1.0, "features": 0.1}
"""The losses of BK-SDM, with relative errors of features, and their weights."""


@dataclass(frozen=True)
class Config(TrainingConfig):
    """How the student is trained.

    Attributes:
        max_examples: At most this many images, chosen at random by the seed; None: all; 0: none.
        samples: Latents that the teacher samples, to train on besides.
        losses: Name of a loss (a file of :mod:`compress.distill.losses`, or your own module) to its weight, at least 0;
            0 leaves it out.
        min_snr_gamma: Noise and output errors are weighted by min(SNR, gamma) / SNR (Hang et al. 2023,
            https://arxiv.org/abs/2303.09556), above 0; None: equal weights.
        timestep_sampling: ``uniform``; ``weighted``: a timestep is drawn as often as ``min_snr_gamma`` weighs it, and
            the drawn ones weigh the same; or ``logit_normal``: the middle ones more often (Esser et al. 2024,
            https://arxiv.org/abs/2403.03206).
        prompt_dropout: Share of captions replaced by the empty prompt, in [0, 1].
        guidance: Lowest and highest guidance scale, at least 1: the student's one pass gives the teacher's guided
            prediction; see :mod:`compress.distill.guidance`. None: as the stages before left the student.
        inference_steps: Denoising steps that the pipeline is called with by default from then on, of DPM-Solver++, at
            least 1; the training does not depend on it. None: as the stages before left it.
        lora: Adapters that train in place of the weights; see :class:`compress.distill.lora.Lora`.
    """

    max_examples: int | None = None
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    losses: dict[str, float] = field(default_factory=lambda: dict(LOSSES))
    min_snr_gamma: float | None = 5.0
    timestep_sampling: str = "uniform"
    prompt_dropout: float = 0.1
    guidance: tuple[float, float] | None = None
    inference_steps: int | None = None
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            UserError: A value is out of its range.
        """
        super().__post_init__()
        check_examples(self)
        if self.min_snr_gamma is not None:
            check_value(self, "min_snr_gamma", 0 < self.min_snr_gamma < math.inf, "a number above 0, or null")
        known = ", ".join(TIMESTEP_SAMPLINGS)
        check_value(self, "timestep_sampling", self.timestep_sampling in TIMESTEP_SAMPLINGS, f"one of {known}")
        check_prompts(self, ", or null")
        if self.inference_steps is not None:
            check_value(self, "inference_steps", self.inference_steps >= 1, "an integer of at least 1, or null")
        self._check_losses()

    def _check_losses(self) -> None:
        known = sorted(file.stem for file in (Path(__file__).parent / "losses").glob("[!_]*.py"))
        for name, weight in self.losses.items():
            if "." in name:
                if not _is_module(name):
                    raise bad_value(f"losses.{name}", weight, "a module that can be imported")
            elif name not in known:
                raise UserError(f"losses.{name}: no such loss{nearest(name, known)}; known: {', '.join(known)}")
            if not 0 <= weight < math.inf:
                raise bad_value(f"losses.{name}", weight, "a number of at least 0")
        object.__setattr__(self, "losses", {name: weight for name, weight in self.losses.items() if weight})
        if not self.losses:
            raise bad_value("losses", "{}", "at least one loss of a weight above 0")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Trains ``pipeline``'s denoiser to follow ``context.teacher``'s; called in every process of the run.

    Raises:
        UserError: Student, teacher and data do not match, or the training diverged.
    """
    from compress.data.examples import training_size
    from compress.distill.decoded import decoder_of
    from compress.distill.encoded import training_examples
    from compress.distill.guidance import takes_scale
    from compress.distill.losses import load_losses
    from compress.distill.placement import idle_parts, placed
    from compress.distill.validation import drawing
    from compress.models import denoiser
    from compress.models.sampling import Sampling, sampling_of, set_sampling
    from compress.models.schedule import schedule_of
    from compress.models.schedulers import exchanged

    before = sampling_of(pipeline)
    if before.scheduler is not None:
        raise UserError(f"the student was trained for {before.steps} steps, which this would undo: distill it before")
    config = replace(config, guidance=config.guidance or before.guidance)
    schedules = [schedule_of(p.scheduler, denoiser(p)) for p in (pipeline, context.teacher)]
    ours, theirs = (schedule.prediction_type for schedule in schedules)
    if ours != theirs:
        raise UserError(
            f"the student predicts {ours!r} and its teacher {theirs!r}: the scheduler's prediction_type differs"
        )
    examples = training_examples(context, config.max_examples, config.samples)
    decode = None
    if any(loss.decoder for loss in load_losses(config.losses)):
        decode = decoder_of(context.teacher, *training_size(context.teacher, framing=context.data.framing))
    idle = idle_parts(pipeline, context.teacher, used=[] if decode is None else [getattr(context.teacher, "vae", None)])
    with placed(idle, "cpu"):
        report = distill(
            denoiser(pipeline),
            denoiser(context.teacher),
            examples,
            pipeline.scheduler,
            config,
            seed=context.seed,
            device=context.device,
            history=context.history,
            decode=decode,
            keep_zeros=bool(declares([*context.before, *context.history], "zeros")),
            folder=context.folder,
            log=context.log,
            graphs=context.graphs,
            validate=drawing(pipeline, config.validation, context.seed, context.show, context.folder, config.guidance),
        )
    unguided = config.guidance is not None and not takes_scale(denoiser(pipeline))
    after = Sampling(None, config.inference_steps or before.steps, config.guidance, unguided)
    if after.steps is not None:
        pipeline.register_modules(scheduler=exchanged(pipeline.scheduler, "dpmsolver++") or pipeline.scheduler)
    if after != before:
        set_sampling(pipeline, after)
    return report


def check(config: Config, denoiser: "nn.Module", outline: "Outline") -> "nn.Module":
    """Refuses a student that cannot follow its teacher with any weights; the student keeps its shape.

    Raises:
        UserError: See :func:`distill`.
    """
    from compress.distill.alignment import self_attentions
    from compress.distill.compiled import check_compiler
    from compress.distill.guidance import add_scale_input, check_guidance
    from compress.distill.losses import load_losses
    from compress.distill.pair import check_pair

    check_compiler(config.compile)
    teacher = outline.denoiser()
    if teacher is not None:
        check_pair(denoiser, teacher)
        if config.guidance is not None:
            check_guidance(config.guidance, denoiser, teacher)
            add_scale_input(denoiser, config.guidance)
    check_lora(denoiser, config.lora)
    for loss in load_losses(config.losses):
        if loss.attention and not self_attentions(denoiser):
            name = type(denoiser).__name__
            raise bad_value(f"losses.{loss.name}", loss.weight, f"0, since this {name} has no self-attention")
    return denoiser


def check_teacher(config: Config, outline: "Outline") -> None:
    """Refuses a config that does not fit the teacher, whatever the stages before leave, and what is not installed.

    Raises:
        UserError: See :func:`check_model` and :func:`check_draws`; or the teacher is guided already, or a package or a
            compiler is missing.
    """
    from compress.distill.compiled import check_compiler
    from compress.distill.guidance import check_prompted, check_unguided
    from compress.distill.optimizers import check_optimizer

    check_model(outline)
    check_compiler(config.compile)
    check_optimizer(config.optimizer)
    check_draws(config, outline)
    if config.guidance is not None:
        check_prompted(outline)
    teacher = outline.denoiser()
    if teacher is not None:
        check_lora(teacher, config.lora)
        if config.guidance is not None:
            check_unguided(config.guidance, teacher)


def check_draws(config: Config, outline: "Outline") -> None:
    """Refuses a single step of a scheduler that a pipeline cannot draw with.

    Raises:
        UserError: See :func:`compress.models.call.check_steps`.
    """
    from compress.models.call import check_steps
    from compress.models.schedulers import exchanged

    own, drawn = outline.scheduler(), [("samples.steps", config.samples.scheduler, config.samples.steps)]
    if config.validation.prompts:
        drawn.append(("validation.steps", config.validation.scheduler, config.validation.steps))
    if config.inference_steps is not None:
        drawn.append(("inference_steps", "dpmsolver++", config.inference_steps))
    for key, name, steps in drawn:
        other = None if own is None or name == "checkpoint" else exchanged(own, name)
        check_steps(outline.kind, other or own, steps, key)


def check_model(outline: "Outline") -> None:
    """Refuses a teacher for few steps, whose schedule is not known, or whose latents images cannot be encoded to.

    Raises:
        UserError: The first; or see :func:`compress.models.schedule.schedule_of` and
            :func:`compress.models.latents.check_latents`.
    """
    from compress.models.latents import check_autoencoder, check_channels
    from compress.models.schedule import schedule_of

    if outline.sampling.scheduler is not None:
        raise UserError(
            f"the model was trained for {outline.sampling.steps} steps, which training it further would undo: give "
            "the model.path that it was made from, and train for few steps last"
        )
    check_autoencoder(outline.kind, outline.classes)
    teacher, scheduler = outline.denoiser(), outline.scheduler()
    if scheduler is not None:
        schedule_of(scheduler, teacher)
    if teacher is not None and "latent_channels" in outline.configs.get("vae", {}):
        check_channels(outline.kind, outline.configs["vae"], teacher)


def distill(
    student: "nn.Module",
    teacher: "nn.Module",
    examples: "Examples",
    scheduler: Any,
    config: Config,
    *,
    seed: int = 0,
    device: "torch.device | str" = "cpu",
    history: Iterable[Mapping[str, Any]] = (),
    decode: "Callable[[Tensor], list[Tensor]] | None" = None,
    keep_zeros: bool = False,
    folder: Path | None = None,
    log: Callable[[dict[str, float], int], None] | None = None,
    graphs: Path | None = None,
    validate: Callable[[int], None] | None = None,
) -> StageReport:
    """Trains ``student`` in place to follow ``teacher`` and leaves it with its averaged weights.

    Needs no pipeline and no Hydra, only ``examples`` (see :func:`compress.data.examples.encode_examples`). With a
    ``folder`` it saves training states there and continues from the newest; on a CPU with the same number of threads
    the weights equal those of an uninterrupted run bit for bit. ``accelerate launch`` splits the batch among the
    processes.

    Args:
        student: A denoiser of diffusers; trained in float32 and returned to its dtype.
        teacher: One of the same family; unchanged.
        examples: Latents ``(n, ...)`` and the conditions of m captions.
        scheduler: Their diffusers scheduler; its noise schedule and prediction type are used.
        config: See :class:`Config`.
        seed: Of the examples' order, timesteps, noise and dropped prompts.
        device: Where to train.
        history: Entries of the stages between teacher and student, as in ``compress.json``. Their ``details`` name the
            remaining channels (``kept``) and blocks (``blocks``); other blocks of another width are compared through
            a learned 1x1 projection.
        decode: Of losses that use the teacher's decoder, see :func:`compress.distill.decoded.decoder_of`.
        keep_zeros: Whether zero weights of Conv2d and Linear stay zero, as after sparse pruning.
        folder: For training states; None: no states.
        log: Called with metrics and the number of steps done.
        graphs: Folder for OpenVINO's graphs of the teacher; None: every process makes its own.
        validate: See :class:`compress.distill.trainer.Trainer`.

    Returns:
        Coverage, ``details`` (steps, number of examples, final losses, how each block was compared) and curves.

    Raises:
        UserError: Student, teacher and examples do not match, or the training diverged.
        KeyboardInterrupt: After Ctrl-C, once the step is finished and its state saved.
    """
    import torch

    from compress.distill.alignment import matching_attentions, matching_blocks, tapped
    from compress.distill.batches import Batches
    from compress.distill.compiled import compiled
    from compress.distill.forecast import forecast
    from compress.distill.guidance import add_scale_input, check_guidance, empty_prompt, kept_zeros, takes_scale
    from compress.distill.losses import load_losses
    from compress.distill.objective import Objective, Teacher
    from compress.distill.pair import arranged, check_pair
    from compress.distill.timesteps import density_and_weights
    from compress.distill.trainer import Trainer, autocast, joined
    from compress.models.schedule import schedule_of

    check_pair(student, teacher)
    if config.guidance is not None:
        check_guidance(config.guidance, student, teacher)
        add_scale_input(student, config.guidance)
    schedule, losses, history = schedule_of(scheduler, student), load_losses(config.losses), list(history)
    to_output = any(loss.name in ("noise", "output", "perceptual") for loss in losses)
    accelerator, device = joined(torch.device(device), unused=not to_output)
    cast = autocast(config.mixed_precision, next(student.parameters()).dtype, device)
    density, weights = density_and_weights(schedule, config.timestep_sampling, config.min_snr_gamma)
    batches = Batches(
        examples, config.batch_size, schedule.steps, config.prompt_dropout, seed, config.guidance, density=density
    )
    if decode is None and any(loss.decoder for loss in losses):
        raise UserError("a loss uses the teacher's decoder: pass decode=decoder_of(the teacher's pipeline)")
    compared = {
        "features": matching_blocks(student, teacher, history) if any(loss.features for loss in losses) else {},
        "attention": matching_attentions(student, teacher, history) if any(loss.attention for loss in losses) else {},
    }
    pairs = {**compared["features"], **compared["attention"]}
    if keep_zeros and config.lora.rank:
        raise bad_value("lora.rank", config.lora.rank, "0: merged adapters would fill the zeros of the student")
    with (
        arranged(student, teacher, device, config.gradient_checkpointing),
        adapted(student, config.lora, seed) as adapters,
        tapped(student, pairs) as ours,
        tapped(teacher, pairs.values()) as theirs,
    ):
        told = any(loss.teacher or loss.features or loss.attention for loss in losses)
        empty = None if config.guidance is None else empty_prompt(examples.conditions)
        ask = Teacher(teacher, theirs, pairs, cast, empty) if told or config.guidance is not None else None
        alignments = _align(student, ours, ask, batches, schedule, history, device, compared, losses)
        features, attention = alignments.get("features"), alignments.get("attention")
        if ask is not None:
            ask.run_in(config.teacher_engine, graphs)
        objective = Objective(student, ask, schedule, losses, features, ours, weights, cast, device, attention, decode)
        zeros = kept_zeros(student, keep_zeros, config.guidance)
        if takes_scale(student):
            student.time_embedding.cond_proj.requires_grad_(True)  # type: ignore[union-attr]  # with adapters too
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        names = ["loss", *(loss.curve for loss in losses)]
        trainer = Trainer(
            objective, batches, config, names, accelerator,
            averaged=trained, zeros=zeros, folder=folder, log=log, validate=validate, title="distilling",
        )  # fmt: skip
        zeros.check()
        with compiled(student, trainer):
            forecast(trainer)
            record = trainer.train()
    curves = record.curves
    details = {
        **record.details(),
        "examples": len(examples.latents),
        "final": {name: points[-1][1] for name, points in curves.items()},
        "features": features.how if features else {},
        "features_skipped": features.skipped if features else {},
        "attention": attention.how if attention else {},
        "autocast": "no" if cast is nullcontext else "bf16",
        "prediction_type": schedule.prediction_type,
        "processes": accelerator.num_processes,
        **({"guidance": list(config.guidance)} if config.guidance else {}),
        **({"zeros_kept": zeros.count()} if keep_zeros else {}),
        **({"lora_params": sum(parameter.numel() for parameter in trained)} if adapters else {}),
    }
    touched = [student.get_submodule(name) for name in adapters] or list(student.modules())
    modules = sum(1 for m in touched if next(m.parameters(recurse=False), None) is not None)
    total = sum(parameter.numel() for parameter in student.parameters())
    share = sum(p.numel() for m in touched for p in m.parameters()) / total if adapters else 1 - zeros.count() / total
    coverage = {"params": share, "macs": None if adapters else 1.0, "modules": modules, "skipped": {}}
    return StageReport(coverage, details, curves)


def _align(
    student: "nn.Module",
    ours: "dict[str, Tensor]",
    teacher: "Teacher | None",
    batches: "Batches",
    schedule: "Schedule",
    history: list[Mapping[str, Any]],
    device: "torch.device",
    compared: Mapping[str, Mapping[str, str]],
    losses: "Sequence[Loss]",
) -> "dict[str, Alignment]":
    """Runs both on one example for the features' shapes; gives an alignment for each kind that a loss uses."""
    import torch

    from compress.distill.alignment import Alignment, kept_channels
    from compress.distill.objective import predict

    users = {kind: [f"losses.{loss.name}=0" for loss in losses if getattr(loss, kind)] for kind in compared}
    if teacher is None or not any(users.values()):
        return {}
    batch = batches(0, slice(1))
    latents = batch.latents.to(device, torch.float32)
    times = schedule.times(torch.zeros(1, dtype=torch.long, device=device))
    *_, theirs = teacher(latents, times, batch)
    with torch.no_grad():
        predict(student, latents, times, batch, torch.float32)
    found = {}
    for kind in (kind for kind in compared if users[kind]):
        mine = {name: ours[name] for name in compared[kind]}
        found[kind] = alignment = Alignment(mine, theirs, kept_channels(history), batches.seed)
        if not alignment.how:
            what = "block" if kind == "features" else "self-attention"
            raise UserError(
                f"no {what} of the student can be compared with its teacher's ({alignment.skipped}); "
                f"set {' and '.join(users[kind])}"
            )
    ours.clear()
    return found
