"""A run's config file, final checkpoint and last lines on screen."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compress.models
import compress.report
import compress.track.hub
from compress.config.folders import REPORT
from compress.config.values import PRECISIONS
from compress.models.sampling import sampling_from
from compress.run.config import RunConfig
from compress.store import checkpoint
from compress.system.files import file_hash, link, replace_folder_with, write_text
from compress.system.progress import duration

if TYPE_CHECKING:
    from rich.console import Console

    from compress.models import ModelConfig
    from compress.track import Tracker

SNIPPET = """\
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("{folder}", torch_dtype=torch.{dtype}{flag})
"""


def plain(config: RunConfig) -> dict[str, Any]:
    """A config as plain values in the layout of a recipe."""
    stages = {
        stage.name: {"kind": stage.kind, "method": stage.method, **dataclasses.asdict(stage.config)}
        for stage in config.stages
    }
    return dataclasses.asdict(config) | {"stages": stages, "out": str(config.out), "store": str(config.store)}


def is_config(file: Path) -> bool:
    """Whether a file is the ``config.yaml`` of a run."""
    if not file.is_file():
        return False
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return all(any(line.startswith(f"{key}:") for line in lines) for key in ("recipe_name", "stages", "store"))


def write_config(config: RunConfig) -> None:
    """Writes ``config.yaml``; where it replaces another one, removes the report, which would pass for this run's."""
    from omegaconf import OmegaConf

    file, text = config.out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain(config)))
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        (config.out / REPORT).unlink(missing_ok=True)
    write_text(file, text)


def info(
    config: RunConfig, model: str, data: str, history: list[dict[str, Any]], model_file: str | None
) -> dict[str, Any]:
    """The part of ``compress.json`` that says how a checkpoint was made.

    Args:
        config: Of the run.
        model: Fingerprint of the teacher.
        data: Fingerprint of the data.
        history: One entry a stage, this checkpoint's last.
        model_file: Of the checkpoint, if any.
    """
    return {
        "recipe": config.recipe_name,
        "model": {**dataclasses.asdict(config.model), "fingerprint": model},
        "data": {"path": config.data.path, "revision": config.data.revision, "fingerprint": data},
        "seed": config.seed,
        "precision": config.precision,
        "model_file": model_file,
        "before": stages_before(config.model),
        "stages": history,
    }


def stages_before(config: "ModelConfig") -> list[dict[str, Any]]:
    """Stages of earlier runs in the teacher's ``compress.json``: ``name``, ``kind``, ``method``, ``declared``."""
    folder = model_folder(config)
    if not (folder / checkpoint.INFO).is_file():
        return []
    found = checkpoint.read_info(folder)
    stages = [*found.get("before", []), *found.get("stages", [])]
    return [{key: stage.get(key) for key in ("name", "kind", "method", "declared")} for stage in stages]


def model_folder(config: "ModelConfig") -> Path:
    """The folder of the teacher; for a hub model the one in the hub's cache."""
    if config.folder is not None:
        return config.folder
    from huggingface_hub import hf_hub_download

    # The commit's folder: found online or, without a connection, in the cache, as when the model is loaded.
    return Path(hf_hub_download(config.path, "model_index.json", revision=config.revision)).parent


def export(source: Path, target: Path, content: dict[str, Any]) -> None:
    """Exports a checkpoint of the store, with the measurements in its model card.

    Weights are hard links where the file system has them, so they take no space.

    Args:
        source: A checkpoint in the store.
        target: The new folder; an existing one is replaced.
        content: New content of ``compress.json``.
    """
    with replace_folder_with(target) as beside:
        shutil.copytree(source, beside, copy_function=_link_weights)
        (beside / checkpoint.INFO).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (beside / "README.md").write_text(compress.report.model_card(content), encoding="utf-8")
        hashes = json.loads((source / checkpoint.MANIFEST).read_text(encoding="utf-8"))
        hashes |= {name: file_hash(beside / name) for name in (checkpoint.INFO, "README.md")}
        (beside / checkpoint.MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")


def _link_weights(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        link(Path(source), Path(target))
    else:
        shutil.copy2(source, target)


def track_report(tracker: "Tracker", result: dict[str, Any], config: RunConfig) -> None:
    """Tracks the final table and images, and the final checkpoint if the config asks for it."""
    columns, rows = compress.report.plain_rows(result)
    images = {file.stem: file for file in sorted((config.out / "images").glob("*.png"))}
    tracker.report(columns, rows, images)
    if config.track.artifact and "stopped" not in result:
        last = result["stages"][-1]
        numbers = {name: last[name] for name in ("cost", "metrics")}
        tracker.artifact(config.recipe_name, config.out / "checkpoint", numbers)


def print_end(console: "Console", result: dict[str, Any], config: RunConfig, tracked: str) -> None:
    """Prints the short table, the verdict, the paths, and how to load the checkpoint.

    Args:
        console: To print to.
        result: As in ``report.json``.
        config: Of the run.
        tracked: Where the tracked runs are; empty without tracking.
    """

    def say(text: str = "") -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say()
    compress.report.print_summary(result, console)
    say()
    console.print(" ".join([compress.report.verdict(result), *compress.report.warnings(result)]), highlight=False)
    say()
    stages = result["stages"]
    found = sum(stage["cached"] for stage in stages)
    where = {
        "report": str(config.out / "report.html"),
        "checkpoint": result.get("checkpoint"),
        "W&B": tracked,
        "time": f"{duration(result['seconds'])}, {found} of {len(stages)} stages from the store",
    }
    for name, value in where.items():
        if value:
            say(f"{name:11} {value}")
    if "stopped" in result:
        say(f"\nstopped early by objective.stop_after: {result['stopped']}")
        return
    model_file = stages[-1]["model_file"]
    flag = ", trust_remote_code=True" if model_file else ""
    snippet = SNIPPET.format(folder=result["checkpoint"], dtype=PRECISIONS[config.precision], flag=flag)
    first = "".join(f"import {name}\n" for name in config.stages[-1].declared.imports)
    say(f"\n{first}{snippet}{_drawing(config)}".rstrip())
    if model_file:
        say(f"\n{compress.report.how_to_load(model_file)}")


def _drawing(config: RunConfig) -> str:
    """How the final checkpoint has to be called, if it was trained for certain steps or guidance."""
    own = sampling_from(checkpoint.read_info(config.out / "checkpoint"))
    given = [f"num_inference_steps={own.steps}"] if own.steps is not None else []
    if own.guidance is not None:
        given.append(f"guidance_scale={own.argument(config.evaluate.guidance):g}")
    return f'image = pipeline("a red heart", {", ".join(given)}).images[0]\n' if given else ""


def publish(console: "Console", result: dict[str, Any], config: RunConfig) -> None:
    """Publishes the final checkpoint if the config asks for it, and adds where to the report.

    Raises:
        UserError: The checkpoint is damaged, or cannot be published.
    """
    if config.publish is None:
        return
    result["published"] = compress.track.hub.publish(config.out / "checkpoint", config.publish)
    report = config.out / REPORT
    content = json.loads(report.read_text(encoding="utf-8")) | {"published": result["published"]}
    write_text(report, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    console.print(f"\npublished   {result['published']['url']}", markup=False, highlight=False, soft_wrap=True)
