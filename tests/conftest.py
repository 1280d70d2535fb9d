"""What all tests share: no network, no account, and a tiny model with data on disk."""

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
# Tests import the modules beside them and tiny.py by their plain names, wherever pytest is started.
FOLDERS = sorted({str(file.parent) for file in TESTS.rglob("*.py")})
sys.path[:0] = [str(TESTS.parent), *FOLDERS]
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes share the cores; tiny models gain nothing from more threads


# The longest tests begin first, so that at the end no process computes one alone.
LONGEST = ("test_notebooks.py", "test_two_processes.py", "test_cli.py", "test_site.py", "test_architectures.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the files with the longest tests to the front."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Leaves torch with as many threads as it had: sums are rounded otherwise with another number."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    yield
    if torch and threads != torch.get_num_threads():
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_memory_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares every cost the process that measures peak memory, seconds each, but in tests marked ``peak_memory``."""
    if request.node.get_closest_marker("peak_memory") is None:
        made_up = {"peak_memory_bytes": 1, "method": "none"}
        monkeypatch.setattr("compress.evaluate.cost.peak_memory", lambda *_: dict(made_up))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Runs code in a Python without compress, see :class:`stranger.Stranger`."""
    from stranger import Stranger

    found = Stranger(tmp_path_factory.mktemp("stranger"), dict(os.environ))
    yield found
    found.leave()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline of random weights, for tests that only read it."""
    from tiny import tiny_pipeline

    folder = tmp_path_factory.mktemp("model") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images of 16 px with captions, 12 of them in the split ``train``."""
    import datasets
    import numpy as np
    from PIL import Image

    def image(seed: int) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(stream, "PNG")
        return stream.getvalue()

    rows = {
        "image": [{"bytes": image(i), "path": None} for i in range(16)],
        "text": [f"a {('cat', 'dog', 'tree', 'sun')[i % 4]} in flat style" for i in range(16)],
        "split": ["held_out" if i % 4 == 3 else "train" for i in range(16)],
    }
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "split": datasets.Value("string")}
    file = tmp_path_factory.mktemp("data") / "tiny.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)
    return file


@pytest.fixture(scope="session")
def tiny_overrides(tiny_model: Path, tiny_parquet: Path) -> list[str]:
    """Overrides that make any recipe a matter of seconds: tiny model and data, cost only, nothing tracked."""
    return [
        f"model.path={tiny_model}",
        f"data.path={tiny_parquet}",
        "data.reference=null",
        "evaluate=cost",
        "evaluate.latency_repeats=1",
        "track=none",
        "device=cpu",
        "engine=null",
    ]
