"""The model card of a checkpoint: where it came from, what it cost, how to use it."""

import json
import re
from collections.abc import Mapping
from typing import Any

from compress.config.values import PRECISIONS
from compress.models.schedulers import SCHEDULERS, Scheduler
from compress.report.footer import how_to_load
from compress.report.table import markdown_table
from compress.stage import declares


def model_card(info: Mapping[str, Any]) -> str:
    """The ``README.md`` of a checkpoint.

    Args:
        info: As in ``compress.json``: ``recipe``, ``model`` (a path or hub id, or ``{"path", ...}``), ``stages``
            (``name``, ``kind``, ``method``, ``config``, ``declared``, ``coverage``, ``details``), and where there are
            any ``evaluation`` (``{"rows": [{"name", "cost", "metrics"}]}``, with ``noise_floor`` and ``manifest`` as in
            the report), ``example`` (``prompt``, ``seed``, ``steps``, ``guidance``, ``scheduler``, ``height``,
            ``width``), ``data``, ``seed``, ``precision``, ``versions``, ``probe``, ``model_file``.
    """
    parts = [_front_matter(info), _introduction(info), "## What was done\n", *_stages(info)]
    result = _result(info)
    if result:
        parts += ["## What it cost\n", markdown_table(result)]
    parts += ["## Usage\n", usage(info), "## Limits\n", _limits(info, bool(result))]
    settings = _settings(info)
    if settings:
        parts += ["## Settings\n", settings]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def usage(info: Mapping[str, Any], folder: str = "path/to/this/folder") -> str:
    """A snippet that samples the example, with its requirements."""
    example = _example(info)
    scheduler = _scheduler(str(example.get("scheduler") or "checkpoint"))
    imports = "DiffusionPipeline" + (f", {scheduler.kind}" if scheduler.kind else "")
    dtype = PRECISIONS.get(str(info.get("precision")), "float32")
    flag = ", trust_remote_code=True" if info.get("model_file") else ""
    lines = [
        "```python",
        *(f"import {name}" for name in declares(info.get("stages") or [], "imports")),
        "import torch",
        f"from diffusers import {imports}",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(folder)}, torch_dtype=torch.{dtype}{flag})",
    ]
    if scheduler.kind:
        lines.append(scheduler.code)
    arguments = [json.dumps(str(example.get("prompt", "a red heart")), ensure_ascii=False)]
    for argument, key in (
        ("num_inference_steps", "steps"),
        ("guidance_scale", "guidance"),
        ("height", "height"),
        ("width", "width"),
    ):
        if example.get(key) is not None:
            arguments.append(f"{argument}={example[key]}")
    arguments.append(f'generator=torch.Generator("cpu").manual_seed({example.get("seed", 0)})')
    lines += ["image = pipeline(", *(f"    {argument}," for argument in arguments), ").images[0]"]
    lines += ['image.save("image.png")', "```", ""]
    if "prompt" in example and "seed" in example:
        lines.append(
            "On the hardware and with the versions of the run, this is the first image of the report's grid, bit for "
            "bit."
        )
    if info.get("model_file"):
        lines.append(f"Its {how_to_load(info['model_file'])}")
    stages = info.get("stages") or []
    if libraries := declares(stages, "libraries"):
        lines.append(f"It needs {', '.join(f'`{name}`' for name in libraries)}.")
    lines += declares(stages, "usage")
    return "\n".join(lines)


def _front_matter(info: Mapping[str, Any]) -> str:
    tags = declares(info.get("stages") or [], "tag")
    lines = ["---", "library_name: diffusers", "pipeline_tag: text-to-image"]
    base = _model(info)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base):  # a hub id; a path of this machine means nothing elsewhere
        lines.append(f"base_model: {base}")
    lines += ["tags:", "- text-to-image", "- compressed", *(f"- {tag}" for tag in tags), "---"]
    return "\n".join(lines) + "\n"


def _introduction(info: Mapping[str, Any]) -> str:
    names = [str(stage.get("name", stage.get("kind"))) for stage in info.get("stages") or []]
    base = f"`{_model(info)}`" if _model(info) else "a text-to-image model"
    recipe = info.get("recipe")
    title = f"# {recipe}" if recipe else "# Compressed text-to-image model"
    how = f" by {', '.join(names)}" if names else ""
    by = f" with the recipe `{recipe}`" if recipe else ""
    classes = "diffusers classes and its own model file" if info.get("model_file") else "stock diffusers classes"
    return (
        f"{title}\n\nA pipeline of {classes}, made from {base}{how}{by}. "
        "`compress.json` beside this file holds everything below and more.\n"
    )


def _stages(info: Mapping[str, Any]) -> list[str]:
    parts = []
    for index, stage in enumerate(info.get("stages") or [], 1):
        kind, method = stage.get("kind"), stage.get("method")
        lines = [f"### {index}. {stage.get('name', kind)}: {kind}{f'={method}' if method else ''}", ""]
        coverage = coverage_line(stage.get("coverage") or {})
        if coverage:
            lines += [f"- {coverage}"]
        for name, value in (stage.get("details") or {}).items():
            text = json.dumps(value, ensure_ascii=False, default=str)
            if len(text) <= 120:  # longer ones, such as lists of channels, are in compress.json only
                lines.append(f"- {name.replace('_', ' ')}: {text}")
        config = {key: value for key, value in (stage.get("config") or {}).items() if key not in ("kind", "method")}
        if config:
            lines += [
                "",
                "```yaml",
                *(f"{key}: {json.dumps(value, default=str)}" for key, value in config.items()),
                "```",
            ]
        parts.append("\n".join(lines) + "\n")
    return parts


def coverage_line(coverage: Mapping[str, Any]) -> str:
    """A stage's coverage in a sentence; empty if there is none."""
    shares = [
        f"{100 * coverage[key]:.1f} % of the denoiser's {label}"
        for key, label in (("params", "parameters"), ("macs", "MACs"))
        if isinstance(coverage.get(key), int | float)
    ]
    text = f"touched {' and '.join(shares)}" if shares else ""
    if coverage.get("modules"):
        text += f"{' in' if text else 'touched'} {coverage['modules']} modules"
    skipped = coverage.get("skipped") or {}
    if skipped:
        reasons: dict[str, int] = {}
        for why in skipped.values():
            reasons[str(why)] = reasons.get(str(why), 0) + 1
        text += f"{'; ' if text else ''}left alone: " + ", ".join(f"{n} ({why})" for why, n in reasons.items())
    return text


def _limits(info: Mapping[str, Any], measured: bool) -> str:
    stages = info.get("stages") or []
    tags = declares(stages, "tag")
    lines = ["- It inherits the limits, the biases and the license terms of the model it was made from."]
    if measured:
        lines.append("- The numbers hold for the settings below the table; few images make wide intervals.")
    else:
        lines.append("- The quality of this checkpoint was not measured when this card was written.")
    if "pruned" in tags and "distillation" not in tags:
        lines.append("- It was pruned and not trained afterwards: expect poor images.")
    lines += [f"- {limit}" for limit in declares(stages, "limits")]
    return "\n".join(lines) + "\n"


def _settings(info: Mapping[str, Any]) -> str:
    names = ("recipe", "model", "data", "seed", "precision", "versions", "probe")
    shown = {name: info[name] for name in names if info.get(name) is not None}
    lines = []
    for name, value in shown.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        lines.append(f"- {name}: `{text}`")
    return "\n".join(lines) + "\n" if lines else ""


def _model(info: Mapping[str, Any]) -> str:
    model = info.get("model")
    return str(model.get("path") or "") if isinstance(model, Mapping) else str(model or "")


def _result(info: Mapping[str, Any]) -> dict[str, Any] | None:
    """The evaluations in the report's layout, if there are any."""
    evaluation = info.get("evaluation") or {}
    found = evaluation.get("rows") or []
    if not any(row.get("cost") or row.get("metrics") for row in found):
        return None
    teacher = next((row for row in found if row["name"] == "teacher"), None)
    shared = {name: evaluation[name] for name in ("noise_floor", "manifest") if name in evaluation}
    return {"teacher": teacher, "stages": [row for row in found if row is not teacher], **shared}


def _example(info: Mapping[str, Any]) -> dict[str, Any]:
    """The example's settings; those it does not name are the evaluation's."""
    rows = (info.get("evaluation") or {}).get("rows") or []
    metrics = [m for row in rows for m in (row.get("metrics") or {}).values() if isinstance(m, Mapping)]
    example = {key: metrics[0][key] for key in ("steps", "guidance", "scheduler") if metrics and key in metrics[0]}
    return example | {key: value for key, value in (info.get("example") or {}).items() if value is not None}


def _scheduler(name: str) -> Scheduler:
    """A scheduler named in a recipe or by its class in diffusers."""
    return SCHEDULERS.get(name) or Scheduler(name, name)
