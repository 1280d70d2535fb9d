import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import compress.run.recipe
from compress.__main__ import main, usage
from compress.config.folders import recipe_files
from compress.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The command line in this process, started in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["compress", *arguments])
        return main()

    return call


def in_process_of_its_own(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, timeout=600, check=False
    )


def refused(cli: Any, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a call that must fail as a user's mistake and leave no file behind."""
    assert cli(*arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("error: ") == 1
    assert list(Path.cwd().iterdir()) == []
    return captured.err


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("recipe=prune", "--help")])
def test_help_lists_recipes_and_how_to_override(
    cli: Any, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert cli(*arguments) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in recipe_files())
    assert "stages.prune.ratio=0.4" in text
    assert "evaluate" in text


def test_help_and_import_load_neither_torch_nor_diffusers(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "import compress, compress.config.compose, compress.data, compress.models, compress.store\n"
        "sys.argv = ['compress', {argument!r}, '--cfg', 'job']\n"
        "try:\n    runpy.run_module('compress', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {{'torch', 'diffusers', 'transformers', 'datasets'}} & set(sys.modules)"
    )
    for argument in ("--help", "recipe=prune_distill_int8"):
        done = in_process_of_its_own(tmp_path, "-c", code.format(argument=argument))
        assert done.returncode == 0, done.stderr
    assert "macs: 0.6" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_method_is_chosen_by_the_kind_of_its_stage(cli, capsys):
    assert cli("--cfg", "job", "recipe=prune", "prune=taylor", "stages.prune.ratio=0.4") == 0
    shown = capsys.readouterr().out
    assert "name: taylor" in shown and "ratio: 0.4" in shown
    assert cli("recipe=prune", "prune=bk_sdm_small", "--cfg", "job") == 0
    assert "method: bk_sdm" in capsys.readouterr().out


def test_options_may_stand_anywhere(cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("recipe=prune", "--cfg", "job", "seed=7") == 0
    assert "seed: 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["recipe=prun"], "did you mean prune?"),
        (["seed=1"], "recipe is missing"),
        (["recip=int8"], "recip=int8: no such key (did you mean recipe?)"),
        (["recipe=int8", "seed"], "seed: expected KEY=VALUE"),
        (["recipe=prune", "seed=0,1"], "seed=0,1: add -m to run each value, or write seed=[0,1] for a list"),
        (["recipe=prune", "evaluate=cots"], "did you mean cost?"),
        (["recipe=prune", "stages.prune.ratoi=1"], "did you mean ratio?"),
        (["recipe=prune", "stages.prune.ratio=[1,"], "cannot be read"),
        (["recipe=prune", "stages.prune.ratio=1.2"], "stages.prune.ratio=1.2: expected"),
        (["recipe=prune", "stages.prune.ratio=abc"], "stages.prune.ratio=abc: expected"),
        (["recipe=int8", "+distill@stages.distill=features"], "stages.quantize"),
        (["recipe=prune", "model.path=/nowhere"], "model.path=/nowhere: expected"),
        (["recipe=prune", "data.path=/nowhere"], "data.path=/nowhere: expected"),
        (["recipe=prune", "device=cuda:99"], "device=cuda:99: expected"),
        (["recipe=prune", "out=/dev/null/out"], "out=/dev/null/out: cannot be written"),
        (["recipe=prune", "store=/dev/null/store"], "store=/dev/null/store: cannot be written"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    cli: Any, capsys: pytest.CaptureFixture[str], tiny_overrides: list[str], arguments: list[str], part: str
) -> None:
    given = {argument.partition("=")[0] for argument in arguments}
    usual = [override for override in tiny_overrides if override.partition("=")[0] not in given]
    assert part in refused(cli, capsys, *arguments, *(usual if "evaluate" not in given else []))


def test_a_model_that_is_no_pipeline_or_truncated_is_refused(
    cli: Any,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tiny_overrides: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    import shutil

    folder = tmp_path_factory.mktemp("models")
    (folder / "empty").mkdir()
    broken = Path(shutil.copytree(tiny_model, folder / "broken"))
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for model, part in ((folder / "empty", "model_index.json"), (broken, str(weights.relative_to(broken)))):
        assert part in refused(cli, capsys, "recipe=prune", *tiny_overrides[1:], f"model.path={model}")


def failing(error: BaseException) -> Any:
    def run_recipe(*_: Any, **__: Any) -> None:
        raise error

    return run_recipe


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (UserError("x=1: expected 2"), 2, "error: x=1: expected 2"),
        (OSError(28, "No space left on device", "/a/file"), 2, "/a/file: the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "the disk is full"),
        (shutil.Error([("a", "b", f"{'long ' * 50}No space left on device")]), 2, "is full (No space left on device);"),
        (KeyboardInterrupt(), 130, "run the same command again to continue"),
        (ZeroDivisionError("a mistake of ours"), 1, "Traceback"),
    ],
)
def test_exit_codes(
    cli: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_overrides: list[str],
    error: BaseException,
    code: int,
    part: str,
) -> None:
    monkeypatch.setattr(compress.run.recipe, "run_recipe", failing(error))
    assert cli("recipe=prune", *tiny_overrides) == code
    text = capsys.readouterr().err
    assert part in text
    assert ("Traceback" in text) == (code == 1)


def test_multirun_gives_every_run_a_folder_and_goes_on_after_a_mistake(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[float, str]] = []
    monkeypatch.setattr(
        compress.run.recipe,
        "run_recipe",
        lambda config, **_: seen.append((config.stages[0].config.ratio, str(config.out))),
    )
    assert cli("-m", "recipe=prune", *tiny_overrides, "stages.prune.ratio=0.25,1.5,0.5", "out=sweep") == 2
    assert seen == [(0.25, "sweep/ratio=0.25"), (0.5, "sweep/ratio=0.5")]
    captured = capsys.readouterr()
    assert "stages.prune.ratio=1.5" in captured.err
    assert captured.err.count("error: ") == 1 and "Traceback" not in captured.err
    headers = [line.partition(";")[0] for line in captured.out.split("\n") if line.startswith("[")]
    assert headers == ["[1/3] stages.prune.ratio=0.25", "[3/3] stages.prune.ratio=0.5"]
    assert "3 points: 2 computed, 0 from the store, 1 failed" in captured.out
    assert [str(path) for path in Path("sweep").glob("*/*.*")] == ["sweep/ratio=1.5/failure.json"]
    assert "stages.prune.ratio=1.5" in Path("sweep/report.html").read_text()
    failure = json.loads(Path("sweep/ratio=1.5/failure.json").read_text())
    assert failure["exit_code"] == 2 and "stages.prune.ratio=1.5: expected" in failure["message"]
    assert "stages.prune.ratio=1.5" in failure["overrides"]


def test_the_jobs_of_a_multirun_share_a_time_stamp(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(compress.run.recipe, "run_recipe", lambda config, **_: seen.append(config.out))
    assert cli("-m", "recipe=prune", *tiny_overrides, "prune=magnitude,taylor", "seed=range(1,3)") == 0
    assert {out.parent for out in seen} == {seen[0].parent} and seen[0].parent.parent == Path("runs/prune")
    names = [f"prune={choice},seed={seed}" for choice in ("magnitude", "taylor") for seed in (1, 2)]
    assert [out.name for out in seen] == names
    assert "[4/4] prune@stages.prune=taylor seed=2" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--version"], ["recipe=prune", "--version"]])
def test_the_version_is_ours(cli: Any, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli(*arguments) == 0
    assert capsys.readouterr().out == f"compress {compress.__version__}\n"


def test_the_whole_way(tiny_overrides: list[str], tmp_path: Path) -> None:
    """Once in a process of its own, with nothing replaced and real costs; distilling has tests of its own."""
    settings = ["~stages.distill", "stages.prune.ratio=0.5"]
    command = ["-m", "compress", "recipe=prune_distill_int8", *tiny_overrides, *settings, "out=out"]
    done = in_process_of_its_own(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "out/checkpoint" in done.stdout
    assert "torch_dtype=torch.float32" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]
    assert (tmp_path / "out" / "checkpoint" / "model_index.json").is_file()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["store"]


@pytest.mark.slow
def test_two_processes_share_a_stage_and_train_alike(tiny_overrides: list[str], tmp_path: Path) -> None:
    import json

    settings = ["stages.prune.ratio=0.5", "stages.distill.steps=3", "stages.distill.batch_size=4"]
    losses = []
    for processes, launcher in (
        (1, []),
        (2, ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]),
    ):
        folders = [f"out=out{processes}", f"store=store{processes}"]
        command = [*launcher, "-m", "compress", "recipe=prune_distill", *tiny_overrides, *settings, *folders]
        done = in_process_of_its_own(tmp_path, *command)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("torch_dtype") == 1  # the first process alone prints
        report = json.loads((tmp_path / f"out{processes}" / "report.json").read_text())
        info = json.loads((tmp_path / f"out{processes}" / "checkpoint" / "compress.json").read_text())
        assert info["stages"][1]["details"]["processes"] == processes
        losses.append(report["stages"][1]["curves"]["loss"][-1][1])
    # The weights differ in their last bits, by the order of sums; with Adam's first steps that can be a whole step.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_with_the_same_weights(tiny_overrides: list[str], tmp_path: Path) -> None:
    import time

    settings = ["stages.prune.ratio=0.5", "stages.distill.steps=60", "stages.distill.save_every=2"]
    command = [sys.executable, "-m", "compress", "recipe=prune_distill", *tiny_overrides, *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([*command, "out=out", "store=store"], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 600
    while not any(tmp_path.glob("store/work/*/state-*")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -9
    assert not (tmp_path / "out" / "checkpoint").exists()
    weights = []
    for folders in (["out=out", "store=store"], ["out=whole", "store=other"]):
        assert subprocess.run([*command, *folders], cwd=tmp_path, env=environment, check=False).returncode == 0
        weights.append((tmp_path / folders[0][4:] / "checkpoint/unet/diffusion_pytorch_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert not any(tmp_path.glob("store/work/*"))


def test_usage_names_no_folder_of_this_machine() -> None:
    assert str(ROOT) not in usage()
