"""``recipe=mixed_bits``: a run whose last stage chooses bits layer by layer; writes the assignment and a plot."""

import json
from typing import TYPE_CHECKING, Any

from compress.errors import UserError
from compress.system.files import replace_with, write_text

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run_job(cfg: "DictConfig") -> None:
    """Runs the recipe; writes ``layers.json``, ``sensitivity.json`` and ``mixed_bits.png`` beside its report.

    Raises:
        UserError: The user made a mistake; raised before a weight is loaded where possible.
    """
    from rich.console import Console

    from compress.jobs.mixed_bits.figure import draw_sizes
    from compress.quantize.mixed_bits import Config
    from compress.run.config import to_run_config
    from compress.run.recipe import run_recipe
    from compress.store.checkpoint import read_info

    config = to_run_config(cfg)
    if not isinstance(config.stages[-1].config, Config):
        raise UserError("stages: job=mixed_bits needs quantize=mixed_bits as its last stage")
    if "checkpoint" not in run_recipe(config):  # another process than the first, or it ended early
        return
    details = read_info(config.out / "checkpoint")["stages"][-1]["details"]
    write_text(config.out / "layers.json", json.dumps(details["layers"], indent=1) + "\n")
    write_text(config.out / "sensitivity.json", json.dumps(_about(details), indent=1) + "\n")
    with replace_with(config.out / "mixed_bits.png") as file:
        draw_sizes(details, file)
    console = Console()
    console.print(
        f"{details['bits']:.2f} bits a weight: PSNR of the prediction {details['psnr']:.1f} dB "
        f"({details['predicted_psnr']:.1f} dB predicted); one number of bits for all: "
        + ", ".join(f"{row['bits']:.2f} bits {row['psnr']:.1f} dB" for row in details["uniform"]),
        soft_wrap=True,
    )
    console.print(f"  quantize=int4 stages.quantize.layers={config.out / 'layers.json'}", markup=False, soft_wrap=True)
    console.print(f"  {config.out / 'mixed_bits.png'}  {config.out / 'sensitivity.json'}", markup=False, soft_wrap=True)


def _about(details: dict[str, Any]) -> dict[str, Any]:
    return {key: details[key] for key in ("sensitivity", "curve", "uniform", "bits", "psnr", "predicted_psnr")}
