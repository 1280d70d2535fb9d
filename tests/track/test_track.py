"""Tracking: what an offline run holds, and that nothing W&B does can stop a run."""

import json
import os
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from compress import track
from compress.errors import UserError
from compress.track import TrackConfig, flat
from compress.track import wandb as backend

GRID = [{"prompt": "red heart", "seed": 7, "image": np.full((3, 8, 8), 200, np.uint8)}]
SUMMARY = {"cost": {"params": 10, "macs": None}, "metrics": {"fid": {"value": 3.5, "low": 3.0, "high": 4.0, "n": 64}}}


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """A home without credentials and a current folder that must stay empty."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_X_SERVICE_WAIT", "600")  # these tests also run on machines that are busy
    monkeypatch.setattr(backend, "INIT_SECONDS", 600.0)
    monkeypatch.setattr(backend, "FINISH_SECONDS", 600.0)
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")


def records(file: Path):
    """The records of an offline file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = file.read_bytes(), 7, b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def wait_until_written(file: Path, seconds: float = 60.0):
    """W&B's service, a process of its own, may still be writing a run that has finished."""
    deadline = time.monotonic() + seconds
    while "exit" not in {record.WhichOneof("record_type") for record in records(file)}:
        assert time.monotonic() < deadline, f"{file} is not whole after {seconds:g} s"
        time.sleep(0.1)


def items(update):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}


def offline_run(folder: Path):
    tracker = track.start(TrackConfig("wandb"), "group", folder, {"seed": 3, "out": folder})
    with tracker.stage("distill", "distill", {"steps": 3, "lr": float("nan")}) as run:
        for step in range(3):
            run.log({"loss": 1.0 / (step + 1)}, step)
        run.finish(SUMMARY, GRID)
    more = {"Mean: over seeds": (["point", "FID"], [["ratio=0.5", "3.0 [2.0, 4.0]"]])}
    tracker.report(["stage", "FID"], [["teacher", 3.0], ["distill", float("nan")]], more=more)
    tracker.close()


def test_offline_runs_can_be_read_back(tmp_path, capfd):
    environment = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        offline_run(tmp_path / "run")
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    for file in files:
        wait_until_written(file)
    found = {}
    for file in files:
        for record in records(file):
            if record.WhichOneof("record_type") == "run":
                found[record.run.display_name] = (record.run, file)
    run, file = found["distill"]
    assert (run.run_group, run.job_type, run.project) == ("group", "distill", "compress")
    config = items(run.config.update)
    assert config["seed"] == 3 and config["stage"]["steps"] == 3 and config["stage_name"] == "distill"
    history = [items(record.history.item) for record in records(file) if record.WhichOneof("record_type") == "history"]
    curve = [(point["step"], point["loss"]) for point in history if "loss" in point]
    assert curve == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert ["red heart (seed 7)"] in [point.get("grid/captions") for point in history]
    summary = {}
    for record in records(file):
        if record.WhichOneof("record_type") == "summary":
            summary |= items(record.summary.update)
    assert summary["metrics/fid"] == 3.5 and summary["metrics/fid_low"] == 3.0 and summary["cost/params"] == 10
    run, file = found["report"]
    history = [items(record.history.item) for record in records(file) if record.WhichOneof("record_type") == "history"]
    for table in ("results", "Mean- over seeds"):
        assert "table-file" in [point.get(f"{table}/_type") for point in history]
    # Silent, no code, nothing beside the folder, the environment as before.
    assert capfd.readouterr() == ("", "")
    assert not list((tmp_path / "run").rglob("*.py")) and not list((tmp_path / "run").rglob("*.patch"))
    assert not list((tmp_path / "cwd").iterdir()) and not list((tmp_path / "home").iterdir())
    assert {name for name in os.environ if name.startswith("WANDB_")} <= {"WANDB_SERVICE", *environment}


def run_elsewhere(folder: Path, **environment: str):
    """A tracked run in a process of its own, without standard input."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; from compress import track\n"
        "import compress.track.wandb; compress.track.wandb.INIT_SECONDS = 600.0\n"
        "t = track.start(track.TrackConfig('wandb'), 'g', Path(sys.argv[1]), {})\n"
        "with t.stage('prune', 'prune') as run: run.log({'x': 1.0}, 0)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), str(Path(track.__file__).parents[2])],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def test_no_prompt_without_an_account(tmp_path):
    done = run_elsewhere(tmp_path / "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_account_is_found_without_asking(tmp_path, monkeypatch):
    import wandb

    found = wandb.Settings()
    assert not backend.account_configured(found)
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine example.com login user password x\n")
    netrc.chmod(0o600)
    assert not backend.account_configured(found)
    netrc.write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    assert backend.account_configured(found)
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert backend.account_configured(found)


def run_all(tracker):
    """A run of two stages; returns the warnings it caused."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("prune", "distill"):
            with tracker.stage(name, name) as run:
                run.log({"loss": 1.0}, 0)
                run.finish(SUMMARY, GRID)
        tracker.report(["stage"], [["prune"]])
        tracker.close()
    return [str(entry.message) for entry in caught if entry.category is RuntimeWarning]


def test_failing_init_warns_once_and_goes_on(tmp_path, monkeypatch):
    import wandb

    def fail(**_):
        raise OSError("No space left on device")

    monkeypatch.setattr(wandb, "init", fail)
    caught = run_all(track.start(TrackConfig("wandb", mode="offline"), "g", tmp_path / "run", {}))
    assert len(caught) == 1 and "No space left on device" in caught[0] and "without tracking" in caught[0]


def test_missing_wandb_warns_once_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    caught = run_all(track.start(TrackConfig("wandb"), "g", tmp_path / "run", {}))
    assert len(caught) == 1 and "wandb" in caught[0]


def test_unreachable_server_falls_back_to_offline(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    real = wandb.init

    def init(**arguments):
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return real(**arguments)

    monkeypatch.setattr(wandb, "init", init)
    tracker = track.start(TrackConfig("wandb", mode="online"), "g", tmp_path / "run", {})
    caught = run_all(tracker)
    assert tracker.where.endswith(f"wandb sync {tmp_path}/run/wandb/offline-run-*")
    assert len(caught) == 1 and "no route to host" in caught[0] and "wandb sync" in caught[0]
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 3


def test_the_runs_of_a_grid_share_its_group_and_begin_with_their_point(tmp_path, monkeypatch):
    import wandb

    seen = {}

    def init(**arguments):
        seen.update(arguments)
        raise ValueError("seen")

    monkeypatch.setattr(wandb, "init", init)
    tracker = track.start(TrackConfig("wandb", mode="offline", group="grid"), "own", tmp_path / "ratio=0.5", {})
    assert len(run_all(tracker)) == 1
    assert (seen["group"], seen["name"]) == ("grid", "ratio=0.5: prune")


def test_unwritable_folder_warns_once(tmp_path):
    (tmp_path / "run").write_text("a file")
    caught = run_all(track.start(TrackConfig("wandb"), "g", tmp_path / "run", {}))
    assert len(caught) == 1


@pytest.mark.parametrize("config", [TrackConfig("none"), TrackConfig("wandb", mode="disabled")])
def test_off_writes_nothing(tmp_path, config):
    assert run_all(track.start(config, "g", tmp_path / "run", {})) == []
    assert not (tmp_path / "run").exists()


def test_wandb_mode_disabled_is_obeyed(tmp_path):
    done = run_elsewhere(tmp_path / "run", WANDB_MODE="disabled")
    assert (done.returncode, done.stderr) == (0, "")
    assert not list((tmp_path / "run").rglob("*.wandb"))


def test_a_failing_stage_keeps_its_own_error(tmp_path):
    tracker = track.start(TrackConfig("wandb"), "g", tmp_path / "run", {})
    with pytest.raises(ZeroDivisionError), tracker.stage("prune", "prune"):
        1 / 0  # noqa: B018
    tracker.close()


def test_config_is_checked():
    for keys in ({"backend": "tensorboard"}, {"mode": "on"}, {"project": "a/b"}, {"project": ""}, {"entity": ""}):
        with pytest.raises(UserError, match=next(iter(keys))):
            TrackConfig(**{"backend": "wandb"} | keys)
    with pytest.raises(UserError, match=r"track\.mode=online"):
        track.check(TrackConfig("wandb", mode="online"))
    track.check(TrackConfig("wandb"))


def test_flat_summary():
    assert flat(SUMMARY) == {
        "cost/params": 10,
        "metrics/fid": 3.5,
        "metrics/fid_low": 3.0,
        "metrics/fid_high": 4.0,
        "metrics/fid_n": 64,
    }
