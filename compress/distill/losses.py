"""What the student is trained for: the true noise, the teacher's prediction and the teacher's features."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch import nn

from compress.system.random import generator


def kept_channels(history: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """The teacher's channels that are left in each block after all stages before.

    Args:
        history: Entries whose ``details`` may hold ``kept``, block -> indices into what the stage before left, and
            ``blocks``, block -> the block of the stage before that it is, or None where it gives something else.

    Returns:
        Block -> indices into the teacher's channels.
    """
    kept: dict[str, list[int]] = {}
    for entry in history:
        if renamed := entry.get("details", {}).get("blocks"):
            kept = {block: kept[old] for block, old in renamed.items() if old in kept}
        for block, now in (entry.get("details", {}).get("kept") or {}).items():
            before = kept.get(block)
            if before is None:
                kept[block] = list(now)
            elif not now or max(now) < len(before):
                kept[block] = [before[i] for i in now]
            else:
                # Something in between changed the block; nobody knows any more which channels these are.
                kept[block] = []
    return {block: indices for block, indices in kept.items() if indices}


def matching_blocks(student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """Pairs the student's blocks with the teacher's: down blocks from the first, up blocks from the last.

    So a student that lost its innermost level is compared at the resolutions that it still has.
    """
    pairs = {
        f"down_blocks.{i}": f"down_blocks.{i}" for i in range(min(_count(student, "down"), _count(teacher, "down")))
    }
    if getattr(student, "mid_block", None) is not None and getattr(teacher, "mid_block", None) is not None:
        pairs["mid_block"] = "mid_block"
    ours, theirs = _count(student, "up"), _count(teacher, "up")
    pairs |= {f"up_blocks.{ours - i}": f"up_blocks.{theirs - i}" for i in range(min(ours, theirs), 0, -1)}
    return pairs


def _count(model: nn.Module, side: str) -> int:
    return len(getattr(model, f"{side}_blocks", ()))


@contextmanager
def tapped(model: nn.Module, blocks: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Collects the outputs of ``blocks`` whenever ``model`` runs; its hooks are gone afterwards, errors or not."""
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            # A down block gives its output and those for the skip connections.
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class FeatureLoss(nn.Module):
    """Error of the student's features relative to the teacher's, the mean over blocks.

    A block's error of one example is its mean squared error over the mean square of the teacher's feature, so that it
    is about 1 for a student that gives nothing, whatever the block's scale and the timestep.

    Args:
        ours: The student's features, block -> ``(1, c, h, w)``; only shapes count.
        theirs: The teacher's, under the student's names.
        kept: Block -> the teacher's channels that the student has, in its order.
        seed: Of the projections' initial weights.

    Attributes:
        how: Block -> ``same``, ``kept`` or ``projection``.
        skipped: Block -> why it is not compared.
    """

    def __init__(
        self,
        ours: Mapping[str, torch.Tensor],
        theirs: Mapping[str, torch.Tensor],
        kept: Mapping[str, list[int]],
        seed: int,
    ) -> None:
        super().__init__()
        self.how: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.projections = nn.ModuleDict()
        self._kept: dict[str, torch.Tensor] = {}
        for name, feature in ours.items():
            width, full = feature.shape[1], theirs[name].shape[1]
            indices = kept.get(name, [])
            if feature.shape[2:] != theirs[name].shape[2:]:
                self.skipped[name] = f"{tuple(feature.shape[2:])} against the teacher's {tuple(theirs[name].shape[2:])}"
            elif len(indices) == width and min(indices) >= 0 and max(indices) < full:
                self.how[name] = "kept"
                self._kept[name] = torch.tensor(indices, device=feature.device)
            elif width == full:
                self.how[name] = "same"
            else:
                self.how[name] = "projection"
                projection = nn.Conv2d(width, full, 1)
                nn.init.normal_(
                    projection.weight, std=width**-0.5, generator=generator(seed, "projection", len(self.how))
                )
                nn.init.zeros_(projection.bias)
                self.projections[_key(name)] = projection.to(feature.device)

    def forward(self, ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """From features ``(b, c, h, w)`` to errors ``(b,)``."""
        errors = []
        for name, how in self.how.items():
            mine, target = ours[name], theirs[name].float()
            if how == "kept":
                target = target.index_select(1, self._kept[name])
            elif how == "projection":
                mine = self.projections[_key(name)](mine)
            scale = target.pow(2).mean((1, 2, 3)).clamp(min=1e-8)
            errors.append((mine.float() - target).pow(2).mean((1, 2, 3)) / scale)
        return torch.stack(errors).mean(0)


def _key(name: str) -> str:
    return name.replace(".", "_")  # a module's name must not hold a dot


class Objective(nn.Module):
    """The student with its losses, in one module so that distributed training sees one forward pass.

    Args:
        student: The denoiser that is trained.
        taps: Where the student's features appear when it runs, see :func:`tapped`.
        features: The features' loss; None: they are not compared.
        weights: Of noise, output and features.
    """

    def __init__(
        self,
        student: nn.Module,
        taps: dict[str, torch.Tensor],
        features: FeatureLoss | None,
        weights: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.student = student
        self.features = features
        self._taps = taps
        self._weights = weights

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor,
        teacher_output: torch.Tensor | None,
        teacher_features: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The means over the batch of four losses ``(4,)``: their weighted sum, noise, output and features.

        Args:
            noisy: ``(b, c, h, w)``.
            timesteps: ``(b,)``.
            embeddings: ``(b, tokens, width)``.
            target: ``(b, c, h, w)``, what a perfect denoiser predicts.
            weight: ``(b,)``, of noise and output by timestep.
            teacher_output: ``(b, c, h, w)``; None: not compared.
            teacher_features: Under the student's names of blocks.
        """
        output = self.student(noisy, timesteps, embeddings, return_dict=False)[0].float()
        noise_loss = ((output - target).pow(2).mean((1, 2, 3)) * weight).mean()
        output_loss = feature_loss = torch.zeros_like(noise_loss)
        if teacher_output is not None:
            output_loss = ((output - teacher_output.float()).pow(2).mean((1, 2, 3)) * weight).mean()
        if self.features is not None:
            feature_loss = self.features(self._taps, teacher_features).mean()
        self._taps.clear()
        losses = (noise_loss, output_loss, feature_loss)
        total = sum(w * loss for w, loss in zip(self._weights, losses, strict=True))
        return torch.stack([torch.as_tensor(total), *losses])


def target_of(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What a perfect denoiser predicts, ``(b, c, h, w)``, by the scheduler's prediction type."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return latents if kind == "sample" else noise


def weight_of(scheduler: Any, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """The weight of each timestep, ``(b,)``: min-SNR (Hang et al. 2023, equations 8 to 10), or 1 without ``gamma``."""
    if gamma is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    snr = compute_snr(scheduler, timesteps)
    clipped = snr.clamp(max=gamma)
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return clipped / (snr + 1)
    # Without any signal, as in a schedule with zero terminal SNR, the ratio's limit is 1.
    return clipped if kind == "sample" else torch.where(snr > 0, clipped / snr, 1.0)
