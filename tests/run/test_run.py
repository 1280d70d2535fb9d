import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import compress.evaluate
import compress.models
import compress.quantize.w8a8
from compress.config.compose import compose
from compress.errors import UserError
from compress.evaluate import Evaluation
from compress.run.config import to_run_config
from compress.run.keys import Plan
from compress.run.output import write_config
from compress.run.recipe import run_recipe
from compress.stage import StageReport
from compress.store import Store
from compress.store.checkpoint import read_info, verify_checkpoint

Run = Callable[..., dict[str, Any]]
RECIPE = ["recipe=prune_distill_int8", "~stages.distill", "prune=magnitude", "stages.prune.ratio=0.5"]
SHORT = ["stages.quantize.calibration.examples=1", "stages.quantize.calibration.steps=2"]


def quick_evaluate(
    pipeline: Any, data: Any, config: Any, folder: Path, *, teacher: Path | None = None, **more: Any
) -> Evaluation:
    """Counts parameters and makes up four images that depend on the weights and on the choice of seeds."""
    params = sum(tensor.numel() for tensor in pipeline.unet.parameters())
    (folder / "images").mkdir(parents=True, exist_ok=True)
    color = ((params + more["other_seeds"]) % 251, 0, 0)
    for index in range(4):
        if not (file := folder / "images" / f"sample-{index:06d}.png").exists():
            Image.new("RGB", (8, 8), color).save(file)
    psnr = None
    if teacher is not None:
        theirs = Image.open(teacher / "images" / "sample-000000.png").getpixel((0, 0))
        psnr = {"value": float(color != theirs), "n": 4}
    grid = [{"prompt": "a cat", "seed": 0, "image": "images/sample-000000.png"}]
    cost = {} if more["cost_of"] is None else {"params": params}
    return Evaluation(cost, {"psnr": psnr}, {"protocol": "quick", "version": 1}, [] if more["other_seeds"] else grid)


@pytest.fixture
def run(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs prune and quantize with a quick evaluation; ``run.evaluations`` has the checkpoint of every call."""
    calls: list[Path | None] = []

    def counted(*arguments: Any, **more: Any) -> Any:
        calls.append(more["cost_of"])
        return quick_evaluate(*arguments, **more)

    monkeypatch.setattr("compress.run.work.evaluate", counted)

    def go(*overrides: str, store: Path | None = None, out: str = "out") -> dict[str, Any]:
        calls.clear()
        folders = [f"out={tmp_path / out}", f"store={store or tmp_path / 'store'}"]
        recipe = [*RECIPE, *SHORT]
        return run_recipe(to_run_config(compose([*recipe, *tiny_overrides, *folders, *overrides])))

    go.evaluations = calls  # type: ignore[attr-defined]
    return go


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> tuple[Path, dict[str, Any]]:
    """A finished run's folder, with its store beside the report, and its report."""
    folder = tmp_path_factory.mktemp("first")
    recipe = [*RECIPE, *SHORT, *tiny_overrides]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.run.work.evaluate", quick_evaluate)
        config = to_run_config(compose([*recipe, f"out={folder / 'out'}", f"store={folder / 'store'}"]))
        return folder, run_recipe(config)


@pytest.fixture
def store(first: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the finished run's store."""
    return Path(shutil.copytree(first[0] / "store", tmp_path / "copied"))


def numbers(result: dict[str, Any]) -> list[Any]:
    return [[row["cost"], row["metrics"]] for row in (result["teacher"], *result["stages"])]


def test_the_first_run_writes_everything(first: tuple[Path, dict[str, Any]]) -> None:
    from diffusers import DiffusionPipeline

    folder, result = first
    out = folder / "out"
    assert [stage["cached"] for stage in result["stages"]] == [False, False]
    report = json.loads((out / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["prune", "quantize"]
    assert numbers(report) == numbers(result)
    assert report["stages"][0]["cost"]["params"] < report["teacher"]["cost"]["params"]
    for name in ("report.md", "config.yaml", "images/grid.png"):
        assert (out / name).stat().st_size > 0
    assert not any((folder / "store" / "work").glob("*/*"))
    verify_checkpoint(out / "checkpoint")
    info = read_info(out / "checkpoint")
    assert [stage["kind"] for stage in info["stages"]] == ["prune", "quantize"]
    assert info["evaluation"]["rows"][0]["name"] == "teacher"
    assert "a cat" in (out / "checkpoint" / "README.md").read_text()
    pipeline = DiffusionPipeline.from_pretrained(out / "checkpoint", torch_dtype=torch.float32)
    assert pipeline.unet.config.block_out_channels == [16, 32]


def test_the_noise_floor_is_measured_once_and_reported(
    run: Run, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("evaluate.images=5", store=store)
    assert result["noise_floor"]["metrics"] == {"psnr": {"value": 1.0, "n": 4}}
    assert result["manifest"] == {"protocol": "quick", "version": 1}
    assert run.evaluations.count(None) == 1  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["noise_floor"] == result["noise_floor"]
    assert "| noise floor |" in (tmp_path / "out" / "report.md").read_text()
    assert "| noise floor |" in (tmp_path / "out" / "checkpoint" / "README.md").read_text()
    again = run("evaluate.images=5", "evaluate.noise_floor=false", store=store)
    assert run.evaluations == []  # type: ignore[attr-defined]
    assert "noise_floor" not in again and numbers(again) == numbers(result)


def test_the_report_of_another_config_does_not_stay_beside_a_new_one(tmp_path: Path, tiny_overrides: list[str]) -> None:
    config = replace(to_run_config(compose(["recipe=prune", *tiny_overrides])), out=tmp_path)
    write_config(config)
    (tmp_path / "report.json").write_text("{}")
    write_config(config)
    assert (tmp_path / "report.json").exists()
    write_config(replace(config, seed=1))
    assert not (tmp_path / "report.json").exists()


def test_config_yaml_gives_the_same_run(first: tuple[Path, dict[str, Any]]) -> None:
    from omegaconf import OmegaConf

    config = to_run_config(OmegaConf.load(first[0] / "out" / "config.yaml"))
    assert config.stages[0].config.ratio == 0.5
    assert config.out == first[0] / "out"


def test_the_second_run_takes_everything_from_the_store(
    run: Run, first: tuple[Path, dict[str, Any]], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress.models, "load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    result = run(store=store)
    assert [stage["cached"] for stage in result["stages"]] == [True, True]
    assert run.evaluations == []  # type: ignore[attr-defined]
    assert numbers(result) == numbers(first[1])
    assert [stage["key"] for stage in result["stages"]] == [stage["key"] for stage in first[1]["stages"]]


def test_only_what_changed_runs_again(run: Run, store: Path) -> None:
    result = run("stages.quantize.skip=[conv_in]", store=store)
    assert [stage["cached"] for stage in result["stages"]] == [True, False]
    assert len(run.evaluations) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "there"),
    [("evaluate.bootstrap=500", 4), ("evaluate.leave_out=[kid]", 4), ("evaluate.steps=3", 0), ("evaluate.images=5", 0)],
)
@pytest.mark.parametrize("keep", [True, False])
def test_images_are_sampled_again_only_where_they_are_deleted_or_would_be_others(
    run: Run, store: Path, monkeypatch: pytest.MonkeyPatch, override: str, there: int, keep: bool
) -> None:
    if keep:
        run("evaluate.keep_images=true", store=store)
    kept = len(list(store.rglob("sample-*.png")))
    before: list[int] = []

    def looked_at(*arguments: Any, **more: Any) -> Any:
        before.append(len(list(arguments[3].glob("images/sample-*.png"))))
        return quick_evaluate(*arguments, **more)

    monkeypatch.setattr("compress.run.work.evaluate", looked_at)
    result = run(override, "evaluate.noise_floor=false", store=store)
    assert all(stage["cached"] for stage in result["stages"])
    students = there if keep else min(there, 1)  # the one that the grid shows
    assert before == [there, students, students]
    assert len(list(store.rglob("sample-*.png"))) == kept + 4 + 1 + 1  # those of the first run are still there


def test_a_prefix_is_shared_and_names_do_not_matter(run: Run, store: Path) -> None:
    result = run(
        "~stages.prune", "~stages.quantize", "+prune@stages.narrow=magnitude", "stages.narrow.ratio=0.5", store=store
    )
    assert [(stage["name"], stage["cached"]) for stage in result["stages"]] == [("narrow", True)]


def test_the_seed_and_the_precision_make_other_keys(
    first: tuple[Path, dict[str, Any]], tiny_overrides: list[str]
) -> None:
    steps = []
    for override in ("seed=0", "seed=1", "precision=bf16"):
        config = to_run_config(compose([*RECIPE, *SHORT, *tiny_overrides, override]))
        steps += Plan(config, Store(first[0] / "store"), torch.device("cpu")).steps[:1]
    assert [step.cached for step in steps] == [True, False, False]
    assert len({step.key for step in steps}) == 3


def test_a_flipped_byte_is_found_before_anything_is_computed(
    run: Run, first: tuple[Path, dict[str, Any]], store: Path, tmp_path: Path
) -> None:
    folder = store / first[1]["stages"][0]["key"]
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}.*delete"):
        run("stages.quantize.skip=[conv_in]", store=store)
    assert run.evaluations == []  # type: ignore[attr-defined]
    assert not (tmp_path / "out").exists()
    shutil.rmtree(folder)
    assert len(run(store=store)["stages"]) == 2


def test_the_last_checkpoint_is_measured_once_more_in_its_engine(run: Run, store: Path, tmp_path: Path) -> None:
    result = run("engine=auto", store=store)
    assert len(run.evaluations) == 1, "all other rows are in the store"  # type: ignore[attr-defined]
    row = result["accelerated"]
    assert (row["name"], row["engine"]) == ("quantize, openvino", "openvino")
    assert [stage["name"] for stage in result["stages"]] == ["prune", "quantize"]
    assert "| quantize, openvino |" in (tmp_path / "out" / "report.md").read_text()
    assert read_info(tmp_path / "out" / "checkpoint")["evaluation"]["rows"][-1]["name"] == "quantize, openvino"
    assert run("engine=openvino", store=store)["accelerated"] == row
    assert run.evaluations == [], "auto is the same engine"  # type: ignore[attr-defined]
    both = run("engine=openvino", "evaluate.engine=openvino", store=store)
    assert "accelerated" not in both, "every row is in that engine already"
    with pytest.raises(UserError, match="engine=inductor: needs a C"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.which", lambda _: None)
        run("engine=inductor", store=store)


def test_an_engine_that_fails_costs_its_row_alone(
    run: Run, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Evaluation:
        raise UserError("engine=openvino: the unet cannot be run: a reason")

    monkeypatch.setattr("compress.run.work.evaluate", fail)
    result = run("engine=openvino", store=store)
    assert "accelerated" not in result and len(result["stages"]) == 2
    assert "cannot be run: a reason; the table has no row for it" in " ".join(capsys.readouterr().err.split())
    verify_checkpoint(tmp_path / "out" / "checkpoint")


def test_a_stage_that_fails_keeps_those_before_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> StageReport:
        raise UserError("skip=['x']: expected something else")

    with monkeypatch.context() as patch:
        patch.setattr(compress.quantize.w8a8, "run", fail)
        with pytest.raises(UserError, match=r"stages\.quantize\.skip=\['x'\]: expected"):
            run()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["prune"]
    assert [stage["cached"] for stage in run()["stages"]] == [True, False]


def test_a_stage_that_changes_nothing_is_an_error(run: Run, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = StageReport({"params": 0.0, "macs": 0.0, "modules": 0, "skipped": {"conv_in": "too small"}})
    monkeypatch.setattr(compress.quantize.w8a8, "run", lambda *_: empty)
    with pytest.raises(UserError, match=r"stages\.quantize.*changed nothing.*conv_in: too small"):
        run("stages.quantize.skip=[conv_out]", store=store)


def test_what_another_run_computed_meanwhile_is_taken(
    run: Run, first: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[str] = []

    @contextmanager
    def lock(self: Store, key: str, waiting: Callable[[], None] = lambda: None) -> Any:
        there = first[0] / "store" / key
        if there.exists():
            waiting()
            shutil.copytree(there, self.path(key))
            waited.append(key)
        yield

    monkeypatch.setattr(Store, "lock", lock)
    assert [stage["cached"] for stage in run()["stages"]] == [True, True]
    assert len(waited) == 2


def test_the_final_checkpoint_is_replaced_and_editing_it_does_not_reach_the_store(
    run: Run, store: Path, tmp_path: Path
) -> None:
    run(store=store)
    for file in (tmp_path / "out" / "checkpoint").glob("*.*"):
        file.write_text("edited")
    run(store=store)
    verify_checkpoint(tmp_path / "out" / "checkpoint")
    assert sorted(path.name for path in (tmp_path / "out").glob(".*")) == []


def test_a_disk_without_room_is_refused_before_anything_is_computed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(UserError, match=r"store=.*1 MB free.*make room"):
        run()
    assert run.evaluations == []  # type: ignore[attr-defined]
