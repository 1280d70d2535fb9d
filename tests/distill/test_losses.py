"""The losses and what they compare."""

import pytest
import torch

from compress.distill.alignment import Alignment, kept_channels, matching_blocks, tapped
from compress.distill.losses import Seen
from compress.distill.losses.features import loss as features_loss
from tests.tiny import tiny_unet


def features(*widths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {f"down_blocks.{i}": torch.randn(3, w, 4, 4, generator=source) for i, w in enumerate(widths)}


def error(alignment: Alignment, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> torch.Tensor:
    nothing = torch.zeros(3)
    return features_loss(Seen(nothing, nothing, None, nothing, alignment(ours, theirs)))


def test_student_of_the_kept_channels_has_no_error():
    theirs = features(8, 12)
    kept = {"down_blocks.0": [6, 1, 3], "down_blocks.1": [0, 11]}
    ours = {name: theirs[name][:, kept[name]] for name in theirs}
    loss = Alignment(ours, theirs, kept, seed=0)
    assert loss.how == {"down_blocks.0": "kept", "down_blocks.1": "kept"}
    assert error(loss, ours, theirs).tolist() == [0.0, 0.0, 0.0]
    assert not list(loss.parameters())


def test_error_is_relative_to_the_teacher():
    theirs = features(8)
    nothing = {name: torch.zeros_like(feature) for name, feature in theirs.items()}
    loss = Alignment(nothing, theirs, {}, seed=0)
    for scale in (1.0, 100.0):
        scaled = {name: scale * feature for name, feature in theirs.items()}
        torch.testing.assert_close(error(loss, nothing, scaled), torch.ones(3))


def test_other_widths_are_projected():
    ours, theirs = features(6, 8), features(8, 8, seed=1)
    loss = Alignment(ours, theirs, {"down_blocks.0": [1, 2]}, seed=0)  # fits no longer: two channels, not six
    assert loss.how == {"down_blocks.0": "projection", "down_blocks.1": "same"}
    (projection,) = loss.projections.values()
    assert projection.weight.shape == (8, 6, 1, 1)
    again = Alignment(ours, theirs, {}, seed=0)
    assert torch.equal(projection.weight, next(iter(again.projections.values())).weight)
    error(loss, ours, theirs).sum().backward()
    assert projection.weight.grad.abs().sum() > 0


def test_other_resolutions_are_skipped_with_the_reason():
    loss = Alignment(features(8), {"down_blocks.0": torch.randn(3, 8, 2, 2)}, {}, seed=0)
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
