"""The trainer on a small regression: schedules, optimizers, budgets, early ends, states."""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import SchedulerType, get_scheduler
from torch import Tensor, nn

from compress.distill import trainer as trainer_module
from compress.distill.trainer import Trainer
from compress.distill.training import SCHEDULES, TrainingConfig, Validation
from compress.errors import UserError
from compress.system.random import generator

CONFIG = TrainingConfig(steps=12, batch_size=4, learning_rate=0.01, log_every=2, save_every=4, ema_decay=0.9)


class Regression(nn.Module):
    """Fits a line through noise; from ``nan_at`` on its loss is not a number."""

    outputs = 1

    def __init__(self, nan_at: int = -1) -> None:
        super().__init__()
        self.layer = nn.Linear(3, self.outputs)
        nn.init.constant_(self.layer.weight, 0.5)
        nn.init.zeros_(self.layer.bias)
        self.nan_at = nan_at

    def forward(self, batch: tuple[int, Tensor]) -> Tensor:
        """The loss as ``(1,)``."""
        step, rows = batch
        error = (self.layer(rows) - rows.sum(1, keepdim=True)).pow(2).mean()
        return (error * math.nan if step == self.nan_at else error).reshape(1)


def train(config: TrainingConfig = CONFIG, folder: Path | None = None, nan_at: int = -1, **options):
    """Trains a regression; gives it with the record."""

    def batches(step: int, part: slice) -> tuple[int, Tensor]:
        return step, torch.randn(4, 3, generator=generator(0, "batch", step))[part]

    objective = Regression(nan_at)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    record = Trainer(objective, batches, config, ["loss"], accelerator, folder=folder, **options).train()
    return objective.layer.weight.detach().clone(), record


def test_every_schedule_of_diffusers_is_known():
    assert set(SCHEDULES) == {kind.value for kind in SchedulerType}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {"power": 2.0}),
        ("constant_with_warmup", {}),
        ("piecewise_constant", {"step_rules": "1:20,0.1:60,0.01"}),
    ],
)
def test_schedules_are_those_of_diffusers(name, options):
    config = TrainingConfig(steps=100, warmup=0.0, learning_rate=0.5, schedule=name, schedule_options=options)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=100, **options)
    for step in range(100):
        assert config.rate(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_schedule_follows_the_budget_where_that_ends_first():
    config = TrainingConfig(steps=1000, batch_size=1, warmup=0.0, learning_rate=1.0, schedule="linear", budget="10m")
    assert config.rate(100, used=30) == pytest.approx(0.9)
    assert config.rate(100, used=300) == pytest.approx(0.5)
    assert config.rate(100, used=700) == 0
    assert replace(config, warmup=0.1).rate(0, used=30) == pytest.approx(0.51)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": "ten minutes"}, "budget=ten minutes: expected a time such as"),
        ({"budget": "0m"}, "budget=0m"),
        ({"schedule": "cosin"}, "schedule=cosin: expected one of cosine, linear"),
        ({"schedule": "piecewise_constant"}, "schedule_options.step_rules"),
        (
            {"schedule_options": {"num_cycles": 2}},
            "schedule_options.num_cycles: no option of schedule=cosine; it has none",
        ),
        ({"schedule": "polynomial", "schedule_options": {"num_cycles": 2}}, "its only one is power"),
        ({"schedule": "polynomial", "schedule_options": {"power": -1}}, "schedule_options.power=-1: expected 0"),
        (
            {"schedule": "piecewise_constant", "schedule_options": {"step_rules": "1:100,-0.1"}},
            "schedule_options.step_rules=1:100,-0.1: expected factors",
        ),
        ({"schedule": "polynomial", "learning_rate": 1e-7}, "schedule=polynomial: impossible with power=None and "),
        (
            {"schedule": "cosine_with_restarts", "schedule_options": {"num_cycles": "x"}},
            "schedule=cosine_with_restarts: impossible with num_cycles=x",
        ),
        (
            {"schedule": "piecewise_constant", "schedule_options": {"step_rules": "1:100,0.1:200,0..1"}},
            "schedule=piecewise_constant: impossible with step_rules=1:100,0.1:200,0..1",
        ),
        ({"optimizer": "adam"}, "optimizer=adam: expected one of adamw"),
        ({"teacher_engine": "tensorrt"}, "teacher_engine=tensorrt: expected one of eager, openvino, auto"),
        ({"plateau": 5}, "plateau=5: expected 0, or at least twice log_every"),
        ({"keep_states": 0}, "keep_states=0"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        TrainingConfig(**values)


def test_bad_validation_is_refused():
    with pytest.raises(UserError, match="every=0"):
        Validation(every=0)
    with pytest.raises(UserError, match="steps=0"):
        Validation(steps=0)


def test_fused_optimizer_is_the_same_up_to_rounding(tmp_path):
    plain, _ = train()
    fused, _ = train(replace(CONFIG, optimizer="adamw_fused"))
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    with pytest.raises(KeyboardInterrupt):
        train(replace(CONFIG, optimizer="adamw_fused"), tmp_path, log=_stop_at(6))
    assert torch.equal(train(replace(CONFIG, optimizer="adamw_fused"), tmp_path)[0], fused)


def test_newest_states_are_kept(tmp_path):
    train(replace(CONFIG, save_every=2, keep_states=3), tmp_path)
    kept = sorted(int(file.stem.removeprefix("state-")) for file in tmp_path.iterdir())
    assert kept == [8, 10, 12]


def test_state_before_a_nan_is_kept_and_continued_from(tmp_path):
    undisturbed, _ = train()
    with pytest.raises(UserError, match="diverged at step 8: loss nan") as found:
        train(folder=tmp_path / "first", nan_at=7)
    file = tmp_path / "first" / "state-00000007.safetensors"
    assert f"from_state={file}" in str(found.value)
    continued, record = train(replace(CONFIG, from_state=str(file)), tmp_path / "second")
    assert torch.equal(continued, undisturbed)
    assert [point[0] for point in record.curves["loss"]] == [2, 4, 6, 8, 10, 12]
    with pytest.raises(UserError, match="from_state=.*expected a whole training state"):
        train(replace(CONFIG, from_state=str(tmp_path / "none.safetensors")))
    with pytest.raises(UserError, match="optimizer=muon: expected adamw, which .*state-00000007.* was trained with"):
        train(replace(CONFIG, from_state=str(file), optimizer="muon"))
    with pytest.raises(
        UserError, match="from_state=.*expected a state after fewer steps than steps, which is 7, not 7"
    ):
        train(replace(CONFIG, from_state=str(file), steps=7))
    train(replace(CONFIG, from_state=str(file), optimizer="adamw_fused"))


def test_a_state_of_another_model_is_named(tmp_path, monkeypatch):
    train(folder=tmp_path)
    file = tmp_path / "state-00000008.safetensors"
    monkeypatch.setattr(Regression, "outputs", 2)
    with pytest.raises(UserError, match="from_state=.*expected a state of this student and method"):
        train(replace(CONFIG, from_state=str(file)))


def test_nan_at_the_first_step_says_what_to_change():
    with pytest.raises(UserError, match="diverged at step 1: .* lower learning_rate, which is 0.01$"):
        train(nan_at=0)


@pytest.fixture
def seconds(monkeypatch):
    """A clock that goes on by a second whenever it is read."""
    clock = SimpleNamespace(now=0.0)

    def read() -> float:
        clock.now += 1
        return clock.now

    monkeypatch.setattr(trainer_module.time, "perf_counter", read)
    return clock


def test_budget_ends_the_training(tmp_path, seconds):
    config = replace(CONFIG, steps=1000, budget="10s", schedule="linear", warmup=0.0)
    _, record = train(config, tmp_path)
    assert (record.step, record.seconds) == (10, 10.0)
    assert record.ended == "the budget of 10s is used up"
    rates = [rate for _, rate in record.curves["learning_rate"]]
    assert rates == pytest.approx([0.008, 0.006, 0.004, 0.002, 0.0])
    assert train(config, tmp_path)[1] == record  # what a second run finds


def test_used_seconds_are_kept(tmp_path, seconds):
    config = replace(CONFIG, steps=1000, budget="10s", save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, log=_stop_at(4))
    seconds.now += 1000  # between the two runs
    assert train(config, tmp_path)[1].step == 10


def test_plateau_ends_the_training():
    _, record = train(replace(CONFIG, steps=400, learning_rate=1e-9, plateau=4))  # learns nothing
    assert record.step < 400
    assert record.step % 2 == 0
    assert record.ended == "the mean loss of 4 steps is not below that of the 4 before"
    losses = [value for _, value in record.curves["loss"]]
    assert sum(losses[-2:]) >= sum(losses[-4:-2])


def test_validation_sees_averaged_weights(tmp_path):
    seen = []
    config = replace(CONFIG, validation=Validation(prompts=["a"], every=5))
    plain, _ = train()
    final, _ = train(config, validate=seen.append)
    assert seen == [5, 10, 12]
    assert torch.equal(plain, final)


def _stop_at(step: int):
    """A log that presses Ctrl-C."""

    def log(metrics: dict[str, float], at: int) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGINT)

    return log
