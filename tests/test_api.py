"""The public API: what a recipe does, from Python."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from diffusers import DiffusionPipeline

import compress
from compress.errors import UserError
from tests.distill.worker import images
from tests.tiny import tiny_pipeline

ROOT = Path(compress.__file__).parents[1]
COST = {"latency_repeats": 1}


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}


def test_a_folder_continues_the_same_training_alone(tmp_path: Path) -> None:
    teacher, student = tiny_pipeline(widths=(16, 32)), tiny_pipeline(1, widths=(16, 32))

    def train(steps: int = 1, **keys: Any) -> int:
        given: dict[str, Any] = {"teacher": teacher, "data": images(2, size=16), "batch_size": 2, "folder": tmp_path}
        return compress.distill(**{"pipeline": student, "steps": steps} | given | keys)[1].details["steps"]

    assert (train(), train(), train(steps=2)) == (1, 1, 2)
    for keys in ({"learning_rate": 1e-5}, {"seed": 1}, {"pipeline": teacher}, {"method": "guidance"}):
        with pytest.raises(UserError, match="folder=.*: holds the training of another student, teacher, data or other"):
            train(**keys)


def test_a_state_that_is_gone_is_not_recommended() -> None:
    with pytest.raises(UserError, match=r"from_state=.*, which was temporary and is gone: give folder= to keep it"):
        compress.distill(
            tiny_pipeline(1), teacher=tiny_pipeline(), data=images(2, size=16), steps=9, batch_size=2, learning_rate=1e6
        )


def test_data_without_captions_is_refused() -> None:
    with pytest.raises(UserError, match="data has the columns image: expected image and text, or text"):
        compress.distill(tiny_pipeline(), teacher=tiny_pipeline(), data=images(1).remove_columns("text"), steps=1)
    with pytest.raises(UserError, match=r"data is a list: expected a path, a hub id, or a datasets\.Dataset with the"):
        compress.distill(tiny_pipeline(), teacher=tiny_pipeline(), data=["a cat"], steps=1)  # type: ignore[arg-type]
    renamed = images(1).rename_column("image", "photo")  # no prompts without pictures
    with pytest.raises(UserError, match="data has the columns photo, text: expected image and text, or text"):
        compress.distill(tiny_pipeline(), teacher=tiny_pipeline(), data=renamed, steps=1)


def test_data_of_another_format_gives_the_same_weights() -> None:
    given = images(2, size=16)
    undecoded = given.cast_column("image", datasets.Image(decode=False))
    trained = [
        weights(compress.distill(tiny_pipeline(1), teacher=tiny_pipeline(), data=data, steps=1, batch_size=2)[0])
        for data in (given, given.with_format("torch"), undecoded)
    ]
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0], rtol=0, atol=0)


def test_a_recipe_in_ten_lines(tiny_model: Path, tiny_parquet: Path, tmp_path: Path) -> None:
    teacher = compress.load(tiny_model)
    before = weights(teacher)
    pruned, report = compress.prune(teacher, "magnitude", ratio=0.25)
    assert repr(report).startswith("StageReport(") and "\n" not in repr(report)
    assert pruned.unet.config.block_out_channels == (24, 48)
    narrow = weights(pruned)
    trained, report = compress.distill(pruned, teacher=teacher, data=tiny_parquet, steps=2, batch_size=2, log_every=1)
    assert report.details["features"]["mid_block"] == "kept"  # the pruned pipeline remembers which channels are left
    assert len(report.curves["loss"]) == 2
    small, report = compress.quantize(trained, "int8", skip=["conv_in"])
    assert report.coverage["skipped"]["conv_in"]
    same, numbers = compress.evaluate(small, "cost", **COST)
    assert same is small
    assert numbers.cost["params"] < 0.7 * sum(tensor.numel() for tensor in before.values())
    folder = compress.save(small, tmp_path / "small")
    again = compress.load(folder)
    assert DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)("a cat", num_inference_steps=1).images
    assert type(again.unet.mid_block.resnets[0].conv1.weight) is type(small.unet.mid_block.resnets[0].conv1.weight)
    for pipeline, expected in ((teacher, before), (pruned, narrow)):
        assert all(torch.equal(expected[name], tensor) for name, tensor in pipeline.unet.state_dict().items())


def test_a_denoiser_alone(tiny_parquet: Path) -> None:
    unet = tiny_pipeline().unet
    pruned, _ = compress.prune(unet, ratio=0.25)
    assert type(pruned) is type(unet) and pruned.config.block_out_channels == (24, 48)
    small, report = compress.quantize(pruned)
    assert 0.5 < report.coverage["macs"] <= 1 and type(small) is type(unet)
    with pytest.raises(UserError, match="give the pipeline and not its denoiser alone"):
        compress.prune(unet, "taylor", data=tiny_parquet)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: compress.prune(p, "magnitud"), ["magnitud", "did you mean magnitude"]),
        (lambda p: compress.prune(p, ratoi=0.5), ["ratoi", "did you mean ratio"]),
        (lambda p: compress.prune(p, ratio=2), ["ratio=2", "a number in (0, 1)"]),
        (lambda p: compress.prune(p, "taylor"), ["data is missing"]),
        (lambda p: compress.quantize(p, skip=["zzz"]), ["skip=zzz"]),
        (lambda p: compress.evaluate(p, "quick"), ["data is missing"]),
        (lambda p: compress.load("/no/such/folder"), ["/no/such/folder"]),
    ],
)
def test_mistakes_get_one_message(call: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        call(tiny_pipeline())
    assert all(word in str(caught.value) for word in words)


def test_a_fresh_process_loads_nothing_before_it_is_asked() -> None:
    code = (
        "import sys, compress; assert 'torch' not in sys.modules; compress.prune; assert 'torch' not in sys.modules; "
        "assert callable(compress.prune) and callable(compress.evaluate); import compress.prune.width as w; w.Config()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd="/")


def test_unknown_names_are_no_part_of_it() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = compress.prunes


def test_save_replaces_nothing_but_a_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    pipeline, mine = compress.load(tiny_model), tmp_path / "mine"
    mine.mkdir()
    (mine / "cat.png").write_text("mine")
    for place in (mine, mine / "cat.png"):
        with pytest.raises(UserError, match="expected a new folder, or a checkpoint"):
            compress.save(pipeline, place)
    assert (mine / "cat.png").read_text() == "mine"
    for _ in range(2):
        assert (compress.save(pipeline, tmp_path / "new") / "model_index.json").is_file()
