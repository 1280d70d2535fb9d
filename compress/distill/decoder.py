"""Method ``decoder``: a small autoencoder takes the VAE's place; its decoder is trained to follow the teacher's.

Like TAESD (https://github.com/madebyollin/taesd) it is a stack of 3x3 convolutions with ReLU, diffusers'
``AutoencoderTiny``. It takes latents in the scale of the denoiser, so its scaling factor is 1 and its shift 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config.values import nearest
from compress.data.samples import SamplesConfig
from compress.distill.training import TrainingConfig, check_examples, check_value, refuse_unused
from compress.errors import UserError, bad_value
from compress.stage import Stage, StageContext, StageReport

# torch and diffusers are imported in functions, so that checking a config does not load them.
if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from diffusers import AutoencoderTiny, DiffusionPipeline
    from torch import Tensor, nn

    from compress.models.outline import Outline

STAGE = Stage(
    version=2,
    needs="any",
    distributed=True,
    keeps_names=True,
    by_names=True,
    tag="small-decoder",
    limits=("The VAE is a small one. Its encoder, which image-to-image uses, is less exact than the teacher's.",),
)

LOSSES = {"l1": 0.0, "l2": 1.0, "laplacian": 0.1, "encoder": 0.1}
"""The losses and their weights."""

DECODED = 8  # latents that a VAE decodes at once
TIMED = 20  # decodings of one image, in turns


@dataclass(frozen=True)
class Config(TrainingConfig):
    """The shape of the autoencoder and how it is trained.

    Attributes:
        width: Channels of every layer, at least 1; None: half of the teacher's narrowest level, 64 for published
            models.
        blocks: Residual blocks of three convolutions at each resolution but the last, which has one; at least 1.
        max_examples: At most this many images, chosen at random by the seed; None: all; 0: none.
        samples: Latents that the teacher samples, to train on besides.
        held_out: Examples that are not trained on and measure the result; at most a tenth of all.
        crop: Side of random crops of the latents; None: whole latents.
        losses: Name of a loss to its weight, at least 0: ``l1``, ``l2`` and ``laplacian`` compare pictures in [0, 1]
            with the teacher's; ``encoder`` is the squared error of the encoder's latents.
    """

    steps: int = 2000
    batch_size: int = 16
    optimizer: str = "muon"
    learning_rate: float = 4e-3
    save_every: int = 200
    log_every: int = 50
    ema_decay: float = 0.995
    width: int | None = None
    blocks: int = 3
    max_examples: int | None = None
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    held_out: int = 128
    crop: int | None = None
    losses: dict[str, float] = field(default_factory=lambda: dict(LOSSES))

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            UserError: A value is out of its range.
        """
        super().__post_init__()
        refuse_unused(self, "teacher_engine", "gradient_checkpointing", "compile", "validation")
        for key in ("width", "crop"):
            value = getattr(self, key)
            check_value(self, key, value is None or value >= 1, "an integer of at least 1, or null")
        check_examples(self)
        for key in ("blocks", "held_out"):
            check_value(self, key, getattr(self, key) >= 1, "an integer of at least 1")
        for name, weight in self.losses.items():
            if name not in LOSSES:
                raise UserError(f"losses.{name}: no such loss{nearest(name, list(LOSSES))}; known: {', '.join(LOSSES)}")
            if not 0 <= weight < math.inf:
                raise bad_value(f"losses.{name}", weight, "a number of at least 0")
        object.__setattr__(self, "losses", {name: weight for name, weight in self.losses.items() if weight})
        if "encoder" not in self.losses or len(self.losses) == 1:
            raise bad_value("losses", self.losses, "weights above 0 for encoder and for one of l1, l2 and laplacian")


def check(config: Config, denoiser: "nn.Module", outline: "Outline") -> "nn.Module":
    """Refuses a pipeline without a VAE that a small one could replace; the denoiser stays.

    Raises:
        UserError: See :func:`small_autoencoder`.
    """
    _shape(outline.configs.get("vae"), outline.kind)
    return denoiser


def check_teacher(config: Config, outline: "Outline") -> None:
    """Refuses an optimizer that cannot run here.

    Raises:
        UserError: See :func:`compress.distill.optimizers.check_optimizer`.
    """
    from compress.distill.optimizers import check_optimizer

    check_optimizer(config.optimizer)


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Trains a small autoencoder on the teacher's latents and makes it ``pipeline``'s VAE; called in every process.

    Raises:
        UserError: The pipeline has no VAE that could be replaced, or the training diverged.
    """
    from compress.data.examples import training_size
    from compress.distill.encoded import training_examples
    from compress.models.latents import unpacked

    teacher: Any = context.teacher
    _shape(getattr(getattr(teacher, "vae", None), "config", None), type(teacher).__name__)
    examples = training_examples(context, config.max_examples, config.samples)
    height, width = training_size(teacher, framing=context.data.framing)
    small, report = distill_decoder(
        teacher.vae,
        lambda rows: unpacked(teacher, examples.latents[rows], height, width),
        len(examples.latents),
        config,
        seed=context.seed,
        mirrored=(len(examples.latents) - config.samples.count) // 2 if context.data.framing.flip else 0,
        folder=context.folder,
        log=context.log,
    )
    any_pipeline: Any = pipeline
    any_pipeline.register_modules(vae=small)
    return report


def small_autoencoder(teacher: Any, config: Config, seed: int = 0) -> "AutoencoderTiny":
    """An untrained autoencoder for the teacher's latents in the scale of its denoiser.

    Args:
        teacher: Config of the teacher's VAE.
        config: Its width and blocks.
        seed: Of the weights.

    Raises:
        UserError: The teacher's VAE is none of images of three channels with a whole number of halvings.
    """
    import torch
    from diffusers import AutoencoderTiny

    channels, widths = _shape(teacher, "the pipeline")
    levels, width = len(widths), config.width or max(1, min(widths) // 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(width,) * levels,
            decoder_block_out_channels=(width,) * levels,
            num_encoder_blocks=(1,) * levels,
            num_decoder_blocks=(*(config.blocks,) * (levels - 1), 1),
        )


def distill_decoder(
    teacher: Any,
    latents: "Callable[[Tensor], Tensor]",
    count: int,
    config: Config,
    *,
    seed: int = 0,
    mirrored: int = 0,
    folder: Path | None = None,
    log: Callable[[dict[str, float], int], None] | None = None,
) -> "tuple[AutoencoderTiny, StageReport]":
    """Trains a small autoencoder to decode as the teacher does, and to encode what was decoded.

    Needs no data but latents, which the teacher decodes once. With a ``folder`` the pictures and training states are
    kept there, and the training continues from the newest state to the same weights bit for bit.

    Args:
        teacher: An autoencoder of diffusers; unchanged.
        latents: From indices ``(b,)`` to latents ``(b, c, h, w)`` in the scale of the denoiser.
        count: Number of latents; the last :attr:`Config.held_out` of a random order measure the result.
        config: See :class:`Config`.
        seed: Of weights, order and crops.
        mirrored: How many latents at the beginning are followed by those of the mirrored images.
        folder: For pictures and training states; None: pictures are in memory and there are no states.
        log: Called with metrics and the number of steps done.

    Returns:
        The autoencoder in the teacher's dtype, frozen, and the report. Its ``details`` have PSNR and SSIM of held-out
        pictures to the teacher's, the parameters and the seconds of decoding one image.

    Raises:
        UserError: The teacher's VAE is not supported, there are fewer than two latents, or the training diverged.
    """
    from compress.distill.forecast import forecast
    from compress.distill.pair import arranged
    from compress.distill.trainer import Trainer, autocast, joined

    small: Any = small_autoencoder(teacher.config, config, seed)
    device = teacher.device
    small.to(device, teacher.dtype).eval().requires_grad_(False)
    accelerator, _ = joined(device)
    trained, held = _split(count, config.held_out, seed, mirrored)
    cast = autocast(config.mixed_precision, teacher.dtype, device)
    with accelerator.main_process_first():
        pictures = _pictures(teacher, latents, count, folder)

    def batches(step: int, part: slice) -> "tuple[Tensor, Tensor]":
        return _batch(latents, pictures, trained, config, seed, step, part)

    with arranged(small, teacher, device):
        trainer = Trainer(
            _objective(small, config.losses, cast, device), batches, config,
            ["loss", *(f"{name}_loss" for name in config.losses)], accelerator,
            folder=folder, log=log, title="distilling the decoder",
        )  # fmt: skip
        forecast(trainer)
        record = trainer.train()
    curves = record.curves
    figures = _quality(small, latents, pictures, held, seed) | _seconds(small, teacher, latents(held[:1]))
    details = {
        **record.details(),
        "examples": len(trained),
        "held_out": len(held),
        "final": {name: points[-1][1] for name, points in curves.items()},
        **figures,
        "config_before": {"VAE": type(teacher).__name__, "its parameters": _params(teacher)},
        "config_after": {"VAE": type(small).__name__, "its parameters": _params(small)},
    }
    modules = sum(1 for m in small.modules() if next(m.parameters(recurse=False), None) is not None)
    return small, StageReport({"params": 0.0, "macs": 0.0, "modules": modules, "skipped": {}}, details, curves)


def decoded(vae: Any, latents: "Tensor") -> "Tensor":
    """The pictures that a VAE decodes, ``(b, 3, height, width)``, within [-1, 1].

    Args:
        vae: An autoencoder of diffusers.
        latents: ``(b, c, h, w)`` in the scale of the denoiser.
    """
    from compress.models.latents import unscaled

    return vae.decode(unscaled(vae, latents).to(vae.dtype), return_dict=False)[0].clamp(-1, 1).float()


def l1(error: "Tensor") -> "Tensor":
    """Mean absolute error, a scalar.

    Args:
        error: Difference of pictures in [0, 1], ``(b, 3, height, width)``.
    """
    return error.abs().mean()


def l2(error: "Tensor") -> "Tensor":
    """Mean squared error, a scalar; see :func:`l1`."""
    return error.square().mean()


def laplacian(error: "Tensor") -> "Tensor":
    """L1 distance of the Laplacian pyramids, the mean over their bands; a scalar, see :func:`l1`.

    It weighs edges and large areas alike, whatever the size (Bojanowski et al. 2018, https://arxiv.org/abs/1707.05776).
    The pyramid is linear, so that of the difference is the difference of the pyramids.
    """
    import torch
    from torch.nn import functional

    bands = []
    while min(error.shape[-2:]) >= 8:
        coarse = functional.avg_pool2d(error, 2)
        bands.append((error - functional.interpolate(coarse, error.shape[-2:])).abs().mean())
        error = coarse
    return torch.stack([*bands, error.abs().mean()]).mean()


def _pictures(teacher: Any, latents: "Callable[[Tensor], Tensor]", count: int, folder: Path | None) -> "Tensor":
    """The teacher's pictures of all latents, uint8 ``(count, 3, height, width)``, mapped from a file of the folder."""
    import torch

    from compress.data.tensors import Chunk, cached
    from compress.models.latents import in_range
    from compress.system.progress import bar

    with torch.no_grad(), bar() as progress:
        task = progress.add_task("decoding latents", total=count)

        def chunk(start: int) -> Chunk:
            rows = torch.arange(start, min(start + DECODED, count))
            with in_range(teacher):
                found = decoded(teacher, latents(rows).to(teacher.device))
            if not found.isfinite().all():
                raise UserError("the teacher's VAE gives NaN or infinite pictures: use precision=fp32 or bf16")
            stop = start + len(rows)
            progress.update(task, completed=stop)
            return Chunk({"pictures": _rounded(found)}, stop, {}, {})

        file = None if folder is None else folder / "pictures.safetensors"
        return cached(count, chunk, file, "pictures")[0]["pictures"]


def _rounded(pictures: "Tensor") -> "Tensor":
    """Pictures in [-1, 1] as uint8 on the CPU."""
    import torch

    return ((pictures + 1) * 127.5).round().to(torch.uint8).cpu()


def _objective(
    small: Any, weights: "Mapping[str, float]", cast: Callable[[], Any], device: "torch.device"
) -> "nn.Module":
    import torch
    from torch import nn

    of_pictures = {"l1": l1, "l2": l2, "laplacian": laplacian}

    class Pictures(nn.Module):
        """Student and losses in one module, so that distributed training sees one forward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = small.encoder, small.decoder

        def forward(self, batch: "tuple[Tensor, Tensor]") -> "Tensor":
            """The weighted sum of the losses and each loss, ``(1 + number of losses,)``."""
            latents, pictures = (
                tensor.to(device, torch.float32, memory_format=torch.channels_last) for tensor in batch
            )
            wanted = pictures / 127.5 - 1
            with cast():
                error = (self.decoder(latents).float() - wanted) / 2
                found = {name: of_pictures[name](error) for name in weights if name != "encoder"}
                found["encoder"] = l2(self.encoder(wanted).float() - latents)
            total = sum(weights[name] * value for name, value in found.items())
            return torch.stack([torch.as_tensor(total), *(found[name] for name in weights)])

    return Pictures()


def _batch(
    latents: "Callable[[Tensor], Tensor]",
    pictures: "Tensor",
    trained: "Tensor",
    config: Config,
    seed: int,
    step: int,
    part: slice,
) -> "tuple[Tensor, Tensor]":
    """Latents and pictures of a part of a step's batch; depends on the seed and the step only."""
    import torch

    from compress.distill.batches import drawn
    from compress.system.random import generator

    rows = trained[drawn(len(trained), config.batch_size, seed, step)]
    found, wanted = latents(rows[part]), pictures[rows[part]]
    if config.crop is None:
        return found, wanted
    scale = wanted.shape[-1] // found.shape[-1]
    sides = [min(config.crop, side) for side in found.shape[-2:]]
    source = generator(seed, "crop", step)
    places = torch.rand(config.batch_size, 2, generator=source)[part]
    crops = []
    for x, y, place in zip(found, wanted, places.tolist(), strict=True):
        top, left = (int(at * (side - kept + 1)) for at, side, kept in zip(place, x.shape[-2:], sides, strict=True))
        at, to = (slice(top, top + sides[0]), slice(left, left + sides[1])), (top * scale, left * scale)
        end = (to[0] + sides[0] * scale, to[1] + sides[1] * scale)
        crops.append((x[:, at[0], at[1]], y[:, to[0] : end[0], to[1] : end[1]]))
    first, second = zip(*crops, strict=True)
    return torch.stack(first), torch.stack(second)


def _split(count: int, held_out: int, seed: int, mirrored: int = 0) -> "tuple[Tensor, Tensor]":
    """Indices to train on and those held out; the mirrored image of one held out is in neither."""
    import torch

    from compress.system.random import generator

    if count < 2:
        raise UserError(f"a decoder needs at least 2 examples, one to train on and one held out; there are {count}")
    held = min(held_out, max(1, count // 10))
    order = torch.randperm(count, generator=generator(seed, "held out", 0))
    trained, out = order[held:], order[:held]
    images = torch.where(order < 2 * mirrored, order % max(1, mirrored), order)
    return trained[~torch.isin(images[held:], images[:held])], out


def _quality(
    small: Any, latents: "Callable[[Tensor], Tensor]", pictures: "Tensor", held: "Tensor", seed: int
) -> dict[str, Any]:
    """PSNR and SSIM of the held-out pictures to the teacher's, with intervals."""
    import torch

    from compress.evaluate.metrics.paired import PSNR, SSIM, WINDOW

    metrics: dict[str, Any] = {"psnr": PSNR(seed=seed)}
    if min(pictures.shape[-2:]) >= WINDOW:
        metrics["ssim"] = SSIM(seed=seed)
    with torch.no_grad():
        for rows in held.split(DECODED):
            ours = _rounded(decoded(small, latents(rows).to(small.device)))
            for metric in metrics.values():
                metric.update(ours, pictures[rows])
    return {name: metric.compute() for name, metric in metrics.items()}


def _seconds(small: Any, teacher: Any, latents: "Tensor") -> dict[str, float]:
    """Seconds of decoding one image, eager, in turns: the median."""
    import statistics

    import torch

    from compress.runtime.turns import turns

    latents = latents.to(teacher.device)
    with torch.no_grad():
        calls = {"seconds_before": lambda: decoded(teacher, latents), "seconds_after": lambda: decoded(small, latents)}
        times = turns(calls, TIMED, teacher.device, most_seconds=20)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _params(model: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _shape(config: Any, kind: str) -> tuple[int, list[int]]:
    """Channels of a VAE's latents, and the width of each of its levels."""
    found = dict(config or {})
    widths = found.get("block_out_channels") or found.get("decoder_block_out_channels")
    if not widths or "latent_channels" not in found or "scaling_factor" not in found:
        what = f"has a VAE of another kind ({found.get('_class_name')})" if found else "has no VAE"
        raise UserError(
            f"a small decoder replaces a VAE of images with latent_channels and scaling_factor; {kind} {what}"
        )
    if (found.get("in_channels", 3), found.get("out_channels", 3)) != (3, 3):
        raise UserError(f"a small decoder is made for pictures of 3 channels; {kind} has a VAE of others")
    return int(found["latent_channels"]), list(widths)
