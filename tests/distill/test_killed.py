"""Every training that is killed five times at random ends with the weights of an undisturbed one."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import compress
from tests.distill.worker import images
from tests.tiny import tiny_pipeline

KEYS = {"steps": 60, "batch_size": 4, "save_every": 2, "log_every": 10}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
METHODS = {
    "features": {},
    "guidance": {},
    "lcm": {"guidance": [2.0, 8.0]},
    "dmd": {"inference_steps": 2},
    "decoder": {"width": 8, "blocks": 1, "held_out": 1},
}


def weights(method: str, folder: Path) -> dict[str, torch.Tensor]:
    """Of the part that a method trains, after its training in a folder."""
    data = images(count=12, size=16)
    student = tiny_pipeline(seed=1, widths=(16, 32))
    keys = KEYS | METHODS[method]
    trained, _ = compress.distill(student, method, teacher=tiny_pipeline(), data=data, folder=folder, **keys)
    return (trained.vae if method == "decoder" else trained.unet).state_dict()


def newest(folder: Path) -> str:
    """Name of the last training state; empty if there is none."""
    return max((file.name for file in folder.glob("state-*.safetensors")), default="")


def killed(method: str, folder: Path, seconds: float) -> None:
    """Trains in another process and kills it some seconds after it has saved a further state."""
    before = newest(folder)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        weights(method, folder)
        os._exit(0)
    while newest(folder) == before:
        time.sleep(0.005)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it was done before it was killed"


@pytest.mark.parametrize("method", METHODS)
def test_five_kills_change_no_bit(method, tmp_path):
    expected = weights(method, tmp_path / "undisturbed")
    source = random.Random(method)
    for _ in range(5):
        killed(method, tmp_path / "killed", source.uniform(0, 0.1))
    found = weights(method, tmp_path / "killed")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
