import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from compress.errors import UserError
from compress.store import Store
from compress.store.checkpoint import save_checkpoint

EVALUATION = {"cost": {"params": 3}, "metrics": {}}


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def stored(store: Store, key: str = "k", keep_images: bool = True) -> None:
    place = store.work(key) / "images"
    place.mkdir()
    for index, image in enumerate(images(4)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"sample-{index:06d}.png")
    cells = [{"prompt": "a cat", "seed": 3, "image": "images/sample-000001.png"}]
    store.put_evaluation(key, {**EVALUATION, "images": "images", "grid": cells}, keep_images=keep_images)


def test_the_key_does_not_depend_on_order_and_changes_with_every_value() -> None:
    key = Store.key({"a": 1, "b": [0.5, None]})
    assert key == Store.key({"b": [0.5, None], "a": 1})
    assert len(key) == 16
    assert len({key, Store.key({"a": 2, "b": [0.5, None]}), Store.key({"a": 1, "b": [0.5]})}) == 3


def test_a_checkpoint_is_found_until_it_is_damaged(tmp_path: Path) -> None:
    from tiny import tiny_pipeline

    store = Store(tmp_path / "store")
    assert store.find("k") is None
    save_checkpoint(tiny_pipeline(widths=(16, 16)), store.path("k"), {"stages": []})
    assert store.find("k") == tmp_path / "store" / "k"
    weights = store.path("k") / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=rf"{weights}.*delete"):
        Store(tmp_path / "store").find("k")


def test_an_evaluation_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.evaluation("k") is None
    stored(store)
    found = store.evaluation("k")
    assert found is not None
    assert {name: found[name] for name in EVALUATION} == EVALUATION
    assert found["grid"][0]["seed"] == 3
    assert torch.equal(found["grid"][0]["image"], images(4)[1])
    assert len(list((store.evaluation_folder("k") / "images").iterdir())) == 4
    assert not (tmp_path / "work" / "k").exists()


@pytest.mark.parametrize("links", [True, False])
def test_images_are_adopted_from_an_evaluation_that_has_them(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError("Operation not permitted")

    if not links:
        monkeypatch.setattr("os.link", no_links)
    store = Store(tmp_path)
    stored(store)
    folder = store.evaluation_folder("k")
    store.adopt("other", "new")
    assert not (tmp_path / "work" / "new").exists()
    assert not (tmp_path / "locks").exists(), "the lock of an evaluation without them is not taken"
    (store.work("new") / "images").mkdir()
    (store.work("new") / "images" / "sample-000002.png").write_bytes(b"sampled before")
    store.adopt("images", "new")
    found = sorted((store.work("new") / "images").iterdir())
    assert [file.name for file in found] == [f"sample-{index:06d}.png" for index in range(4)]
    assert found[0].read_bytes() == (folder / "images" / "sample-000000.png").read_bytes()
    assert found[2].read_bytes() == b"sampled before"
    assert found[0].samefile(folder / "images" / "sample-000000.png") == links
    (folder / "images" / "sample-000001.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"sample-000001\.png is damaged"):
        Store(tmp_path).adopt("images", "newer")


def test_sampled_images_are_deleted_once_the_evaluation_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    store = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.rename", killed)
        with pytest.raises(KeyboardInterrupt):
            stored(store, keep_images=False)
    assert len(list((store.work("k") / "images").glob("sample-*.png"))) == 4  # nothing is lost before
    shutil.rmtree(store.work("k"))
    stored(store, keep_images=False)
    found = Store(tmp_path).evaluation("k")
    assert found is not None and torch.equal(found["grid"][0]["image"], images(4)[1])
    kept = [file.name for file in (store.evaluation_folder("k") / "images").iterdir()]
    assert kept == ["sample-000001.png"]  # the grid's
    stored(store, "l", keep_images=True)
    store.adopt("images", "new")
    assert len(list((store.work("new") / "images").iterdir())) == 4


def test_what_a_killed_process_was_writing_is_no_part_of_an_evaluation(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.work("k") / ".half.png").write_bytes(b"half")
    store.put_evaluation("k", {**EVALUATION, "grid": []})
    assert store.evaluation("k") == {**EVALUATION, "grid": []}
    assert sorted(file.name for file in store.evaluation_folder("k").iterdir()) == ["evaluation.json", "sha256.json"]


@pytest.mark.parametrize("name", ["evaluation.json", "sha256.json", "images/sample-000002.png"])
def test_a_damaged_evaluation_is_named(tmp_path: Path, name: str) -> None:
    stored(Store(tmp_path))
    file = tmp_path / "evaluations" / "k" / name
    file.write_bytes(file.read_bytes()[:-9] + b"x")
    with pytest.raises(UserError, match=rf"{file}.*delete {tmp_path / 'evaluations' / 'k'}"):
        Store(tmp_path).evaluation("k")


def test_a_failed_write_leaves_no_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.store.file_hash", full)
    store = Store(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        stored(store)
    assert list((tmp_path / "evaluations").iterdir()) == []
    assert len(list((store.work("k") / "images").iterdir())) == 4  # what was sampled is kept


def test_training_states_stay_until_they_are_finished(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.work("k") / "state").write_text("1")
    assert (store.work("k") / "state").exists()
    store.finish("k")
    assert not (tmp_path / "work" / "k").exists()
    store.finish("k")


def test_who_holds_the_lock_removes_what_a_crashed_run_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / ".k.123.partial").mkdir()
    other = tmp_path / ".other.123.partial"
    other.mkdir()
    with store.lock("k"):
        assert [path.name for path in tmp_path.glob(".*")] == [other.name]


def test_the_lock_keeps_others_out_and_says_that_they_wait(tmp_path: Path) -> None:
    order: list[str] = []
    waiting = threading.Event()

    def other() -> None:
        with Store(tmp_path).lock("k", waiting.set):
            order.append("other")

    thread = threading.Thread(target=other)
    with Store(tmp_path).lock("k"):
        thread.start()
        assert waiting.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "other"]


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from compress.store import Store\n"
        "with Store(Path(sys.argv[1])).lock('k'): os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, timeout=60, check=False)
    assert done.returncode == -9
    with Store(tmp_path).lock("k", lambda: pytest.fail("the lock is still held")):
        pass


def test_the_lock_of_a_holder_that_shows_no_life_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another machine, where nobody can see whether it has ended: here it is stopped, and exists."""
    monkeypatch.setattr("compress.system.leases.LEASE", 2.0)
    code = (
        "import os, signal, sys; from pathlib import Path; import compress.store, compress.system.leases\n"
        "compress.system.leases.LEASE = 2.0\n"
        "with compress.store.Store(Path(sys.argv[1])).lock('k'): os.kill(os.getpid(), signal.SIGSTOP)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    try:
        os.waitpid(holder.pid, os.WUNTRACED)
        waited: list[bool] = []
        with Store(tmp_path).lock("k", lambda: waited.append(True)):
            assert waited == [True]
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_of_a_machine_that_failed_while_taking_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("compress.system.leases.LEASE", 0.3)
    store = Store(tmp_path)
    store.lock_file("k").parent.mkdir()
    store.lock_file("k").touch()
    waited: list[bool] = []
    with store.lock("k", lambda: waited.append(True)):
        assert waited == [True] and store.lock_file("k").stat().st_size
