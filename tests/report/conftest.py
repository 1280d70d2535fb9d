"""A report with all that a run leaves, for every test of what is made of it."""

from pathlib import Path

import pytest
import torch
from made import PROMPTS, entry


@pytest.fixture
def result():
    floor = entry(0, 0, 0.0, 119.0, 9.0)["metrics"]
    for found in floor.values():
        found["seed"] = 2**31
    stages = [
        ("prune", "prune", True, entry(6_800_000, 27_200_000, 0.0081, 427.0, 5.1)),
        ("distill", "distill", False, entry(6_800_000, 27_200_000, 0.0070, 153.2, 14.61)),
        ("quantize", "quantize", False, entry(6_800_000, 7_100_000, 0.0094, 155.1, 14.58)),
    ]
    return {
        "recipe": "prune_distill_int8",
        "seconds": 431.2,
        "teacher": entry(11_530_000, 46_200_000, 0.0123, 117.2, None),
        "noise_floor": {"metrics": floor},
        "manifest": {"protocol": "quick", "version": 1, "changed": ["steps"]},
        "stages": [
            {
                "name": name, "kind": kind, "method": "method", "key": "0123456789abcdef", "cached": cached,
                "seconds": 12.3, "checkpoint": Path("runs/store/0123"),
                "coverage": {"params": 0.41, "macs": 0.43, "modules": 57, "skipped": {"conv_in": "first layer"}},
                "curves": {"loss": [[i, 1 / (i + 1)] for i in range(100)]} if kind == "distill" else {}, **numbers,
            }
            for name, kind, cached, numbers in stages
        ],
    }  # fmt: skip


@pytest.fixture
def grids():
    generator = torch.Generator().manual_seed(0)
    return {
        row: [
            {
                "prompt": prompt,
                "seed": i,
                "image": torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=generator),
            }
            for i, prompt in enumerate(PROMPTS)
        ]
        for row in ("teacher", "prune", "distill", "quantize")
    }
