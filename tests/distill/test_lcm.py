"""Consistency distillation: its formulas, what trains, what the checkpoint does by itself."""

import importlib
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LatentConsistencyModelPipeline, LCMScheduler
from safetensors.torch import load_file

import compress
from compress.distill import features, lcm
from compress.distill.consistency import ddim_step, loss
from compress.distill.few import boundary_scalings
from compress.errors import UserError
from compress.evaluate import EvaluateConfig
from compress.evaluate.sample import own_settings
from compress.models.outline import Outline, read_outline
from compress.models.sampling import Sampling, sampling_of
from compress.models.schedule import schedule_of
from tests.distill.test_features import SCHEDULER
from tests.distill.test_guidance import rows_seen
from tests.distill.worker import images
from tests.tiny import tiny_pipeline

KEYS = {"steps": 3, "batch_size": 4, "save_every": 2, "log_every": 1}


def distilled(student, folder=None, teacher=None, method="lcm", **keys):
    """A student trained for a few steps, and the report."""
    teacher = teacher or tiny_pipeline()
    return compress.distill(student, method, teacher=teacher, data=images(size=16), folder=folder, **KEYS | keys)


def test_scalings_are_those_of_the_scheduler_and_meet_the_boundary():
    skip, out = boundary_scalings(torch.tensor([0, 19, 999]))
    assert (skip[0], out[0]) == (1, 0)
    theirs = LCMScheduler().get_scalings_for_boundary_condition_discrete
    for i, time in enumerate((0, 19, 999)):
        torch.testing.assert_close((skip[i].item(), out[i].item()), tuple(map(float, theirs(time))))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_solver_is_ddim(kind):
    scheduler = DDIMScheduler.from_config(SCHEDULER.config, prediction_type=kind, set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    source = torch.Generator().manual_seed(0)
    noisy, output = (torch.randn(2, 4, 8, 8, generator=source) for _ in range(2))
    for time in (979, 19):
        theirs = scheduler.step(output, time, noisy).prev_sample
        times = torch.tensor([time, time])
        ours = ddim_step(schedule_of(scheduler), noisy, output, times, (times - 20).clamp(min=0))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_losses_on_numbers():
    found, wanted = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 4.0]]])
    assert loss(found, wanted, "l2", 1.0).item() == pytest.approx((9 + 16) / 2)
    assert loss(found, wanted, "huber", 4.0).item() == pytest.approx((5 - 4 + (32**0.5 - 4)) / 2)
    assert loss(found, found, "huber", 4.0).item() == 0


@pytest.mark.parametrize("decay", [0.95, 0.0])
def test_student_alone_trains_and_teacher_stays(decay):
    teacher, student = tiny_pipeline(), tiny_pipeline(seed=1, widths=(16, 32))
    before = {name: tensor.clone() for name, tensor in teacher.unet.state_dict().items()}
    trained, report = distilled(student, teacher=teacher, target_decay=decay, guidance=[2.0, 8.0])
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.unet.state_dict().items())
    start = student.unet.state_dict()
    assert all(not torch.equal(start[name], t) for name, t in trained.unet.state_dict().items() if name in start)
    assert trained.unet.time_embedding.cond_proj.weight.any()
    assert report.details["timesteps"] == [999, 759, 499, 259]
    assert not any(p.requires_grad for p in trained.unet.parameters())
    assert type(student).__name__ == "StableDiffusionPipeline"  # stayed as it was


def test_checkpoint_draws_in_its_steps_by_itself(tmp_path):
    trained, _ = distilled(tiny_pipeline(seed=1))
    folder = compress.save(trained, tmp_path / "lcm")
    stock = DiffusionPipeline.from_pretrained(folder)
    assert type(stock) is LatentConsistencyModelPipeline
    assert type(stock.scheduler) is LCMScheduler
    assert stock.scheduler.config.beta_schedule == "scaled_linear" and "variance_type" not in stock.scheduler.config
    assert rows_seen(stock) == [1, 1, 1, 1]
    own = Sampling("LCMScheduler", 4, (4.0, 4.0))
    loaded = compress.load(folder)
    assert sampling_of(loaded) == own
    settings = own_settings(EvaluateConfig(guidance=7.0), own)
    assert (settings.scheduler, settings.steps, settings.guidance) == ("checkpoint", 4, 4.0)
    two, _ = distilled(tiny_pipeline(seed=1), inference_steps=2)
    assert rows_seen(compress.load(compress.save(two, tmp_path / "two"))) == [1, 1]
    quantized, _ = compress.quantize(loaded, "w8a8", data=images(size=16))
    assert rows_seen(compress.load(compress.save(quantized, tmp_path / "int8"))) == [1, 1, 1, 1]


def test_guidance_of_a_stage_before_stays_without_the_input(tmp_path):
    ranged, _ = distilled(tiny_pipeline(), method="guidance", guidance=[2.0, 8.0], learning_rate=0.01)
    assert ranged.unet.time_embedding.cond_proj.weight.any()
    single, _ = distilled(ranged, steps=1)
    assert not single.unet.time_embedding.cond_proj.weight.any()


def test_stopped_training_continues_to_the_same_bits(tmp_path):
    def fail(metrics, step):
        if step == 3:
            raise RuntimeError("stop")

    whole, _ = distilled(tiny_pipeline(seed=1), steps=5)
    with pytest.raises(RuntimeError, match="stop"):
        distilled(tiny_pipeline(seed=1), tmp_path, steps=5, log=fail)
    parts, _ = distilled(tiny_pipeline(seed=1), tmp_path, steps=5)
    ours, theirs = whole.unet.state_dict(), parts.unet.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_state_before_a_divergence_is_that_after_the_step(tmp_path, monkeypatch):
    from compress.distill.consistency import Consistency

    with pytest.raises(UserError, match="diverged"):
        forward = Consistency.forward
        calls = []

        def broken(self, batch):
            calls.append(batch)
            return forward(self, batch) * (float("nan") if len(calls) == 3 else 1.0)

        with monkeypatch.context() as patched:
            patched.setattr(Consistency, "forward", broken)
            distilled(tiny_pipeline(seed=1), tmp_path / "broken", steps=5, target_decay=0.95)
    distilled(tiny_pipeline(seed=1), tmp_path / "whole", steps=2, schedule="constant", target_decay=0.95)
    ours, theirs = (load_file(tmp_path / name / "state-00000002.safetensors") for name in ("broken", "whole"))
    assert ours.keys() == theirs.keys() and any(name.startswith("weight.average") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_cannot_work_is_refused():
    for key, value in (("inference_steps", 51), ("guidance", (0.5, 4.0)), ("loss", "l1"), ("target_decay", 1.0)):
        with pytest.raises(UserError, match=f"{key}=.*expected"):
            replace(lcm.Config(), **{key: value})
    with pytest.raises(UserError, match="solver_steps=30: expected a divisor of the model's 1000 timesteps"):
        distilled(tiny_pipeline(), solver_steps=30)


def test_a_training_for_any_number_of_steps_does_not_follow(tmp_path):
    student, _ = distilled(tiny_pipeline(), steps=1)
    with pytest.raises(UserError, match="trained for 4 steps, which this would undo"):
        distilled(student, method="features")
    outline = read_outline(compress.save(student, tmp_path / "few"))
    for method in ("distill.features", "distill.lcm", "quantize.qat_int8", "quantize.qat"):
        module = importlib.import_module(f"compress.{method}")
        with pytest.raises(UserError, match="the model was trained for 4 steps, which training it further"):
            module.check_teacher(module.Config(), outline)
    for method, config in ((lcm, lcm.Config()), (features, features.Config(guidance=(4.0, 4.0)))):
        with pytest.raises(UserError, match="DDPMPipeline takes no prompt, so there is no guidance"):
            method.check_teacher(config, Outline("DDPMPipeline", {"unet": ("diffusers", "UNet2DModel")}, {}))
