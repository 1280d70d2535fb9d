"""Importances: planted twins, hand-made groups, gradients against finite differences, and bad input."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibrated import calibration_of, small_unet
from diffusers import UNet2DConditionModel
from omegaconf import OmegaConf
from tiny import tiny_pipeline, tiny_unet
from widen import widen

from compress.config.compose import compose
from compress.config.values import build
from compress.data import DataConfig, load_data
from compress.data.calibration import Calibration, CalibrationConfig, calibrate, differentiable
from compress.errors import UserError
from compress.models.inputs import example_inputs
from compress.prune import width
from compress.prune.channels.groups import Group, Member
from compress.prune.channels.rebuild import prune_unet
from compress.prune.importance import diff_pruning, families, make_scorer, needs_calibration, parse
from compress.prune.importance.score import score
from compress.prune.importance.taylor import products
from compress.prune.width import Config, prune_width


@pytest.mark.parametrize("name", ["l1", "l2", "activation", "taylor", "diff_pruning", "hessian"])
def test_twins_go(name: str) -> None:
    torch.manual_seed(3)
    wide, originals = widen(small_unet())
    importance = {"name": name, **({"timesteps": 3} if name == "diff_pruning" else {})}
    report = prune_width(wide, Config(0.5, importance=importance), calibration=calibration_of(wide))
    assert report.kept == originals
    assert not any(p.requires_grad and p.grad is not None for p in wide.parameters())


def test_random_is_drawn_by_its_seed_and_by_nothing_else() -> None:
    unet = tiny_unet()
    kept = [
        prune_width(unet, Config([0, 0.25], importance={"name": "random", "seed": seed}), seed=run).kept["mid_block"]
        for seed, run in ((None, 1), (1, 5), (2, 1))
    ]
    state = torch.get_rng_state()
    assert kept[0] == kept[1] != kept[2]
    assert torch.equal(state, torch.get_rng_state())
    for indices in kept:  # of 64 channels in 8 groups, three quarters of each
        assert torch.tensor(indices).div(8, rounding_mode="floor").bincount().tolist() == [6] * 8


def test_scores_of_a_group_by_hand() -> None:
    index = torch.arange(2)
    written = Member(("a", "out"), index, index)
    read = Member(("b", "in"), index, torch.tensor([1, 0]))
    values = {
        "a.weight": torch.tensor([[1.0, -3.0], [2.0, 2.0]]),
        "a.bias": torch.tensor([1.0, 1.0]),
        "b.weight": torch.tensor([[1.0, 2.0], [4.0, 8.0], [0.0, 0.0]]),
        "b.bias": torch.tensor([9.0, 9.0, 9.0]),
    }
    group = Group(2, [written, read])
    # Incoming: |1 - 3| + 1 and |2 + 2| + 1; outgoing: the second channel's column is read as the first's.
    assert score(group, values.get, "outgoing").tolist() == [10, 5]
    assert score(group, values.get, "product").tolist() == [30, 25]
    assert score(group, values.get, "sum").tolist() == [13, 10]
    names = (("x.to_q", [2.0, 3.0]), ("x.to_k", [5.0, 7.0]))
    pair = Group(2, [Member((name, "out"), index, index) for name, _ in names])
    weights = {f"{name}.weight": torch.tensor(value)[:, None] for name, value in names}
    assert score(pair, weights.get, "outgoing").tolist() == [10, 21]


def test_products_are_the_slope_of_the_loss() -> None:
    unet = tiny_unet(widths=(16, 32))
    calibration = calibration_of(unet, 4, 2)
    name = "down_blocks.0.resnets.0.conv1.weight"
    with differentiable(unet) as model:
        for part in calibration.parts():
            (calibration.losses(model, part).sum() / 4).backward()
        found = products(model)[name].sum()
    losses = []
    for scale in (0.99, 1.01):
        changed = tiny_unet(widths=(16, 32)).double()
        with torch.no_grad():
            changed.get_parameter(name).mul_(scale)
            losses.append(sum(calibration.losses(changed, part).double().sum() for part in calibration.parts()) / 4)
    assert float(losses[1] - losses[0]) / 0.02 == pytest.approx(float(found), rel=0.05)


def test_differentiable_leaves_the_denoiser_as_it_was() -> None:
    unet = tiny_unet(widths=(16, 32))
    processors = unet.attn_processors
    with differentiable(unet) as model:
        assert model is unet
        assert {type(p).__name__ for p in unet.attn_processors.values()} == {"AttnProcessor"}
        assert all(p.requires_grad for p in unet.parameters())
    assert unet.attn_processors == processors
    assert not any(p.requires_grad for p in unet.parameters())
    half = tiny_unet(widths=(16, 32)).to(torch.bfloat16)
    with differentiable(half) as model:
        assert model is not half
        assert model.dtype == torch.float32
    assert half.dtype == torch.bfloat16


def test_batches_do_not_change_scores() -> None:
    unet = tiny_unet(widths=(16, 32))
    for name in ("taylor", "hessian"):
        kept = []
        for size in (1, 4):
            scorer = make_scorer(parse(name), calibration_of(unet, 4, size), 0)
            kept.append(prune_unet(unet, [0, 0.5], scorer).kept)
        assert kept[0] == kept[1]


@pytest.mark.parametrize(("threshold", "least", "most"), [(0.0, 10, 10), (0.999, 1, 9)])
def test_diff_pruning_ends_where_the_loss_has_fallen(
    monkeypatch: pytest.MonkeyPatch, threshold: float, least: int, most: int
) -> None:
    unet = tiny_unet(widths=(16, 32))
    calibration = calibration_of(unet, 4, 2)
    seen: list[int] = []

    def falling(self: Calibration, model: torch.nn.Module, part: slice, times: torch.Tensor) -> torch.Tensor:
        seen.extend(times.tolist())
        scale = 1 / (1 + times.float())
        return scale * model.conv_in.weight.square().mean()

    monkeypatch.setattr(Calibration, "losses", falling)
    diff_pruning.scorer(diff_pruning.Config(threshold=threshold, timesteps=10), calibration, 0)
    assert seen[::2] == [100 * i for i in range(len(seen) // 2)]
    assert least <= len(seen) // 2 <= most


def test_examples_of_the_data(tiny_parquet: object) -> None:
    data = load_data(DataConfig(str(tiny_parquet), split_column="split"))
    pipeline = tiny_pipeline()
    found = calibrate(pipeline, data.train, CalibrationConfig(examples=8, batch_size=5), 1)
    assert found.source == "8 training images with captions"
    assert found.latents.shape == found.noise.shape == (8, 4, 8, 8)
    assert found.conditions.rows["encoder_hidden_states"].shape == (8, 16, 16)
    assert sorted(found.timesteps // 125) == list(range(8)), "not spread evenly"
    again = calibrate(pipeline, data.train, CalibrationConfig(examples=8, seed=1), 7)
    assert torch.equal(again.noise, found.noise)
    assert torch.equal(again.timesteps, found.timesteps)
    chosen = calibrate(pipeline, data.train, CalibrationConfig(examples=5, timesteps=[3, 500]), 1)
    assert chosen.timesteps.tolist() == [3, 500, 3, 500, 3]
    smaller = calibrate(pipeline, data.train, CalibrationConfig(examples=2, side=8), 1)
    assert smaller.latents.shape[-1] < 8 and smaller.predict(pipeline.unet, slice(0, 2)).isfinite().all()
    with pytest.raises(UserError, match=r"calibration\.timesteps=\[1000\]: expected timesteps of the model, 0 to 999"):
        calibrate(pipeline, data.train, CalibrationConfig(timesteps=[1000]), 1)


def test_examples_are_made_up_where_data_do_not_fit(tiny_parquet: object) -> None:
    data = load_data(DataConfig(str(tiny_parquet), split_column="split"))
    unet = UNet2DConditionModel.from_config({**tiny_unet(widths=(16, 32)).config, "in_channels": 9})
    found = calibrate(tiny_pipeline(unet=unet), data.train, CalibrationConfig(examples=3), 0)
    assert "3 random inputs" in found.source and "takes 9 channels and its autoencoder gives 4" in found.source
    assert found.losses(unet, slice(0, 3)).shape == (3,)
    assert example_inputs(unet)["sample"].shape == (1, 9, 8, 8)
    assert example_inputs(unet)["encoder_hidden_states"].shape == (1, 77, 16)


def test_a_scheduler_without_betas_is_refused() -> None:
    scheduler = SimpleNamespace(config={"prediction_type": "flow"})
    with pytest.raises(UserError, match="calibration needs the schedule of noise: SimpleNamespace with"):
        calibrate(SimpleNamespace(unet=tiny_unet(), scheduler=scheduler), None, CalibrationConfig(), 0)


def test_the_stage_says_what_it_looked_at(tiny_parquet: object) -> None:
    pipeline = tiny_pipeline()
    context = SimpleNamespace(seed=0, data=load_data(DataConfig(str(tiny_parquet), split_column="split")))
    config = Config([0, 0.25], importance="taylor", calibration=CalibrationConfig(examples=4))
    report = width.run(pipeline, config, context)
    assert pipeline.unet.config.block_out_channels == (32, 48)
    assert report.details["calibration"] == "4 training images with captions"
    assert report.details["config"]["importance"] == {"name": "taylor", "per": "weight", "combine": "outgoing"}


def test_nothing_is_computed_without_examples() -> None:
    with pytest.raises(UserError, match="importance=taylor: examples are needed"):
        prune_width(tiny_unet(), Config(importance="taylor"))


@pytest.mark.parametrize("name", sorted(families()))
def test_config_files_are_the_defaults(name: str) -> None:
    chosen = OmegaConf.to_container(compose(["recipe=prune", f"prune/importance={name}"]).stages.prune)
    assert parse(chosen["importance"]) == parse(name)
    assert needs_calibration(parse(name)) == (name in ("activation", "taylor", "diff_pruning", "hessian"))


@pytest.mark.parametrize("choice", ["magnitude", "random", "activation", "taylor", "diff_pruning", "hessian"])
def test_choices_differ_in_their_importance_alone(choice: str) -> None:
    stage = OmegaConf.to_container(compose(["recipe=prune", f"prune={choice}"]).stages.prune)
    assert (stage.pop("kind"), stage.pop("method")) == ("prune", "width")
    name = "l2" if choice == "magnitude" else choice
    assert build(Config, stage, "stages.prune") == Config(importance=name)


@pytest.mark.parametrize(
    ("importance", "text"),
    [
        ({"name": "taylor", "per": "row"}, "importance.per=row: expected weight or channel"),
        ({"name": "hessian", "combine": "max"}, "importance.combine=max: expected product, sum or outgoing"),
        ({"name": "diff_pruning", "threshold": 1}, "importance.threshold=1.0: expected a number in [0, 1)"),
        ({"name": "diff_pruning", "timesteps": 0}, "importance.timesteps=0: expected a whole number of at least 1"),
        ({"name": "random", "seed": -1}, "importance.seed=-1: expected a whole number from 0 to 2^32 - 1"),
        ("tailor", "importance=tailor: no such importance (did you mean taylor?)"),
    ],
)
def test_bad_importances(importance: object, text: str) -> None:
    with pytest.raises(UserError) as caught:
        Config(importance=importance)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"examples": 0}, "examples=0: expected a whole number of at least 1"),
        ({"side": 0}, "side=0: expected pixels, or null for the model's own size"),
        ({"timesteps": []}, "timesteps=[]: expected whole numbers"),
        ({"timesteps": [-1]}, "timesteps=[-1]: expected whole numbers"),
        ({"seed": 2**32}, "seed=4294967296: expected a whole number from 0 to 2^32 - 1"),
    ],
)
def test_bad_calibrations(values: dict[str, object], text: str) -> None:
    with pytest.raises(UserError) as caught:
        CalibrationConfig(**values)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("name", ["taylor", "diff_pruning"])
def test_a_large_denoiser_s_gradients_are_taken_example_by_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = small_unet()
    calibration = calibration_of(unet, 4, 4)
    settings = {"name": name, **({"timesteps": 3} if name == "diff_pruning" else {})}
    together = prune_unet(unet, [0, 0.5], make_scorer(parse(settings), calibration, 0))
    monkeypatch.setattr("compress.data.calibration.LARGE", 1000)
    rows: list[int] = []
    forward = type(unet).forward

    def counted(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(type(unet), "forward", counted)
    alone = prune_unet(unet, [0, 0.5], make_scorer(parse(settings), calibration, 0))
    assert set(rows) == {1}
    assert alone.kept == together.kept
    assert not unet.is_gradient_checkpointing


def test_examples_are_spread_over_the_timesteps() -> None:
    calibration = calibration_of(small_unet(), 6, 3)
    some = calibration.spread(3)
    ordered = calibration.timesteps.sort().values
    assert some.timesteps.tolist() == [int(ordered[0]), int(ordered[2]), int(ordered[5])]
    place = calibration.timesteps.tolist().index(int(ordered[5]))
    assert torch.equal(some.latents[2], calibration.latents[place])
    assert torch.equal(
        some.conditions.rows["encoder_hidden_states"][2], calibration.conditions.rows["encoder_hidden_states"][place]
    )
    assert calibration.spread(6) is calibration
