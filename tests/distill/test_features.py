"""The method: it teaches, leaves everything else as it was, and refuses what cannot work."""

import math
import re
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from diffusers import DDPMScheduler, KarrasVeScheduler
from omegaconf import OmegaConf

from compress.data.examples import Examples, encode_examples
from compress.distill import optimizers
from compress.distill.batches import Batches
from compress.distill.decoded import decoder_of
from compress.distill.features import Config, distill
from compress.distill.training import TrainingConfig
from compress.errors import UserError
from compress.models.conditions import Conditions
from tests.distill.worker import CONFIG, distilled, images
from tests.tiny import tiny_pipeline, tiny_unet, tiny_vae

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def examples(count: int = 12, channels: int = 4, width: int = 16) -> Examples:
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(count, channels, 8, 8, generator=source)
    conditions = Conditions({"encoder_hidden_states": torch.randn(4, 5, width, generator=source)}, {})
    return Examples(latents, 1 + torch.arange(count) % 3, conditions)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_student_comes_closer_to_its_teacher(kind):
    teacher, student = tiny_unet(seed=0), tiny_unet(widths=(16, 32), seed=1)
    scheduler = DDPMScheduler.from_config(SCHEDULER.config, prediction_type=kind)
    held = Batches(examples(), 16, 1000, prompt_dropout=0.0, seed=1)(10**6, slice(None))

    def distance() -> float:
        noisy = scheduler.add_noise(held.latents, held.noise, held.timesteps)
        with torch.no_grad():
            ours, theirs = (m(noisy, held.timesteps, **held.conditions.rows).sample for m in (student, teacher))
        return (ours - theirs).pow(2).mean().item()

    before = distance()
    # A teacher with random weights knows nothing about noise: only it is followed here.
    config = Config(
        steps=60,
        batch_size=8,
        learning_rate=3e-3,
        losses={"output": 1.0, "features": 0.1},
        ema_decay=0.9,
        min_snr_gamma=None,
    )
    report = distill(student, teacher, examples(), scheduler, config)
    assert distance() < 0.3 * before
    assert report.curves["loss"][-1][1] < 0.5 * report.curves["loss"][0][1]
    assert report.curves["features_loss"][-1][1] < report.curves["features_loss"][0][1]
    assert set(report.details["features"].values()) == {"projection"}
    assert report.coverage["params"] == 1.0


FOLLOWING = ["output", "features", "bk_sdm_features", "attention", "perceptual"]


def test_student_like_its_teacher_has_nothing_to_learn():
    pipeline = tiny_pipeline()
    student = deepcopy(pipeline.unet)
    history = [{"details": {"kept": {"mid_block": list(range(64))}}}]
    config = Config(steps=1, batch_size=4, losses=dict.fromkeys(FOLLOWING, 1.0))
    decode = decoder_of(pipeline)
    report = distill(student, pipeline.unet, examples(), SCHEDULER, config, history=history, decode=decode)
    for loss in FOLLOWING:
        assert report.curves[f"{loss}_loss"][0][1] < 1e-10
    assert set(report.details["attention"].values()) == {"same"}
    assert report.details["features"]["mid_block"] == "kept"
    assert report.details["features"]["up_blocks.1"] == "same"


def test_everything_else_stays_as_it_was():
    teacher, student = tiny_unet(), tiny_unet(seed=1)
    student.conv_in.requires_grad_(True)
    vae = tiny_vae()
    before, strides = state(teacher), [p.stride() for p in [*teacher.parameters(), *student.parameters()]]
    needs, decoder = [p.requires_grad for p in student.parameters()], state(vae)
    config = Config(steps=1, batch_size=4, losses=dict.fromkeys(FOLLOWING, 1.0))
    distill(student, teacher, examples(), SCHEDULER, config, decode=decoder_of(SimpleNamespace(vae=vae, unet=teacher)))
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(torch.equal(decoder[name], tensor) for name, tensor in vae.state_dict().items())
    assert not any(m._forward_hooks for m in vae.modules())
    assert [p.stride() for p in [*teacher.parameters(), *student.parameters()]] == strides
    assert [p.requires_grad for p in student.parameters()] == needs
    assert all(p.grad is None for p in student.parameters())
    assert not student.training and not teacher.training
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_student_ends_with_its_averaged_weights():
    sharp, smooth = tiny_unet(seed=1), tiny_unet(seed=1)
    start = state(sharp)
    for student, decay in ((sharp, 0.0), (smooth, 0.99)):
        distill(student, tiny_unet(), examples(), SCHEDULER, Config(steps=6, batch_size=4, ema_decay=decay))
    moved, average = (sum((m.state_dict()[n] - start[n]).abs().sum() for n in start) for m in (sharp, smooth))
    assert 0 < average < moved


def test_a_long_training_says_first_how_long_it_takes(monkeypatch, capsys):
    monkeypatch.setattr("compress.distill.forecast.LONG", 3)
    config = Config(steps=3, batch_size=4, gradient_accumulation=2)
    told, silent = tiny_unet(seed=1), tiny_unet(seed=1)
    distill(told, tiny_unet(), examples(), SCHEDULER, config)
    line = capsys.readouterr().err
    found = re.search(r"distilling: 3 steps of batch 4 at (\S+) s each, .*: about \d+ \w+; about (\S+) GB", line)
    assert found and 0 < float(found[1]) < 60 and 0.1 < float(found[2]) < 100, line
    monkeypatch.setattr("compress.distill.forecast.LONG", 4)
    distill(silent, tiny_unet(), examples(), SCHEDULER, config)
    assert "GB of memory" not in capsys.readouterr().err
    assert all(torch.equal(told.state_dict()[name], tensor) for name, tensor in silent.state_dict().items())


def test_the_expected_time_counts_the_optimizer_and_ends_with_the_budget(monkeypatch, capsys):
    def slow(*arguments):
        made = make(*arguments)
        step, made.step = made.step, lambda: time.sleep(1) or step()
        return made

    make = optimizers.make
    monkeypatch.setattr("compress.distill.forecast.LONG", 3)
    monkeypatch.setattr("compress.distill.forecast.optimizers", SimpleNamespace(make=slow))
    config = Config(steps=1000, batch_size=4, optimizer="muon", budget="1s")
    distill(tiny_unet(seed=1), tiny_unet(), examples(), SCHEDULER, config)
    found = re.search(r"1,000 steps of batch 4 at (\S+) s each, .*: about 10 s;", capsys.readouterr().err)
    assert found and 1 < float(found[1]) < 60


@pytest.mark.parametrize("loss", ["noise", *FOLLOWING])
def test_each_loss_alone_trains(loss):
    student = tiny_unet(widths=(16, 32), seed=1)
    before = state(student)
    config = Config(steps=2, batch_size=4, losses={loss: 1.0})
    decode = decoder_of(tiny_pipeline()) if loss == "perceptual" else None
    report = distill(student, tiny_unet(), examples(), SCHEDULER, config, decode=decode)
    assert not torch.equal(before["conv_in.weight"], student.state_dict()["conv_in.weight"])
    final = report.details["final"]
    assert final["loss"] == pytest.approx(final[f"{loss}_loss"])
    assert set(final) == {"loss", f"{loss}_loss", "learning_rate"}


def test_a_loss_of_ones_own_is_one_file(tmp_path, monkeypatch):
    text = "TEACHER = True\n\n\ndef loss(seen):\n    return (seen.output - seen.teacher).abs().flatten(1).mean(1)\n"
    (tmp_path / "my_losses").mkdir()
    (tmp_path / "my_losses" / "absolute.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    config = Config(steps=1, batch_size=4, losses={"my_losses.absolute": 0.5})
    final = distill(tiny_unet(seed=1), tiny_unet(), examples(), SCHEDULER, config).details["final"]
    assert final["loss"] == pytest.approx(0.5 * final["absolute_loss"])
    with pytest.raises(UserError, match=r"losses.my_losses.other=1.0: expected a module"):
        Config(losses={"my_losses.other": 1.0})
    with pytest.raises(UserError, match=r"losses.nois: no such loss \(did you mean noise\?\)"):
        Config(losses={"nois": 1.0})


def test_half_precision_weights_are_trained_in_full():
    teacher, student = tiny_unet().to(torch.bfloat16), tiny_unet(seed=1).to(torch.bfloat16)
    before = state(student)
    report = distill(student, teacher, examples(), SCHEDULER, Config(steps=2, batch_size=4))
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert math.isfinite(report.details["final"]["loss"])


def test_autocast_on_request():
    report = distill(
        tiny_unet(seed=1), tiny_unet(), examples(), SCHEDULER, Config(steps=1, batch_size=4, mixed_precision="bf16")
    )
    assert report.details["autocast"] == "bf16"


def test_divergence_names_the_step_and_the_remedy():
    with pytest.raises(UserError, match=r"diverged at step [234].*lower learning_rate, which is 1e\+18"):
        distill(
            tiny_unet(seed=1),
            tiny_unet(),
            examples(),
            SCHEDULER,
            Config(steps=5, batch_size=4, learning_rate=1e18, warmup=0),
        )


def test_order_and_noise_do_not_depend_on_the_parts():
    data = examples(5)
    batches = Batches(data, 8, 1000, prompt_dropout=0.5, seed=7)
    whole = batches(3, slice(None))
    parts = [batches(3, slice(first, first + 4)) for first in (0, 4)]
    for name in ("latents", "noise", "timesteps"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    text = [part.conditions.rows["encoder_hidden_states"] for part in (whole, *parts)]
    assert torch.equal(text[0], torch.cat(text[1:]))
    # Five steps of eight go eight times through the five examples.
    seen = torch.cat([batches(step, slice(None)).latents[:, 0, 0, 0] for step in range(5)])
    assert torch.unique(seen, return_counts=True)[1].tolist() == [8] * 5


def test_all_prompts_dropped_are_the_empty_one():
    data = examples()
    batch = Batches(data, 6, 1000, prompt_dropout=1.0, seed=0)(0, slice(None))
    rows = batch.conditions.rows["encoder_hidden_states"]
    assert torch.equal(rows, data.conditions.rows["encoder_hidden_states"][:1].expand(6, -1, -1))


def test_examples_are_what_the_pipeline_computes():
    pipeline, dataset = tiny_pipeline(), images(6, size=16)
    encoded = encode_examples(pipeline, dataset)
    assert encoded.latents.shape == (6, 4, 8, 8)
    text = encoded.conditions.rows["encoder_hidden_states"]
    assert text.shape == (4, 16, 16)  # the empty prompt and three captions
    assert encoded.captions.tolist() == [1, 1, 2, 2, 3, 3]
    with torch.no_grad():
        pixels = pipeline.image_processor.preprocess(dataset[4]["image"])
        latent = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        prompts, empty = pipeline.encode_prompt(dataset[4]["text"], "cpu", 1, True)
    torch.testing.assert_close(encoded.latents[4:5], latent, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text[3:4], prompts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text[:1], empty, atol=1e-5, rtol=1e-5)


def test_examples_can_be_capped():
    few = encode_examples(tiny_pipeline(), images(6), max_examples=3, seed=1)
    assert len(few.latents) == 3
    assert len(encode_examples(tiny_pipeline(), images(6), max_examples=9).latents) == 6


def test_smaller_images_and_large_ones_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, dataset = tiny_pipeline(), images(6)
    whole = encode_examples(pipeline, dataset)
    side = pipeline.vae_scale_factor * whole.latents.shape[-1]
    assert encode_examples(pipeline, dataset, side=10 * side).latents.equal(whole.latents)
    assert encode_examples(pipeline, dataset, side=side // 2).latents.shape[-1] == whole.latents.shape[-1] // 2

    counts: list[int] = []
    encode = pipeline.vae.encode
    monkeypatch.setattr(pipeline.vae, "encode", lambda pixels: (counts.append(len(pixels)), encode(pixels))[1])
    monkeypatch.setattr("compress.data.examples._PIXELS", 4 * side**2)
    torch.testing.assert_close(encode_examples(pipeline, dataset).latents, whole.latents)
    assert counts == [4, 2]


def test_unusable_data_is_refused():
    pipeline, dataset = tiny_pipeline(), images(2)
    with pytest.raises(UserError, match="training data is empty"):
        encode_examples(pipeline, dataset.select([]))
    with pytest.raises(UserError, match="row 1 of the training data has no caption"):
        encode_examples(pipeline, dataset.map(lambda row, i: {"text": None if i else "cat"}, with_indices=True))
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no image", "path": None}], "text": ["cat"]}, features=dataset.features
    )
    with pytest.raises(UserError, match="image of row 0"):
        encode_examples(pipeline, broken)
    with pytest.raises(UserError, match="SimpleNamespace has no unet"):
        encode_examples(SimpleNamespace(), dataset)


def test_what_does_not_fit_together_is_refused(tmp_path):
    teacher, student = tiny_unet(), tiny_unet(seed=1)
    config = Config(steps=1, batch_size=4)
    with pytest.raises(UserError, match="same module"):
        distill(teacher, teacher, examples(), SCHEDULER, config)
    with pytest.raises(UserError, match="student has cross_attention_dim=16, its teacher 8"):
        distill(student, tiny_unet(cross_attention_dim=8), examples(), SCHEDULER, config)
    with pytest.raises(UserError, match="the student is a Linear"):
        distill(torch.nn.Linear(1, 1), teacher, examples(), SCHEDULER, config)
    with pytest.raises(UserError, match="KarrasVeScheduler"):
        distill(student, teacher, examples(), KarrasVeScheduler(), config)
    with pytest.raises(UserError, match="empty"):
        examples(0)
    other = tiny_pipeline()
    other.scheduler = DDPMScheduler.from_config(other.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(UserError, match="prediction_type differs"):
        distilled(tmp_path, replace(CONFIG, steps=1), load_teacher=lambda: other)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("gradient_accumulation", 3),
        ("max_examples", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("schedule", "cosin"),
        ("warmup", 1.0),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("losses", {"noise": -1.0}),
        ("losses", {"features": math.inf}),
        ("min_snr_gamma", 0.0),
        ("prompt_dropout", 1.2),
        ("ema_decay", 1.0),
        ("mixed_precision", "fp8"),
        ("save_every", 0),
        ("log_every", 0),
    ],
)
def test_ranges_are_checked(key, value):
    with pytest.raises(UserError, match="expected"):
        Config(**{key: value})


def test_weights_must_not_all_be_zero():
    with pytest.raises(UserError, match="at least one loss"):
        Config(losses={"noise": 0.0, "output": 0.0})


def test_launch_of_a_single_process_is_noticed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.warns(RuntimeWarning, match="started a single process"):
        distill(tiny_unet(seed=1), tiny_unet(), examples(), SCHEDULER, Config(steps=1, batch_size=4))


def test_learning_rate_rises_and_falls():
    config = TrainingConfig(steps=100, batch_size=1, warmup=0.1, learning_rate=1.0)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[11:] == sorted(rates[11:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert replace(config, schedule="constant").rate(99) == 1.0
    assert replace(config, schedule="linear").rate(55) == pytest.approx(0.5)


def test_yaml_holds_the_defaults():
    file = Path(__file__).parents[2] / "conf" / "distill" / "features.yaml"
    keys = OmegaConf.to_container(OmegaConf.load(file))
    assert (keys.pop("kind"), keys.pop("method")) == ("distill", "features")
    keys["losses"] = {name: weight for name, weight in keys["losses"].items() if weight}
    assert keys == asdict(Config()) | {"betas": list(Config().betas)}


def test_buffers_keep_their_type_in_half_precision():
    student, teacher = tiny_unet(), tiny_unet()
    for model in (student, teacher):
        model.register_buffer("positions", torch.ones(3))
        model.to(torch.bfloat16)
    distill(student, teacher, examples(), SCHEDULER, Config(steps=1, batch_size=2))
    assert student.positions.dtype == student.conv_in.weight.dtype == torch.bfloat16
