"""Entries of a report: costs and metrics as a run measures them; and the files of a run, without its plots."""

import json

from PIL import Image

from compress.report import plain

HASH = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
SETTINGS = {
    "n": 256, "resolution": "64x64", "scheduler": "dpmsolver++", "steps": 20, "guidance": 4.0, "dtype": "float32",
    "seed": 0, "interval": 0.95, "blank": 0,
}  # fmt: skip
PROMPTS = ["red heart, fluent emoji", "a very long prompt that goes on and on about a house on a hill", "tent"]


def metric(value, half, network=None, **more):
    return {
        "value": value, "low": value - half, "high": value + half, **SETTINGS,
        "network": network, "network_sha256": HASH if network else None, **more,
    }  # fmt: skip


def entry(params, size, latency, fid, psnr):
    cost = {
        "params": params, "macs": 35 * params, "bytes": size, "latency_s": latency, "peak_memory_bytes": 3 * size,
        "latency_low_s": 0.99 * latency, "latency_high_s": 1.01 * latency,
        "settings": {"of": "unet", "batch": 1, "sample": [4, 16, 16], "device": "cpu", "threads": 2},
    }  # fmt: skip
    metrics = {
        "fid": metric(fid, 5.0, "inception-2015-12-05", n_reference=1000, infinite=0.9 * fid),
        "kid": metric(fid / 2500, 0.004, "inception-2015-12-05"),
        "clip_score": metric(30 - fid / 40, 0.3, "emoji-clip"),
        "r_at_1": metric(0.25, 0.03, "emoji-clip", among=250),
        "psnr": metric(psnr, 0.4, equal=0, cap=100.0) if psnr else None,
        "ssim": metric(psnr / 30, 0.01) if psnr else None,
        "latent_psnr": metric(2 * psnr, 0.5, n=64) if psnr else None,
    }
    return {"cost": cost, "metrics": metrics}


def write_run(folder, result, grids):
    """What :func:`compress.report.write_report` writes that a page is made of; returns the report."""
    found = plain(
        {"checkpoint": folder / "checkpoint"}
        | result
        | {"grid": [{"prompt": prompt, "seed": i} for i, prompt in enumerate(PROMPTS)]}
    )
    for name, grid in grids.items():
        (folder / "images" / name).mkdir(parents=True)
        for index, cell in enumerate(grid):
            pixels = cell["image"].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / "images" / name / f"{index}.png")
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(found))
    return found
