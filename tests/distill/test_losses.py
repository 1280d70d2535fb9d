"""The losses and what they compare."""

import pytest
import torch
from diffusers import DDPMScheduler

from compress.distill.losses import FeatureLoss, kept_channels, matching_blocks, tapped, target_of, weight_of
from tests.tiny import tiny_unet


def features(*widths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {f"down_blocks.{i}": torch.randn(3, w, 4, 4, generator=source) for i, w in enumerate(widths)}


def test_student_of_the_kept_channels_has_no_error():
    theirs = features(8, 12)
    kept = {"down_blocks.0": [6, 1, 3], "down_blocks.1": [0, 11]}
    ours = {name: theirs[name][:, kept[name]] for name in theirs}
    loss = FeatureLoss(ours, theirs, kept, seed=0)
    assert loss.how == {"down_blocks.0": "kept", "down_blocks.1": "kept"}
    assert loss(ours, theirs).tolist() == [0.0, 0.0, 0.0]
    assert not list(loss.parameters())


def test_error_is_relative_to_the_teacher():
    theirs = features(8)
    nothing = {name: torch.zeros_like(feature) for name, feature in theirs.items()}
    loss = FeatureLoss(nothing, theirs, {}, seed=0)
    for scale in (1.0, 100.0):
        scaled = {name: scale * feature for name, feature in theirs.items()}
        torch.testing.assert_close(loss(nothing, scaled), torch.ones(3))


def test_other_widths_are_projected():
    ours, theirs = features(6, 8), features(8, 8, seed=1)
    loss = FeatureLoss(ours, theirs, {"down_blocks.0": [1, 2]}, seed=0)  # fits no longer: two channels, not six
    assert loss.how == {"down_blocks.0": "projection", "down_blocks.1": "same"}
    (projection,) = loss.projections.values()
    assert projection.weight.shape == (8, 6, 1, 1)
    again = FeatureLoss(ours, theirs, {}, seed=0)
    assert torch.equal(projection.weight, next(iter(again.projections.values())).weight)
    loss(ours, theirs).sum().backward()
    assert projection.weight.grad.abs().sum() > 0


def test_other_resolutions_are_skipped_with_the_reason():
    loss = FeatureLoss(features(8), {"down_blocks.0": torch.randn(3, 8, 2, 2)}, {}, seed=0)
    assert loss.how == {}
    assert loss.skipped == {"down_blocks.0": "(4, 4) against the teacher's (2, 2)"}


def test_kept_channels_compose():
    first = {"kind": "prune", "details": {"kept": {"mid_block": [0, 2, 4, 6], "down_blocks.0": [1, 3]}}}
    second = {"kind": "prune", "details": {"kept": {"mid_block": [3, 1]}}}
    assert kept_channels([first, {"kind": "distill"}, second]) == {"mid_block": [6, 2], "down_blocks.0": [1, 3]}
    third = {"kind": "prune", "details": {"kept": {"mid_block": [5]}}}  # there were only two left
    assert kept_channels([first, second, third]) == {"down_blocks.0": [1, 3]}
    assert kept_channels([]) == {}


def test_blocks_are_paired_at_their_resolution():
    teacher, student = tiny_unet(widths=(16, 16, 32)), tiny_unet(widths=(16, 16))
    assert matching_blocks(student, teacher) == {
        "down_blocks.0": "down_blocks.0",
        "down_blocks.1": "down_blocks.1",
        "mid_block": "mid_block",
        "up_blocks.0": "up_blocks.1",
        "up_blocks.1": "up_blocks.2",
    }
    student.mid_block = None
    assert "mid_block" not in matching_blocks(student, teacher)


def test_hooks_are_removed_on_errors():
    unet = tiny_unet(widths=(16, 16))
    with pytest.raises(RuntimeError, match="stop"), tapped(unet, ["mid_block", "down_blocks.0"]) as outputs:
        unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, 16))
        assert outputs["down_blocks.0"].shape == (1, 16, 4, 4)
        assert outputs["mid_block"].shape == (1, 16, 4, 4)
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_target_gives_back_the_latents(kind):
    scheduler = DDPMScheduler(prediction_type=kind, clip_sample=False)
    latents, noise, times = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.tensor([400, 400])
    noisy = scheduler.add_noise(latents, noise, times)
    target = target_of(scheduler, latents, noise, times)
    torch.testing.assert_close(scheduler.step(target, 400, noisy).pred_original_sample, latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_weight_is_min_snr(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    times = torch.tensor([0, 300, 999])
    alpha = scheduler.alphas_cumprod[times]
    snr = alpha / (1 - alpha)
    by = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(3)}[kind]
    torch.testing.assert_close(weight_of(scheduler, times, 5.0), snr.clamp(max=5.0) / by, rtol=1e-4, atol=1e-6)
    assert weight_of(scheduler, times, None).tolist() == [1.0, 1.0, 1.0]


def test_weight_without_any_signal_is_finite():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    scheduler.alphas_cumprod[-1] = 0.0
    assert weight_of(scheduler, torch.tensor([999]), 5.0).tolist() == [1.0]
