"""The command ``store``: what it lists, what it may remove, and what it finds damaged."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress.run.recipe
from compress.__main__ import main
from compress.evaluate import Evaluation
from compress.store import Store, command, prune
from compress.store.contents import disk_bytes, entries
from compress.store.uses import using

A, B, C, D = (letter * 16 for letter in "abcd")
DAY = 86400


def checkpoint(store: Store, key: str, *parents: str, days: float = 40, weights: bytes = b"weights") -> Path:
    folder = store.path(key)
    (folder / "unet").mkdir(parents=True)
    stages = [{"name": f"stage {k[0]}", "key": k} for k in (*parents, key)]
    (folder / "compress.json").write_text(json.dumps({"recipe": "mine", "stages": stages}))
    (folder / "unet" / "weights.safetensors").write_bytes(weights)
    names = ("compress.json", "unet/weights.safetensors")
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "compress.sha256.json").write_text(json.dumps(hashes))
    return aged(folder, days)


def evaluation(store: Store, key: str, of: dict[str, Any] | None, days: float = 40) -> Path:
    store.work(key)
    store.put_evaluation(key, {"grid": []} | ({"of": of} if of else {}))
    return aged(store.evaluation_folder(key), days)


def aged(path: Path, days: float) -> Path:
    for file in (path, *path.rglob("*")):
        os.utime(file, (file.stat().st_mtime - days * DAY,) * 2)
    return path


def report(folder: Path, *keys: str) -> None:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"recipe": "mine", "stages": [{"key": key} for key in keys]}))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store in ``runs/store``."""
    (tmp_path / "runs" / "store" / "locks").mkdir(parents=True)
    return Store(tmp_path / "runs" / "store")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command line in this process, in the folder above ``runs``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["compress", "store", *arguments])
        return main()

    return call


def removed(store: Store, **options: Any) -> set[str]:
    found, _ = prune.prune(store, 30 * DAY, **options)
    assert all(entry.path.exists() == options.get("dry_run", False) for entry in found)
    return {entry.key for entry in found}


def test_the_list_says_what_is_there_and_what_uses_it(
    store: Store, cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(store, A)
    checkpoint(store, B, A, days=2, weights=bytes(2_000_000))
    evaluation(store, C, {"recipe": "mine", "checkpoint": B, "teacher": D, "what": "stage b"})
    (store.work(D) / "state").write_bytes(b"12345")
    (store.root / "graphs" / A).mkdir(parents=True)
    (store.root / "notes").write_text("the user's own")
    report(tmp_path / "runs" / "mine" / "today", B)
    assert cli() == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "kind key size age recipe what used by"
    assert lines[1].startswith(f"checkpoint {A} ") and lines[1].endswith(f"6 w mine stage a {B}")
    assert lines[2] == f"checkpoint {B} 2 MB 2 d mine stage a › stage b runs/mine/today, {C}"
    assert lines[3].startswith(f"evaluation {C} ") and lines[3].endswith("6 w mine stage b -")
    assert lines[4].startswith(f"work {D} 5 B ") and lines[5].startswith("graphs 1, the newest of 0 B ")
    assert lines[6].startswith("2 MB in runs/store: 2 checkpoints, 1 evaluation, 1 work, 1 graphs")
    assert cli("--json", "store=runs/store") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["key"] for entry in listed] == [A, B, C, D, A]
    assert listed[1]["needs"] == [A] and listed[1]["recipe"] == "mine"


def test_only_what_is_old_and_unused_is_removed(store: Store, tmp_path: Path) -> None:
    checkpoint(store, A)
    checkpoint(store, B, A, days=2)  # young: its parent stays, too
    checkpoint(store, C)
    checkpoint(store, D)
    report(tmp_path / "runs" / "mine" / "point" / "0", D)
    aged(store.work("e" * 16), 40)
    assert removed(store, dry_run=True) == {C, "e" * 16}
    assert removed(store) == {C, "e" * 16}
    assert store.path(D).exists() and store.path(A).exists()
    assert removed(store) == set()
    assert removed(store, keep_used=False) == {D}
    assert not list(store.root.glob(".trash*"))


def test_a_report_far_away_is_known_by_the_runs_record(store: Store, tmp_path: Path) -> None:
    checkpoint(store, A)
    checkpoint(store, B)
    with using(store, tmp_path / "elsewhere", "mine", [A]):
        report(tmp_path / "elsewhere", A)
    with using(store, tmp_path / "failed", "mine", [B]):
        pass
    aged(store.root / "runs", 40)
    assert removed(store) == {B}
    (tmp_path / "elsewhere" / "report.json").unlink()
    assert removed(store) == {A}
    assert list((store.root / "runs").iterdir()) == []


def test_runs_of_other_machines(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (A, B, C):
        checkpoint(store, key)
    monkeypatch.setattr("platform.node", lambda: "another")
    with using(store, tmp_path / "local" / "run", "mine", [A]):
        report(tmp_path / "local" / "run", A)
    with using(store, tmp_path / "runs" / "shared", "mine", [B]):
        report(tmp_path / "runs" / "shared", B)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "local")  # as where its disk is not seen
    shutil.rmtree(tmp_path / "runs" / "shared")  # removed where everybody sees it
    aged(store.root / "runs", 40)
    assert removed(store) == {B, C}
    assert len(list((store.root / "runs").iterdir())) == 1


def test_a_holder_on_another_machine_that_touched_its_lock_long_ago_has_ended(store: Store, tmp_path: Path) -> None:
    checkpoint(store, A)
    with using(store, tmp_path / "out", "mine", [A]):
        record = next((store.root / "runs").iterdir())
        lock = store.lock_file(f"run-{record.stem}")
        kept, text = record.read_bytes(), lock.read_text()
    record.write_bytes(kept)
    lock.write_text(text.replace(platform.node(), "another"))
    assert removed(store) == set(), "it may still be at work"
    aged(lock, 1)
    assert removed(store) == {A} and not record.exists()


def test_evaluations_keep_what_they_were_made_from(store: Store, tmp_path: Path) -> None:
    evaluation(store, A, {"recipe": "mine", "what": "teacher"})
    evaluation(store, B, {"recipe": "mine", "checkpoint": None, "teacher": A}, days=1)
    evaluation(store, C, None)  # of a version that did not say of what
    checkpoint(store, D)
    report(tmp_path / "runs" / "old", D)
    assert removed(store) == set()
    assert removed(store, keep_used=False) == {C, D}


def test_nothing_of_a_running_process_is_removed(store: Store, tmp_path: Path) -> None:
    checkpoint(store, A)
    checkpoint(store, B)
    (store.root / "graphs" / C).mkdir(parents=True)
    (store.root / "graphs" / C / "model.bin").write_bytes(b"graph")
    aged(store.root / "graphs" / C, 40)
    code = (
        "import sys; from pathlib import Path\n"
        "from compress.store import Store; from compress.store.uses import using\n"
        "with using(Store(Path(sys.argv[1])), Path('out'), 'mine', sys.argv[2:]):\n"
        "    print('begun', flush=True); input()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(store.root), A],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert running.stdout is not None and running.stdout.readline() == "begun\n"
    assert removed(store, keep_used=False) == {B}
    assert [entry.active for entry in entries(store)] == [True, True]
    running.kill()  # a crashed run uses nothing any more
    running.wait()
    assert removed(store) == {A, C}


def test_what_a_process_computes_is_not_removed(store: Store) -> None:
    aged(store.work(A), 40)
    half = store.root / f".{B}.0.partial"
    half.mkdir()
    aged(half, 40)
    held, done = threading.Event(), threading.Event()

    def compute() -> None:
        with store.lock(A):
            held.set()
            done.wait(30)

    thread = threading.Thread(target=compute)
    thread.start()
    held.wait(30)
    assert removed(store) == {B}
    assert store.work(A).exists() and not half.exists()
    done.set()
    thread.join()
    aged(store.work(A), 40)
    assert removed(store) == {A}


def test_what_a_finished_checkpoint_left_behind_goes_though_the_checkpoint_stays(store: Store, tmp_path: Path) -> None:
    checkpoint(store, A)
    report(tmp_path / "runs" / "mine" / "point", A)
    half = store.root / f".{A}.0.partial"
    half.mkdir()
    (half / "weights").write_bytes(bytes(700))
    (store.work(A) / "state").write_bytes(bytes(50))
    assert removed(store) == set(), "they are young"
    aged(half, 40)
    aged(store.root / "work", 40)
    with using(store, tmp_path / "runs" / "next", "mine", [A]):
        assert prune.prune(store, 30 * DAY, dry_run=True)[1] == 750
        found, freed = prune.prune(store, 30 * DAY)
    assert (sorted(entry.kind for entry in found), freed) == (["partial", "work"], 750)
    assert store.path(A).is_dir() and not half.exists() and not (store.root / "work" / A).exists()


def test_links_are_not_followed(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    store.path(A).symlink_to(outside)
    (store.root / "work").symlink_to(outside)
    folder = checkpoint(store, B)
    (folder / "more").symlink_to(outside)
    (outside / C).mkdir()
    whole, damaged = prune.verify(store)
    assert (whole, len(damaged)) == (0, 1) and "more is a link" in damaged[0]
    assert removed(store) == {B}
    assert (outside / "precious").exists() and (outside / C).exists() and store.path(A).is_symlink()


def test_freed_bytes_count_a_file_when_its_last_link_goes(store: Store, tmp_path: Path) -> None:
    first = checkpoint(store, A, weights=bytes(1000))
    second = checkpoint(store, B, weights=bytes(1000))
    kept = tmp_path / "kept"
    for other in (second / "unet" / "weights.safetensors", kept):
        other.unlink(missing_ok=True)
        os.link(first / "unet" / "weights.safetensors", other)
    found = entries(store)
    small = sum(
        (folder / name).stat().st_size
        for folder in (first, second)
        for name in ("compress.json", "compress.sha256.json")
    )
    assert disk_bytes(found) == 1000 + small
    assert prune.prune(store, 0, dry_run=True)[1] == small
    kept.unlink()
    assert prune.prune(store, 0)[1] == 1000 + small


def test_verify_names_what_is_damaged(store: Store, cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(store, A)
    evaluation(store, B, {"recipe": "mine"})
    assert cli("verify") == 0
    assert capsys.readouterr().out == "2 of 2 checkpoints and evaluations are whole\n"
    (store.path(A) / "unet" / "weights.safetensors").write_bytes(b"other")
    (store.evaluation_folder(B) / "evaluation.json").unlink()
    assert cli("verify") == 1
    text = capsys.readouterr().out
    assert f"{A}/unet/weights.safetensors is not what was saved" in text
    assert f"{B}/evaluation.json is missing" in text
    assert text.endswith("0 of 2 checkpoints and evaluations are whole\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["store=nowhere"], "store=nowhere: no such folder"),
        (["store=."], "store=.: this is no store"),
        (["prune"], "--older is missing"),
        (["prune", "--older", "30"], "--older=30: expected a number and one of s, m, h, d, w"),
        (["prune", "--older", "-1d"], "--older"),
        (["remove"], "invalid choice: 'remove'"),
        (["--older-than=3d"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_refused(
    store: Store, cli: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    checkpoint(store, A)
    assert cli(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert store.path(A).exists()


def test_the_command_is_light(store: Store) -> None:
    code = (
        "import sys; from compress.store import command; assert command.main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'numpy', 'hydra'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(command.__file__).parents[2])}
    for action in ("list", "verify"):
        arguments = [sys.executable, "-c", code, action, f"store={store.root}"]
        subprocess.run(arguments, env=environment, check=True, capture_output=True)


def test_a_run_keeps_what_it_uses(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, compute = Store(tmp_path / "store"), compress.run.recipe.compute
    within: list[set[str]] = []

    def pruned_meanwhile(*arguments: Any) -> Any:
        within.append({entry.kind for entry in prune.prune(store, 0, keep_used=False)[0]})
        return compute(*arguments)

    def evaluated(*_: Any, **__: Any) -> Evaluation:
        return Evaluation({"params": 1}, {}, {}, [])

    monkeypatch.setattr(compress.run.recipe, "compute", pruned_meanwhile)
    monkeypatch.setattr("compress.run.work.evaluate", evaluated)
    arguments = ["recipe=prune", "+quantize@stages.quantize=int8", f"store={store.root}"]
    arguments += ["prune=magnitude", "stages.prune.ratio=[0,0.5]"]
    monkeypatch.setattr(sys, "argv", ["compress", *arguments, *tiny_overrides, f"out={tmp_path / 'far' / 'run'}"])
    assert main() == 0
    assert within == [set(), set()]
    found = entries(store)
    assert [entry.kind for entry in found if entry.used_by] == ["checkpoint"] * 2 + ["evaluation"] * 3
    assert found[1].what == "prune › quantize" and found[1].recipe == "prune"
    assert {entry.kind for entry in prune.prune(store, 0)[0]} <= {"data", "graphs", "features"}
    result = json.loads((tmp_path / "far" / "run" / "report.json").read_text())
    written = {result["teacher"]["evaluation"], *(stage["evaluation"] for stage in result["stages"])}
    assert written == {entry.key for entry in found if entry.kind == "evaluation"}
    model = store.path(result["stages"][0]["key"])
    again = [f"model.path={model}", "~stages.quantize", "stages.prune.ratio=[0,0.25]"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, *again])
    assert main() == 0 and len(within) == 3
    assert model.exists(), "the model of a run that goes on"
    assert {entry.kind for entry in prune.prune(store, 0, keep_used=False)[0]} >= {"checkpoint", "evaluation"}
    assert not model.exists()
