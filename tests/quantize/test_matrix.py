"""Every option of conf/quantize on every architecture: saved, loaded in a new process, compared bit for bit.

The table of docs/quantization.md is what this finds. ``WRITE_TABLE=1 python -m pytest -m slow -n0
tests/quantize/test_matrix.py`` writes it.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import digest, in_a_new_process
from pipelines import PIPELINES

from compress.config.compose import option
from compress.errors import UserError
from compress.models import denoiser
from compress.models.inputs import captured_inputs
from compress.run.config import StageConfig, stage_config
from compress.stage import StageContext
from compress.store.checkpoint import save_checkpoint

ROOT = Path(__file__).parent.parent.parent
DOC = ROOT / "docs" / "quantization.md"
START, END = "<!-- table: tests/quantize/test_matrix.py -->\n", "<!-- end of the table -->\n"
NAMES = sorted(file.stem for file in (ROOT / "conf" / "quantize").glob("*.yaml"))
# Those that train store what the others store.
OPTIONS = [name for name in NAMES if not option("quantize", name)["method"].startswith("qat")]
ARCHITECTURES = {"UNet": "sd 1.x", "SDXL UNet": "sdxl", "PixArt": "pixart", "SD3": "sd3", "Flux": "flux"}
SIZE = {"flux": {"height": 32, "width": 32}}  # Flux draws 128 x 128 latents where no size is given
LOADS = {
    "stock": "diffusers",
    "own code": "diffusers, `trust_remote_code=True`",
    "compress": "`import compress`, diffusers",
}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the table is of a machine without a GPU")


def stage_of(name: str) -> StageConfig:
    """The stage of an option; what calibrates looks at one image."""
    values = option("quantize", name)
    if "calibration" in values:
        values["calibration"] = {**values["calibration"], "examples": 1, "steps": 2, "side": 64}
    return stage_config("quantize", values, "quantize")


def quantized(stage: StageConfig, name: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Saves a pipeline; returns the stage's report and the digest of the denoiser."""
    pipeline: Any = PIPELINES[name]()
    if check := getattr(stage.module, "check", None):
        check(stage.config, denoiser(pipeline), None)
    artifact = folder.with_suffix(".artifact") if stage.declared.leaves == "artifact" else None
    if artifact is not None:
        artifact.mkdir()
    data: Any = type("Captions", (), {"text": ["a cat", "a dog"]})
    context = StageContext(
        load_teacher=PIPELINES[name], data=data, folder=folder, history=[], seed=0, device=torch.device("cpu"),
        dtype=torch.float32, log=lambda metrics, step: None, artifact=artifact,
    )  # fmt: skip
    report = stage.module.run(pipeline, stage.config, context)
    info = {"stages": [{"declared": stage.declared.declared()}]}
    save_checkpoint(pipeline, folder, info, exact=stage.declared.exact, artifact=artifact)
    inputs = captured_inputs(pipeline, **SIZE.get(name, {}))
    torch.save(inputs, folder.with_suffix(".pt"))
    return {**report.coverage, **report.details}, digest(denoiser(pipeline), inputs)


def rows(options: list[str], root: Path) -> tuple[dict[str, str], dict[str, None]]:
    """The table's row of each option, and the reasons named in them, in order."""
    made: dict[Path, tuple[dict[str, Any], str]] = {}
    refused: dict[Path, str] = {}
    for name in options:
        stage = stage_of(name)
        for tiny in ARCHITECTURES.values():
            folder = root / f"{name}-{tiny.replace(' ', '-').replace('.', '_')}"
            try:
                made[folder] = quantized(stage, tiny, folder)
            except UserError as error:
                refused[folder] = str(error).removeprefix(f"method={stage.method}: ")
    found = in_a_new_process(list(made), root / "stock.json")
    unread = [folder for folder in made if "error" in found[str(folder)]]
    later = in_a_new_process(unread, root / "compress.json", "compress")
    found |= {folder: {"compress": next(iter(ways.values()))} for folder, ways in later.items()}

    table, reasons = {}, dict.fromkeys(refused.values())
    numbers = {reason: index for index, reason in enumerate(reasons, 1)}
    for name in options:
        stage, cells, ways = stage_of(name), [], set()
        for tiny in ARCHITECTURES.values():
            folder = root / f"{name}-{tiny.replace(' ', '-').replace('.', '_')}"
            if folder in refused:
                cells.append(f"no ({numbers[refused[folder]]})")
                continue
            report, expected = made[folder]
            ((way, seen),) = found[str(folder)].items()
            assert seen == expected, f"{name} on {tiny}: {way} gives {seen}"
            cells.append(f"{100 * report['params']:.0f} %")
            ways.add("diffusers, `from_single_file`" if (folder / "artifact").is_dir() else LOADS[way])
        packages = "".join(f", {package}" for package in stage.declared.libraries)
        table[name] = (
            f"| `{name}` | {' | '.join(cells)} | {'; '.join(sorted(ways)) or 'no'}{packages if ways else ''} |"
        )
    return table, reasons


def installed(name: str) -> bool:
    try:
        stage_of(name).declared.check_installed(name)
    except UserError:
        return False
    return True


@pytest.mark.slow
def test_the_table_of_the_document_is_what_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")  # of many tiny layers it takes minutes
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    found, reasons = rows([name for name in OPTIONS if installed(name)], tmp_path)
    head = ["| option | " + " | ".join(ARCHITECTURES) + " | loads in |", "|---" * (len(ARCHITECTURES) + 2) + "|"]
    notes = ["", *(f"({index}) {reason}." for index, reason in enumerate(reasons, 1))]
    before, _, rest = DOC.read_text().partition(START)
    table, _, after = rest.partition(END)
    if os.environ.get("WRITE_TABLE"):
        assert found.keys() == set(OPTIONS), "install all extras before the table is written"
        DOC.write_text(before + START + "\n".join([*head, *found.values(), *notes]) + "\n" + END + after)
        return
    lines = table.splitlines()
    assert [line for line in found.values() if line not in lines] == []
    assert all(f"`{name}`" in table for name in OPTIONS), "WRITE_TABLE=1 writes a table with the new options"
