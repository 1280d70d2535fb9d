"""Recipes, config groups and stages of the user's own, outside of the package."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compress.__main__ import main
from compress.config.compose import compose, use_config_dir
from compress.config.folders import recipe_files
from compress.errors import UserError
from compress.evaluate import Evaluation
from compress.run.config import to_run_config

ROOT = Path(__file__).parents[1]

STAGE = '''
"""Halves the weights of the first layer."""

from dataclasses import dataclass

from compress.errors import UserError, bad_value
from compress.stage import Stage, StageContext, StageReport

STAGE = Stage(version={version}, sampled=False, tag="halved", limits=("It is halved.",))


@dataclass(frozen=True)
class Config:
    factor: float = 0.5

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise bad_value("factor", self.factor, "a number above 0")


def check(config, denoiser, outline):
    if config.factor > 10:
        raise bad_value("factor", config.factor, f"at most 10 for a {{outline.kind}}")
    return denoiser


def run(pipeline, config: Config, context: StageContext) -> StageReport:
    pipeline.unet.conv_in.weight.data *= config.factor
    return StageReport({{"params": 0.01, "macs": None, "modules": 1, "skipped": {{}}}}, {{"factor": config.factor}})
'''
GROUP = "kind: rescale\nmethod: own_package.halve\nfactor: 0.5\n"
RECIPE = """# Prunes, then halves.
defaults:
  - /prune@stages.prune: magnitude
  - /rescale@stages.rescale: half
  - _self_

recipe_name: mine
stages:
  prune: {ratio: 0.5}
"""


@pytest.fixture(autouse=True)
def no_config_dir() -> Iterator[None]:
    """Tests elsewhere know nothing of these folders."""
    yield
    use_config_dir(None)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of somebody who has a package, a config group and a recipe, and stands in it."""
    for name, text in {
        "own_package/__init__.py": "",
        "own_package/halve.py": STAGE.format(version=1),
        "own_package/bare.py": "STAGE = 1\nConfig = int\n",
        "own_package/broken.py": "1 / 0\n",
        "own_package/needy.py": "import no_such_library\n",
        "conf/rescale/half.yaml": GROUP,
        "conf/rescale/tenth.yaml": GROUP.replace("0.5", "0.1"),
        "conf/prune/mine.yaml": "defaults:\n  - width\n  - override importance: l1\n  - _self_\nratio: 0.4\n",
        "conf/recipe/mine.yaml": RECIPE,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of nothing but how many images would be sampled."""

    def evaluate(*arguments: Any, **more: Any) -> Evaluation:
        images = arguments[2].images
        return Evaluation({}, {"psnr": {"value": 1.0, "n": images}} if images else {}, {}, [])

    monkeypatch.setattr("compress.run.work.evaluate", evaluate)


def cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    return main()


@pytest.mark.parametrize("header", ["", "# @package _global_\n"])
def test_a_shipped_recipe_copied_into_a_config_dir_is_the_same(own: Path, header: str) -> None:
    for name in ("prune_distill_int8", "benchmark", "score"):
        expected = compose([f"recipe={name}"])
        (own / "conf" / "recipe" / f"{name}.yaml").write_text(header + recipe_files()[name].read_text())
        assert compose([f"recipe={name}"], str(own / "conf")) == expected


@pytest.mark.parametrize("header", ["", "# @package _global_\n"])
def test_a_recipe_may_be_a_file(own: Path, header: str) -> None:
    shipped = recipe_files()["prune_distill"].read_text().replace("recipe_name: prune_distill", "recipe_name: own")
    (own / "some recipe.yaml").write_text(header + shipped)
    for name in ("./some recipe.yaml", "some recipe.yaml", str(own / "some recipe.yaml")):
        config = to_run_config(compose([f"recipe={name}", "prune=taylor", "stages.distill.steps=7"]))
        assert [stage.method for stage in config.stages] == ["width", "features"]
        assert (config.stages[1].config.steps, config.recipe_name) == (7, "own")
    (own / "prune.yaml").write_text(recipe_files()["int8"].read_text())  # the name of another that comes with compress
    assert list(compose(["recipe=./prune.yaml"]).stages) == ["quantize"]
    assert list(compose(["recipe=prune"]).stages) == ["prune"]


def test_groups_of_a_config_dir_are_choices(own: Path) -> None:
    config = to_run_config(compose(["recipe=prune", "prune=mine"], "conf"))
    assert (config.stages[0].config.ratio, config.stages[0].config.importance.name) == (0.4, "l1")
    stages = to_run_config(compose(["recipe=mine", "rescale=tenth", "prune/importance=taylor"], "conf")).stages
    assert [(stage.name, stage.kind, stage.method) for stage in stages] == [
        ("prune", "prune", "width"),
        ("rescale", "rescale", "own_package.halve"),
    ]
    assert (stages[1].config.factor, stages[0].config.importance.name) == (0.1, "taylor")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["recipe=min"], "recipe=min: no such recipe (did you mean mine?); known: "),
        (["recipe=./nowhere.yaml"], "recipe=./nowhere.yaml: no such file; a recipe is a YAML file or one of "),
        (["recipe=./own_package"], "recipe=./own_package: this is a folder; a recipe is a YAML file or one of "),
        (["recipe=nowhere/mine"], "recipe=nowhere/mine: no such file"),
        (["recipe=own_package/halve.py"], "recipe=own_package/halve.py: "),
        (["recipe=mine", "rescale=haf"], "rescale=haf: no such rescale"),
        (["recipe=prune", "rescale=half"], "the recipe's stages are prune, and none is named rescale"),
        (["recipe=mine", "stages.rescale.factr=1"], "stages.rescale.factr: no such key (did you mean factor?)"),
        (["recipe=mine", "stages.rescale.factor=0"], "stages.rescale.factor=0.0: expected a number above 0"),
        (["recipe=mine", "stages.rescale.method=own_package.no"], "there is no module own_package.no, neither in "),
        (["recipe=mine", "stages.rescale.method=nobody.no"], "there is no module nobody, neither in "),
        (["recipe=mine", "stages.rescale.method=own_package.needy"], "needs the package no_such_library"),
        (["recipe=mine", "stages.rescale.method=own_package.broken"], "cannot be imported: ZeroDivisionError"),
        (
            ["recipe=mine", "stages.rescale.method=own_package.bare"],
            "bare.py has no STAGE (a compress.stage.Stage), no Config (a dataclass), no run(pipeline",
        ),
        (["recipe=mine", "stages.rescale.kind=[1]"], "stages.rescale.kind=[1]: expected a word"),
        (["recipe=mine", "stages.prune.method=halve"], "your own method is named with its package"),
    ],
)
def test_mistakes_are_one_message(own: Path, overrides: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        to_run_config(compose(overrides, "conf"))
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_knows_the_folder(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(monkeypatch, "--config-dir", "conf", "--help") == 0
    shown = capsys.readouterr().out
    assert "Prunes, then halves." in shown and "half, tenth" in shown and "mine, per_layer" in shown
    assert cli(monkeypatch, "--config-dir=conf", "recipe=mine", "rescale=tenth", "--cfg", "job") == 0
    assert "factor: 0.1" in capsys.readouterr().out
    for arguments, part in (
        (["--config-dir", "conf"], "recipe is missing: give recipe=NAME, one of"),
        (["--config-dir", "conf", "recipe=prune_"], "mine"),
        (["--config-dir", "nowhere", "recipe=prune"], "--config-dir nowhere: no such folder"),
        (["recipe=./nowhere.yaml"], "recipe=./nowhere.yaml: no such file"),
    ):
        assert cli(monkeypatch, *arguments) == 2
        assert part in (error := capsys.readouterr().err) and error.count("\n") == 1, error
    assert cli(monkeypatch, "--help") == 0
    assert "Prunes, then halves." not in capsys.readouterr().out
    (own / "conf" / "prune" / "taylor.yaml").write_text(GROUP)
    assert cli(monkeypatch, "--config-dir", "conf", "recipe=prune") == 2
    assert "the package already has prune/taylor" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_a_stage_of_ones_own_runs_and_its_version_decides_its_key(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_overrides: list[str]
) -> None:
    usual = ["--config-dir", "conf", "recipe=mine", *tiny_overrides, "store=store", "evaluate.images=5"]
    assert cli(monkeypatch, *usual, "stages.rescale.factor=11") == 2
    error = capsys.readouterr().err
    assert "stages.rescale.factor=11.0: expected at most 10 for a StableDiffusionPipeline" in error
    assert not (own / "store").exists()

    assert cli(monkeypatch, *usual, "out=first") == 0
    report = json.loads((own / "first" / "report.json").read_text())
    prune, rescale = report["stages"]
    assert (rescale["kind"], rescale["method"], rescale["details"]) == ("rescale", "own_package.halve", {"factor": 0.5})
    assert prune["metrics"]["psnr"]["n"] == 5 and rescale["metrics"] == {}  # it says that it is not sampled
    card = (own / "first" / "checkpoint" / "README.md").read_text()
    assert "- halved" in card and "- It is halved." in card

    assert cli(monkeypatch, *usual, "out=second") == 0
    assert [stage["cached"] for stage in json.loads((own / "second" / "report.json").read_text())["stages"]] == [
        True,
        True,
    ]
    from own_package import halve  # type: ignore[import-not-found]

    from compress.stage import Stage

    monkeypatch.setattr(halve, "STAGE", Stage(version=2))
    assert cli(monkeypatch, *usual, "out=third") == 0
    third = json.loads((own / "third" / "report.json").read_text())["stages"]
    assert [stage["cached"] for stage in third] == [True, False] and third[1]["key"] != rescale["key"]


@pytest.mark.slow
def test_a_process_in_another_folder_finds_the_stage(own: Path, tiny_overrides: list[str]) -> None:
    command = [sys.executable, "-m", "compress", "--config-dir", "conf", "recipe=mine", *tiny_overrides, "out=out"]
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=own, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    info = json.loads((own / "out" / "checkpoint" / "compress.json").read_text())
    assert [stage["method"] for stage in info["stages"]] == ["width", "own_package.halve"]
    assert info["stages"][1]["declared"]["tag"] == "halved"


@pytest.mark.usefixtures("quick")
def test_an_artifact_travels_with_the_checkpoint(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_overrides: list[str]
) -> None:
    text = STAGE.format(version=1).replace("sampled=False", 'sampled=False, leaves="artifact"')
    body = "    (context.artifact / 'weights.txt').write_text(str(config.factor))\n    return StageReport({})\n"
    (own / "own_package" / "export.py").write_text(text.partition("    pipeline.unet")[0] + body)
    (own / "own_package" / "empty.py").write_text(
        text.partition("    pipeline.unet")[0] + "    return StageReport({})\n"
    )
    usual = ["--config-dir", "conf", "recipe=mine", *tiny_overrides, "~stages.prune", "store=store"]
    assert cli(monkeypatch, *usual, "stages.rescale.method=own_package.export", "out=out") == 0
    assert (own / "out" / "checkpoint" / "artifact" / "weights.txt").read_text() == "0.5"
    assert cli(monkeypatch, *usual, "stages.rescale.method=own_package.empty", "out=other") == 2
    assert "wrote no files to context.artifact" in capsys.readouterr().err
