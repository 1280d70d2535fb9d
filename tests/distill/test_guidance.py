"""Guidance in one pass: the formula, what trains, what stock pipelines then do by themselves."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline
from pipelines import PIPELINES

import compress
from compress.distill.batches import Batches
from compress.distill.features import Config, distill
from compress.distill.guidance import add_scale_input, scale_embedding
from compress.distill.objective import Teacher
from compress.errors import UserError
from compress.evaluate import EvaluateConfig
from compress.evaluate.sample import own_settings
from compress.models import denoiser
from compress.models.inputs import known_inputs, predict, watch
from compress.models.sampling import Sampling, sampling_of, set_sampling
from tests.distill.test_features import SCHEDULER, examples, state
from tests.distill.worker import CONFIG, distilled, images
from tests.tiny import tiny_pipeline, tiny_unet

SHORT = {"steps": 2, "batch_size": 4, "losses": {"output": 1.0, "features": 0.1}}


def rows_seen(pipeline, **keys) -> list[int]:
    """Rows of each pass of the denoiser while an image of one prompt is drawn."""
    seen = []
    pipeline.set_progress_bar_config(disable=True)
    with watch(denoiser(pipeline), lambda inputs: seen.append(len(next(iter(inputs.values()))))):
        pipeline("a cat", **{"output_type": "latent", **keys})
    return seen


def test_teacher_gives_the_guided_prediction_and_the_features_for_the_prompt():
    unet, data = tiny_unet(), examples()
    batch = Batches(data, 6, 1000, 0.0, seed=1, guidance=(2.0, 7.0))(0, slice(None))
    assert 2 <= batch.scales.min() < batch.scales.max() <= 7
    taps = {}
    handle = unet.mid_block.register_forward_hook(lambda module, inputs, output: taps.update(mid_block=output))
    empty = data.conditions.rows_of(slice(1))
    teacher = Teacher(unet, taps, {"mid_block": "mid_block"}, lambda: None, empty)
    teacher._autocast = torch.no_grad
    guided, added, features = teacher(batch.latents, batch.timesteps, batch)
    text = batch.conditions.rows["encoder_hidden_states"]
    with torch.no_grad():
        blank = empty.rows["encoder_hidden_states"].expand_as(text)
        without = unet(batch.latents, batch.timesteps, blank).sample
        prompted = unet(batch.latents, batch.timesteps, text).sample
    handle.remove()
    scales = batch.scales.view(-1, 1, 1, 1)
    torch.testing.assert_close(guided, without + scales * (prompted - without), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(added, guided - prompted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(features["mid_block"], taps["mid_block"], atol=1e-5, rtol=1e-5)


def test_batches_without_guidance_stay_as_they_were():
    plain, guided = (Batches(examples(), 4, 1000, 0.1, seed=1, guidance=g)(3, slice(None)) for g in (None, (1.0, 8.0)))
    assert plain.scales is None
    assert all(torch.equal(getattr(plain, n), getattr(guided, n)) for n in ("latents", "noise", "timesteps"))


def test_new_input_changes_nothing_and_is_what_pipelines_pass():
    unet = tiny_unet()
    inputs = known_inputs(unet, 2, seed=0)
    before = predict(unet, inputs)
    add_scale_input(unet, (2.0, 8.0))
    assert unet.config.time_cond_proj_dim == 256
    scales = torch.tensor([1.0, 7.5])
    embedding = scale_embedding(scales, 256)
    assert torch.equal(predict(unet, {**inputs, "timestep_cond": embedding}), before)
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales - 1, 256)
    assert torch.equal(embedding, theirs)


def test_one_scale_of_many_becomes_a_bias():
    unet = tiny_unet()
    add_scale_input(unet, (2.0, 8.0))
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
    inputs = known_inputs(unet, 2, seed=0) | {"timestep_cond": scale_embedding(torch.tensor([5.0, 5.0]), 256)}
    before = predict(unet, inputs)
    add_scale_input(unet, (5.0, 5.0))
    assert not unet.time_embedding.cond_proj.weight.any()
    other = scale_embedding(torch.tensor([2.0, 7.0]), 256)
    torch.testing.assert_close(predict(unet, inputs | {"timestep_cond": other}), before, atol=1e-4, rtol=1e-4)


def test_student_like_its_teacher_has_nothing_to_learn_at_scale_one():
    config = Config(**SHORT | {"steps": 1}, guidance=(1.0, 1.0))
    final = distill(tiny_unet(), tiny_unet(), examples(), SCHEDULER, config).details["final"]
    assert final["output_loss"] < 1e-12
    assert final["features_loss"] < 1e-10


@pytest.mark.parametrize("guidance", [(4.0, 4.0), (1.0, 8.0)])
def test_what_trains(guidance):
    student, teacher = tiny_unet(), tiny_unet()
    before, theirs = state(student), state(teacher)
    report = distill(student, teacher, examples(), SCHEDULER, Config(**SHORT, guidance=guidance))
    after = student.state_dict()
    assert report.details["guidance"] == list(guidance)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert bool(after["time_embedding.cond_proj.weight"].any()) == (guidance[0] < guidance[1])
    assert all(torch.equal(theirs[name], tensor) for name, tensor in teacher.state_dict().items())


def test_student_follows_the_guided_teacher():
    teacher, data = tiny_unet(), examples()
    data.conditions.rows["encoder_hidden_states"].mul_(5)  # a random teacher hardly listens to its prompt
    held = Batches(data, 16, 1000, 0.0, seed=1, guidance=(8.0, 8.0))(10**6, slice(None))
    ask = Teacher(teacher, {}, {}, torch.no_grad, data.conditions.rows_of(slice(1)))
    wanted = ask(held.latents, held.timesteps, held)[0]
    far = []
    for guidance in (None, (8.0, 8.0)):
        student = tiny_unet()  # follows the teacher for the prompt already
        config = Config(
            steps=30, batch_size=8, learning_rate=3e-3, losses={"output": 1.0}, ema_decay=0.5, guidance=guidance,
            min_snr_gamma=None,
        )  # fmt: skip
        distill(student, teacher, data, SCHEDULER, config)
        with torch.no_grad():
            output = student(held.latents, held.timesteps, held.conditions.rows["encoder_hidden_states"]).sample
        far.append((output - wanted).pow(2).mean().item())
    assert far[1] < 0.7 * far[0]


def test_checkpoint_draws_in_one_pass_by_itself(tmp_path):
    teacher, data = tiny_pipeline(), images(size=16)
    pruned, _ = compress.prune(tiny_pipeline(), "low_rank", energy=0.9)
    for name, scale in (("one", [4.0, 4.0]), ("range", [2.0, 5.0])):
        start = pruned if name == "one" else tiny_pipeline(seed=1)
        keys = {"steps": 2, "batch_size": 4, "learning_rate": 0.01, "guidance": scale}
        student, _ = compress.distill(start, "guidance", teacher=teacher, data=data, **keys)
        folder = compress.save(student, tmp_path / name)
        stock = DiffusionPipeline.from_pretrained(folder)
        assert type(stock).__name__ == "StableDiffusionPipeline" and not hasattr(type(stock), "_stock")
        assert rows_seen(stock, num_inference_steps=3) == [1, 1, 1]
        drawn = [
            stock("a cat", num_inference_steps=2, guidance_scale=g, output_type="np",
                  generator=torch.Generator().manual_seed(0)).images
            for g in (4.0, 7.5)
        ]  # fmt: skip
        assert (abs(drawn[0] - drawn[1]).max() == 0) == (name == "one")
        loaded = compress.load(folder)
        assert sampling_of(loaded) == Sampling(guidance=tuple(scale))
        assert type(loaded).__name__ == "StableDiffusionPipeline"
        quantized, _ = compress.quantize(loaded, "int8")
        assert sampling_of(quantized).guidance == tuple(scale)
        again = compress.load(compress.save(quantized, tmp_path / "int8"))
        assert rows_seen(again, num_inference_steps=1) == [1]


def test_checkpoint_is_drawn_in_its_steps_and_trains_on(tmp_path):
    teacher, data = tiny_pipeline(), images(size=16)
    keys = {"teacher": teacher, "data": data, "steps": 1, "batch_size": 2, "losses": {"output": 1.0}}
    student, _ = compress.distill(teacher, "guidance", inference_steps=3, **keys)
    student, _ = compress.distill(student, "features", **keys)
    loaded = compress.load(compress.save(student, tmp_path / "s"))
    assert sampling_of(loaded) == Sampling(steps=3, guidance=(4.0, 4.0))
    assert type(loaded.scheduler).__name__ == "DPMSolverMultistepScheduler"
    loaded("a cat", output_type="np")
    assert len(loaded.scheduler.timesteps) == 3
    with pytest.raises(UserError, match="inference_steps=0: expected an integer of at least 1"):
        compress.distill(teacher, "guidance", inference_steps=0, **keys)


def test_transformer_learns_one_scale_and_is_called_without_guidance(tmp_path):
    teacher, student = PIPELINES["pixart"](), PIPELINES["pixart"]()
    keys = {"steps": 1, "batch_size": 2, "teacher": teacher, "data": images(2, size=256)}
    with pytest.raises(UserError, match=r"expected one scale, as \[5, 5\]: a PixArtTransformer2DModel takes no"):
        compress.distill(student, "guidance", guidance=[2.0, 5.0], **keys)
    trained, _ = compress.distill(student, "guidance", guidance=[4.0, 4.0], **keys)
    loaded = compress.load(compress.save(trained, tmp_path / "pixart"))
    assert sampling_of(loaded) == Sampling(guidance=(4.0, 4.0), unguided=True)
    asked = {"num_inference_steps": 2, "use_resolution_binning": False, "clean_caption": False}
    assert rows_seen(loaded, **asked) == [1, 1]
    assert own_settings(EvaluateConfig(guidance=7.0), sampling_of(loaded)).guidance == 1.0


def test_flow_matching_is_drawn_in_its_steps_by_its_own_scheduler(tmp_path):
    keys = {"steps": 1, "batch_size": 2, "teacher": PIPELINES["sd3"](), "data": images(2, size=16)}
    trained, _ = compress.distill(PIPELINES["sd3"](), "guidance", inference_steps=2, **keys)
    loaded = compress.load(compress.save(trained, tmp_path / "sd3"))
    assert sampling_of(loaded) == Sampling(steps=2, guidance=(4.0, 4.0), unguided=True)
    assert type(loaded.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert rows_seen(loaded) == [1, 1]


def test_what_has_no_guidance_or_has_it_already_is_refused():
    config = Config(**SHORT, guidance=(2.0, 4.0))
    taught = tiny_unet()
    add_scale_input(taught, (2.0, 8.0))
    with pytest.raises(UserError, match="guided output already"):
        distill(tiny_unet(), taught, examples(), SCHEDULER, config)
    for wrong in ((0.5, 4.0), (4.0, 2.0)):
        with pytest.raises(UserError, match=r"guidance=.* expected the lowest and the highest scale"):
            replace(config, guidance=wrong)
    pipeline = tiny_pipeline()
    set_sampling(pipeline, Sampling("LCMScheduler", steps=4))
    with pytest.raises(UserError, match="trained for 4 steps"):
        compress.distill(pipeline, "features", teacher=tiny_pipeline(), data=images(), steps=1)


def test_stopped_training_continues_to_the_same_bits(tmp_path):
    config = replace(CONFIG, guidance=(2.0, 8.0))
    whole, _ = distilled(tmp_path / "whole", config)

    def fail(metrics, step):
        if step == 8:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        distilled(tmp_path / "parts", config, log=fail)
    parts, _ = distilled(tmp_path / "parts", config)
    assert all(torch.equal(a, b) for a, b in zip(whole.unet.parameters(), parts.unet.parameters(), strict=True))
    assert sampling_of(parts) == Sampling(guidance=(2.0, 8.0))


def test_defaults_of_a_call_can_be_overridden():
    pipeline = tiny_pipeline()
    set_sampling(pipeline, Sampling(steps=3, guidance=(2.0, 5.0)))
    assert rows_seen(pipeline) == [2, 2, 2]
    assert rows_seen(pipeline, num_inference_steps=1, guidance_scale=1.0) == [1]
    set_sampling(pipeline, Sampling(steps=2, guidance=(4.0, 4.0), unguided=True))
    assert rows_seen(pipeline) == [1, 1]
    settings = own_settings(EvaluateConfig(few_steps=8), sampling_of(pipeline))
    assert (settings.steps, settings.guidance) == (8, 1.0)
    assert "latent_psnr" in settings.leave_out
