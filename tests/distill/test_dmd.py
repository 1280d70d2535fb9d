"""Distribution matching: its gradient, what trains, where nothing is to learn, resume."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import compress
from compress.distill import dmd, lcm
from compress.distill.batches import Batches
from compress.distill.matching import Matching, matching_loss
from compress.errors import UserError
from compress.models.sampling import Sampling, sampling_of
from compress.models.schedule import schedule_of
from tests.distill.test_features import SCHEDULER, examples
from tests.distill.test_guidance import rows_seen
from tests.distill.test_lcm import distilled
from tests.tiny import tiny_pipeline


def test_gradient_is_the_normalized_difference_of_the_predictions():
    source = torch.Generator().manual_seed(0)
    images, real, fake = (torch.randn(2, 4, 3, 3, generator=source) for _ in range(3))
    images.requires_grad_()
    matching_loss(images, real, fake).backward()
    distance = (images.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(images.grad, (fake - real) / distance / images.numel())
    assert matching_loss(images, real, real) == 0


@pytest.mark.parametrize("steps", [1, 4])
def test_student_and_the_denoiser_of_its_images_train(monkeypatch, steps):
    made = []
    start = Matching.__init__

    def remember(self, scene):
        start(self, scene)
        made.append((self, {name: tensor.clone() for name, tensor in self.fake.state_dict().items()}))

    monkeypatch.setattr(Matching, "__init__", remember)
    teacher, student = tiny_pipeline(), tiny_pipeline(seed=1, widths=(16, 32))
    before = {name: tensor.clone() for name, tensor in teacher.unet.state_dict().items()}
    keys = {"inference_steps": steps, "guidance": [1.0, 1.0], "steps": 2}
    trained, report = distilled(student, teacher=teacher, method="dmd", **keys)
    # The denoiser of the student's images begins as the teacher: without guidance both predict the same.
    assert report.curves["matching_loss"][0][1] < 1e-10 < report.curves["matching_loss"][1][1]
    assert report.curves["fake_loss"][0][1] > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.unet.state_dict().items())
    objective, fake = made[0]
    assert all(not torch.equal(fake[name], tensor) for name, tensor in objective.fake.state_dict().items())
    assert not torch.equal(student.unet.conv_in.weight, trained.unet.conv_in.weight)
    assert sampling_of(trained) == Sampling("LCMScheduler", steps, (1.0, 1.0))
    assert rows_seen(trained) == [1] * steps


def test_student_learns_where_its_own_steps_lead():
    data = examples()
    batch = Batches(data, 6, 3, 0.0, seed=0, more=3)(0, slice(None))
    assert set(batch.timesteps.tolist()) == {0, 1, 2}
    schedule = schedule_of(SCHEDULER)
    scene = SimpleNamespace(device=torch.device("cpu"), times=[999, 659, 319], schedule=schedule)
    scene.clean = lambda model, noisy, times, part: torch.full_like(noisy, float(times[0]))
    objective = SimpleNamespace(_scene=scene, student=None)
    latents, times = Matching._starts(objective, batch, batch.more[1][1:])
    for row, done in enumerate(batch.timesteps.tolist()):
        assert times[row] == scene.times[done]
        expected = batch.noise[row]
        if done:
            reached = torch.full((1, 4, 8, 8), float(scene.times[done - 1]))
            expected = schedule.add_noise(reached, batch.more[1][done, row][None], times[row : row + 1])[0]
        torch.testing.assert_close(latents[row], expected)


def test_stopped_training_continues_to_the_same_bits(tmp_path):
    def fail(metrics, step):
        if step == 3:
            raise RuntimeError("stop")

    keys = {"method": "dmd", "steps": 4, "inference_steps": 2}
    whole, _ = distilled(tiny_pipeline(seed=1), **keys)
    with pytest.raises(RuntimeError, match="stop"):
        distilled(tiny_pipeline(seed=1), tmp_path, log=fail, **keys)
    parts, _ = distilled(tiny_pipeline(seed=1), tmp_path, **keys)
    assert all(torch.equal(a, b) for a, b in zip(whole.unet.parameters(), parts.unet.parameters(), strict=True))
    assert compress.save(parts, tmp_path / "saved").is_dir()


def test_a_range_of_scales_is_refused():
    with pytest.raises(UserError, match="guidance=.*expected one scale alone"):
        dmd.Config(guidance=(2.0, 8.0))


@pytest.mark.parametrize("module", [dmd, lcm])
def test_yaml_holds_the_defaults(module):
    name = module.__name__.rpartition(".")[2]
    keys = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf" / "distill" / f"{name}.yaml"))
    assert (keys.pop("kind"), keys.pop("method")) == ("distill", name)
    config = asdict(module.Config())
    assert keys.pop("validation").items() <= config.pop("validation").items()  # sampled as the student is
    assert keys == config | {key: list(value) for key, value in config.items() if isinstance(value, tuple)}
