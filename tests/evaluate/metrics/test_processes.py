"""Order, batch size and number of processes change no metric, nor its interval, beyond rounding."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.evaluate.metrics.worker import results

ROOT = Path(__file__).parents[3]


def flat(found: dict, path: str = "") -> dict:
    """Nested results as one level."""
    items = {}
    for key, value in found.items():
        items |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return items


@pytest.fixture(scope="module")
def alone() -> dict:
    return flat(results(0, 1, 40, torch.arange(40), 0))


def same(found: dict, alone: dict) -> None:
    assert found.keys() == alone.keys()
    for key, value in alone.items():
        assert found[key] == (
            value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-9)
        ), key


def test_order_and_batch_size(alone):
    for batch, seed in ((7, 1), (1, 2)):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        same(flat(results(0, 1, batch, order, 0)), alone)


def test_two_processes(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(tmp_path / "found")]
    workers = [
        subprocess.Popen(command, env={**os.environ, **settings, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    for rank in range(2):
        for found in json.loads((tmp_path / f"found.{rank}").read_text()):
            same(flat(found), alone)
