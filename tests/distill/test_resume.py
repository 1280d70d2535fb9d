"""A training that was stopped, killed or split ends like one that was left alone."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.errors import UserError
from tests.distill.worker import CONFIG, distilled

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")  # as the worker
WORKER = [str(Path(__file__).with_name("worker.py"))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, one_thread):
    """Weights and report of a training that nothing stopped."""
    pipeline, report = distilled(tmp_path_factory.mktemp("undisturbed"))
    return pipeline.unet.state_dict(), report


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def launch(command: list[str]) -> subprocess.CompletedProcess:
    """Runs Python with the project importable."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900)


def test_killed_training_continues_to_the_same_bits(tmp_path, undisturbed):
    def kill(metrics: dict[str, float], step: int) -> None:
        if step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        distilled(tmp_path / "work", log=kill)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    states = sorted(f.name for f in (tmp_path / "work").glob("state-*"))
    assert states == ["state-00000003.safetensors", "state-00000006.safetensors"]

    logged = []
    pipeline, report = distilled(tmp_path / "work", log=lambda metrics, step: logged.append(step))
    weights, expected = undisturbed
    assert same(pipeline.unet.state_dict(), weights)
    assert report == expected
    assert logged == [2, 4, 6, 8, 10]  # a tracker that starts anew sees the whole curve


def test_finished_training_is_read_back(tmp_path, undisturbed):
    distilled(tmp_path)
    pipeline, report = distilled(tmp_path)
    assert same(pipeline.unet.state_dict(), undisturbed[0])
    assert report == undisturbed[1]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_state_is_passed_over(tmp_path, undisturbed, damage):
    distilled(tmp_path)
    newest = max(tmp_path.glob("state-*.safetensors"))
    data = bytearray(newest.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    else:
        data[-100] ^= 1
    newest.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="state-00000010.safetensors is damaged"):
        pipeline, _ = distilled(tmp_path)
    assert same(pipeline.unet.state_dict(), undisturbed[0])


def test_damaged_examples_are_encoded_again(tmp_path, undisturbed):
    file = tmp_path / "examples.safetensors"
    file.write_bytes(b"not a tensor in sight")
    with pytest.warns(RuntimeWarning, match="examples.safetensors is damaged"):
        pipeline, _ = distilled(tmp_path)
    assert same(pipeline.unet.state_dict(), undisturbed[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_the_state_first(tmp_path, undisturbed, number):
    def interrupt(metrics: dict[str, float], step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        distilled(tmp_path, log=interrupt)
    assert signal.getsignal(number) is handler
    # The signal arrives while step 4 is being logged, so that step's end or the next one's is where it stops.
    assert max(tmp_path.glob("state-*")).name in ("state-00000004.safetensors", "state-00000005.safetensors")
    pipeline, report = distilled(tmp_path)
    assert same(pipeline.unet.state_dict(), undisturbed[0])
    assert report == undisturbed[1]


def test_error_in_the_middle_leaves_a_state(tmp_path, undisturbed):
    def fail(metrics: dict[str, float], step: int) -> None:
        if step == 8:
            raise RuntimeError("tracker")

    with pytest.raises(RuntimeError, match="tracker"):
        distilled(tmp_path, log=fail)
    pipeline, _ = distilled(tmp_path)
    assert same(pipeline.unet.state_dict(), undisturbed[0])


def test_state_of_another_training_is_refused(tmp_path):
    distilled(tmp_path)
    with pytest.raises(UserError, match="more than 4 steps"):
        distilled(tmp_path, replace(CONFIG, steps=4))
    with pytest.raises(UserError, match="another student"):
        distilled(tmp_path, history=[])  # one projection more


def test_unwritable_folder_is_reported(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        distilled(file / "work")


def test_parts_of_a_batch_give_the_same(tmp_path, undisturbed):
    pipeline, _ = distilled(tmp_path, replace(CONFIG, gradient_accumulation=2))
    for name, weight in pipeline.unet.state_dict().items():
        torch.testing.assert_close(weight, undisturbed[0][name], atol=3e-5, rtol=1e-3)


def two_processes(*command: str, options: tuple[str, ...] = ("--multi_gpu",)) -> subprocess.CompletedProcess:
    """Runs the worker twice at once."""
    # Without --multi_gpu, `accelerate launch` starts a single process where there is no GPU.
    launcher = ["-m", "accelerate.commands.launch", *options, "--num_processes", "2", "--num_machines", "1"]
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    return launch([*launcher, *options, *WORKER, *command])


def check_same_training(folder: Path, undisturbed) -> None:
    """Checks that two processes ended alike and as one does."""
    first, second = (load_file(folder / f"weights.{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    assert first.keys() == undisturbed[0].keys()
    for name, weight in first.items():
        torch.testing.assert_close(weight, undisturbed[0][name], atol=3e-5, rtol=1e-3)
    curves = json.loads((folder / "weights.0.json").read_text())
    for name, curve in undisturbed[1].curves.items():
        assert [value for _, value in curves[name]] == pytest.approx([value for _, value in curve], abs=1e-5)


@pytest.mark.slow
def test_two_sharded_processes_give_the_same_and_continue(tmp_path, undisturbed):
    config = ("--config_file", str(ROOT / "conf" / "accelerate" / "fsdp.yaml"))
    work, out = str(tmp_path / "work"), str(tmp_path / "weights")
    done = two_processes(work, out, options=config)
    assert done.returncode == 0, done.stderr
    check_same_training(tmp_path, undisturbed)
    (tmp_path / "work" / "state-00000010.safetensors").unlink()
    assert two_processes(work, out, options=config).returncode == 0  # continues from step 9
    check_same_training(tmp_path, undisturbed)
    (tmp_path / "work" / "state-00000010.safetensors").unlink()
    pipeline, _ = distilled(tmp_path / "work")  # whole states: one process continues them
    for name, weight in pipeline.unet.state_dict().items():
        torch.testing.assert_close(weight, undisturbed[0][name], atol=3e-5, rtol=1e-3)


@pytest.mark.slow
def test_process_that_dies_ends_the_others_with_a_message(tmp_path):
    done = two_processes(str(tmp_path / "work"), str(tmp_path / "weights"), "--kill-second-at", "7")
    assert done.returncode not in (0, None)
    assert "another process of the training ended" in done.stderr
    assert "continue after step 7" in done.stderr
    assert (tmp_path / "work" / "state-00000007.safetensors").exists()
