"""The losses and what they compare."""

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from pipelines import PIPELINES

from compress.distill.alignment import Alignment, kept_channels, matching_attentions, matching_blocks, tapped
from compress.distill.batches import Batch
from compress.distill.decoded import decoder_of
from compress.distill.losses import Seen, load_losses
from compress.distill.losses.features import loss as features_loss
from compress.distill.objective import Objective, Teacher
from compress.models.conditions import Conditions
from compress.models.inputs import own_size
from compress.models.latents import encode_images
from compress.models.schedule import schedule_of
from compress.prune.bk_sdm import prune_bk_sdm
from compress.prune.width import Config as Width
from compress.prune.width import prune_width
from tests.tiny import tiny_unet

OUTPUT, TARGET, TEACHER = (
    torch.tensor([[[[a, b]]], [[[c, d]]]]) for a, b, c, d in ((1.0, 3, 0, 2), (0, 1, 0, 0), (2, 3, 4, 2))
)
PAIRS = {"mid_block": (torch.tensor([[1.0, 2], [0, 0]]), torch.tensor([[3.0, 4], [0, 2]]))}
PAIRS["up_blocks.0"] = (torch.tensor([[1.0], [1]]), torch.tensor([[0.5], [2]]))
FORMULAS = {
    "noise": [2.5, 0.5 * 2],  # mean squares of (1, 2) and (0, 2), weighted by 1 and 0.5
    "output": [0.5, 0.5 * 8],  # of (1, 0) and (4, 0)
    "features": [(4 / 12.5 + 0.25 / 0.25) / 2, (2 / 2 + 1 / 4) / 2],  # each over the mean square of the teacher's
    "attention": [(4 / 12.5 + 0.25 / 0.25) / 2, (2 / 2 + 1 / 4) / 2],
    "bk_sdm_features": [4 + 0.25, 2 + 1],
    # The decoder gives twice the latents and their squares, the latents are half of the prediction.
    "perceptual": [(0.5 / 6.5 + (1 - 0.25**2 * 4) ** 2 / 2 / ((1 + 2.25**2) / 2)) / 2, 0.0],
}


@pytest.mark.parametrize("name", FORMULAS)
def test_loss_equals_its_formula(name: str) -> None:
    (found,) = load_losses({name: 1.0})
    seen = Seen(
        OUTPUT, TARGET, TEACHER, torch.tensor([1.0, 0.5]), PAIRS, PAIRS, torch.tensor([3.0, 3.1]),
        lambda prediction: prediction / 2, lambda latents: [2 * latents, latents.square()],
    )  # fmt: skip
    torch.testing.assert_close(found.function(seen), torch.tensor(FORMULAS[name]))


def features(*widths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {f"down_blocks.{i}": torch.randn(3, w, 4, 4, generator=source) for i, w in enumerate(widths)}


def error(alignment: Alignment, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> torch.Tensor:
    nothing = torch.zeros(3)
    return features_loss(Seen(nothing, nothing, None, nothing, alignment(ours, theirs)))


def test_losses_of_one_last_name_have_curves_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(loss=lambda seen: seen.output)
    for name in ("first.mine", "second.mine"):
        monkeypatch.setitem(sys.modules, name.partition(".")[0], ModuleType(name.partition(".")[0]))
        monkeypatch.setitem(sys.modules, name, module)
    losses = load_losses({"output": 1.0, "first.mine": 1.0, "second.mine": 1.0})
    assert [loss.curve for loss in losses] == ["output_loss", "first.mine_loss", "second.mine_loss"]


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


def test_attentions_are_paired_by_their_history() -> None:
    teacher = tiny_unet(layers_per_block=2)
    assert matching_attentions(tiny_unet(layers_per_block=2), teacher)[
        "mid_block.attentions.0.transformer_blocks.0.attn1"
    ]
    report = prune_bk_sdm(teacher)
    inside = "transformer_blocks.0.attn1"
    assert matching_attentions(report.denoiser, teacher, [{"details": {"blocks": report.blocks}}]) == {
        f"down_blocks.0.attentions.0.{inside}": f"down_blocks.0.attentions.0.{inside}",
        f"up_blocks.1.attentions.0.{inside}": f"up_blocks.1.attentions.0.{inside}",
        f"up_blocks.1.attentions.1.{inside}": f"up_blocks.1.attentions.2.{inside}",  # the one between them is gone
        f"mid_block.attentions.0.{inside}": f"mid_block.attentions.0.{inside}",
    }


def test_attentions_of_a_narrower_student_are_compared_in_the_kept_channels() -> None:
    teacher = tiny_unet()
    report = prune_width(teacher, Width(ratio=0.5))
    history = [{"details": {"kept": report.kept, "kept_inside": report.kept_inside}}]
    pairs = matching_attentions(report.unet, teacher, history)
    with tapped(report.unet, pairs) as ours, tapped(teacher, pairs.values()) as theirs:
        for model in (teacher, report.unet):
            model(torch.randn(2, 4, 8, 8), 1, torch.randn(2, 3, 16))
    alignment = Alignment(ours, theirs, kept_channels(history), seed=0)
    assert alignment.how == dict.fromkeys(pairs, "kept")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    kept = report.kept_inside["down_blocks.0.attentions.0"]
    biases = [model.get_submodule(name).to_out[0].bias for model in (report.unet, teacher)]
    assert torch.equal(biases[0], biases[1][kept])
    assert torch.equal(alignment(ours, theirs)[name][1], theirs[name][..., kept])
    without = Alignment(ours, theirs, kept_channels([{"details": {"kept": report.kept}}]), seed=0)
    assert without.how == dict.fromkeys(pairs, "projection")


def test_gradients_reach_all_of_the_student_and_nothing_of_the_teacher() -> None:
    student, teacher = tiny_unet(widths=(16, 32)).train().requires_grad_(True), tiny_unet()
    losses = load_losses({"attention": 1.0})
    pairs = matching_attentions(student, teacher)
    source = torch.Generator().manual_seed(0)
    batch = Batch(
        torch.randn(2, 4, 8, 8, generator=source), torch.randn(2, 4, 8, 8, generator=source), torch.tensor([10, 800]),
        Conditions({"encoder_hidden_states": torch.randn(2, 5, 16, generator=source)}, {}),
    )  # fmt: skip
    with tapped(student, pairs) as ours, tapped(teacher, pairs.values()) as theirs:
        ask = Teacher(teacher, theirs, pairs, nullcontext)
        *_, shapes = ask(batch.latents, batch.timesteps, batch)
        student(batch.latents, batch.timesteps, batch.conditions.rows["encoder_hidden_states"])
        alignment = Alignment(ours, shapes, {}, seed=0)
        schedule = schedule_of(DDPMScheduler())
        objective = Objective(
            student, ask, schedule, losses, None, ours, torch.ones(1000), nullcontext, torch.device("cpu"), alignment
        )
        objective(batch)[0].backward()
    with_gradient = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    last = [name for name in pairs if name.startswith("up_blocks.1")][-1]
    assert f"student.{last}.to_q.weight" in with_gradient and "student.conv_in.weight" in with_gradient
    assert {f"attention.{name}" for name, _ in alignment.named_parameters()} <= with_gradient
    # What follows the last self-attention is not reached.
    assert not with_gradient & {"student.conv_out.weight", f"student.{last.replace('attn1', 'attn2')}.to_q.weight"}
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", ["sd 1.x", "ddpm", "sana", "sd3", "flux"])
def test_the_decoder_gives_features_and_the_pipelines_own_picture(name: str) -> None:
    pipeline = PIPELINES[name]()
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    if name == "flux":
        pipeline.default_sample_size = 8
    height, width = own_size(pipeline)
    latents = encode_images(pipeline, [pixels], height, width).requires_grad_(True)
    if name != "ddpm":
        pipeline.vae.requires_grad_(True)  # a library's caller need not freeze it
    *features, picture = decoder_of(pipeline)(latents)
    assert picture.shape == (1, 3, height, width)
    assert len(features) == (0 if name == "ddpm" else len(pipeline.vae.decoder.up_blocks))
    (sum(feature.square().mean() for feature in features) + picture.square().mean()).backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    if name == "ddpm":
        return
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipeline.vae.parameters())
    spatial = (
        latents if latents.ndim == 4 else pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    )
    shift = pipeline.vae.config.get("shift_factor") or 0.0
    with torch.no_grad():
        torch.testing.assert_close(
            picture, pipeline.vae.decode(spatial / pipeline.vae.config.scaling_factor + shift).sample
        )
