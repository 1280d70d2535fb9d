"""The grid of rows, their names, and the messages for what cannot be."""

import pytest

from compress.config.compose import compose
from compress.errors import UserError
from compress.jobs.benchmark import BenchmarkConfig, Choices, Limits, rows
from compress.jobs.benchmark.config import label
from compress.jobs.benchmark.job import to_job


def test_one_choice_is_changed_at_a_time_and_no_row_comes_twice():
    config = BenchmarkConfig(
        reference=Choices(steps=30),
        change={"dtype": ["fp32", "bf16"], "batch_size": [2]},
        schedulers={"pndm": [30, 10], "dpmsolver++_karras": [20]},
        combine=[{"dtype": "bf16", "compile": True}, {"dtype": "bf16"}],
    )
    assert list(rows(config)) == [
        "reference", "bf16", "batch 2", "PNDM 10", "DPM++ 2M Karras 20", "bf16, compiled",
    ]  # fmt: skip
    assert rows(config)["DPM++ 2M Karras 20"] == Choices(scheduler="dpmsolver++_karras", steps=20)


def test_a_name_says_everything_that_a_row_changes():
    changed = Choices(
        dtype="fp16", scheduler="euler_a", steps=20, batch_size=4, channels_last=True, attention="plain",
        vae_slicing=True, vae_tiling=True, offload="model", compile=True, reuse_prompt=True,
    )  # fmt: skip
    assert label(changed, Choices()) == (
        "Euler a 20, fp16, batch 4, channels-last, plain attention, VAE slicing, VAE tiling, model offload, compiled, "
        "prompt reused"
    )
    assert label(Choices(), Choices(compile=True)) == "not compiled"
    assert label(Choices(attention_slicing=True), Choices()) == "attention slicing"


@pytest.mark.parametrize("name", ["quick", "full"])
def test_the_grids_that_come_along_hold_every_choice(name):
    job = to_job(compose(["recipe=benchmark", f"benchmark={name}", "precision=bf16"]))
    grid = rows(job.benchmark)
    assert grid["reference"] == Choices(dtype="bf16")
    wanted = {
        "dtype": {"fp16"}, "channels_last": {True}, "attention": {"plain"}, "attention_slicing": {True},
        "vae_slicing": {True}, "vae_tiling": {True}, "offload": {"model"}, "compile": {True}, "reuse_prompt": {True},
        "batch_size": {4, 8}, "scheduler": {"euler_a", "dpmsolver++_karras", "ddim", "unipc", "lcm"}, "steps": {20, 30},
    }  # fmt: skip
    for key, values in wanted.items():
        assert values <= {getattr(choices, key) for choices in grid.values()}, key


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["benchmark.imagse=4"], "benchmark.imagse: no such key (did you mean images?)"),
        (["benchmark.images=2"], "benchmark.images=2: expected a whole number of at least 4"),
        (["benchmark.repeats=1"], "benchmark.repeats=1"),
        (["benchmark.guidance=-1"], "benchmark.guidance=-1"),
        (["benchmark.height=2"], "benchmark.height=2"),
        (["benchmark.slowest=0.5"], "benchmark.slowest=0.5"),
        (["benchmark.reference.dtype=int8"], "benchmark.reference.dtype=int8: expected one of fp32, bf16, fp16"),
        (["benchmark.reference.steps=0"], "benchmark.reference.steps=0"),
        (["benchmark.reference.batch_size=0"], "benchmark.reference.batch_size=0"),
        (["benchmark.reference.attention=''"], "benchmark.reference.attention=''"),
        (["+benchmark.change.dtyp=[bf16]"], "benchmark.change.dtyp: no such choice (did you mean dtype?)"),
        (["benchmark.change.compile=[perhaps]"], "benchmark.change.compile: compile=perhaps: expected true or false"),
        (["benchmark.change.offload=[disk]"], "benchmark.change.offload: offload=disk: expected one of none"),
        (["+benchmark.schedulers.heun=[20]"], "benchmark.schedulers.heun: scheduler=heun: expected one of checkpoint"),
        (["benchmark.change.dtype=bf16"], "benchmark.change.dtype=bf16: expected a list, such as [bf16]"),
        (
            ["benchmark.schedulers.ddim=50"],
            "benchmark.schedulers.ddim=50: expected a list of whole numbers, such as [50]",
        ),
        (["benchmark.schedulers.ddim=[x]"], "benchmark.schedulers.ddim=['x']: expected a list of whole numbers"),
        (["benchmark.schedulers=50"], "benchmark.schedulers=50: expected keys and values"),
        (["benchmark.combine=[{speed: 1}]"], "benchmark.combine.0: no such choice"),
        (["benchmark.combine=[{attention: plain, attention_slicing: true}]"], "replace attention=plain"),
        (["limit.memory_gb=0"], "limit.memory_gb=0.0: expected a number above 0"),
        (["limit.psnr_db=high"], "limit.psnr_db=high: expected a number"),
        (["+limits.psnr_db=30"], "limits: no such key (did you mean limit?)"),
        (["device=tpu"], "device=tpu"),
    ],
)
def test_a_mistake_is_named_with_its_key(overrides, part):
    with pytest.raises(UserError) as error:
        to_job(compose(["recipe=benchmark", *overrides]))
    assert part in str(error.value)
    assert str(error.value).count("such as") == part.count("such as")


def test_all_rows_of_a_kind_can_be_left_out():
    job = to_job(compose(["recipe=benchmark", "~benchmark.change", "~benchmark.schedulers", "benchmark.combine=[]"]))
    assert list(rows(job.benchmark)) == ["reference"]


def test_limits_are_numbers_or_nothing():
    assert Limits(memory_gb=4, psnr_db=None).memory_gb == 4
    with pytest.raises(UserError, match="latency_s=nan"):
        Limits(latency_s=float("nan"))
