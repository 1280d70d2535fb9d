"""Publishing a checkpoint, and logging it as an artifact: what is given away, and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_pipeline

from compress import track
from compress.__main__ import main
from compress.config.compose import compose
from compress.errors import UserError
from compress.evaluate import Evaluation
from compress.run.config import to_run_config
from compress.store.checkpoint import save_checkpoint, verify_shared
from compress.track import TrackConfig, hub

ACCOUNT = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}


class FakeApi:
    """The Hub: an account, and what was called; ``upload_folder`` keeps the names of the files."""

    account: dict[str, Any] = ACCOUNT
    calls: list[tuple[str, Any]] = []

    def whoami(self) -> dict[str, Any]:
        self.calls.append(("whoami", None))
        return self.account

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append(("create_repo", name))

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
        names = {file.relative_to(folder_path).as_posix() for file in folder_path.rglob("*") if file.is_file()}
        self.calls.append(("upload_folder", (repo_id, names, (folder_path / "README.md").read_text())))
        return SimpleNamespace(oid="0123abcd")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    """A Hub with a token that may write."""
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr(FakeApi, "account", ACCOUNT)
    monkeypatch.setattr(FakeApi, "calls", [])
    return FakeApi


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a card."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_checkpoint(tiny_pipeline(widths=(16, 16)), folder, {"stages": []}, card="# A card\n")
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy of it with one file changed."""
    folder = Path(shutil.copytree(saved, tmp_path / "damaged"))
    (folder / "unet" / "config.json").write_text("{}")
    return folder


def test_a_run_publishes_its_checkpoint_with_its_card(
    api: type[FakeApi], tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("compress.run.work.evaluate", lambda *_, **__: Evaluation({"params": 1}, {}, {}, []))
    arguments = ["recipe=int8", "publish=lab/small", f"out={tmp_path / 'out'}", f"store={tmp_path / 'store'}"]
    monkeypatch.setattr(sys, "argv", ["compress", *arguments, *tiny_overrides])
    assert main() == 0
    assert [name for name, _ in api.calls] == ["whoami", "create_repo", "upload_folder"]
    repository, names, card = api.calls[-1][1]
    folder = tmp_path / "out" / "checkpoint"
    assert repository == "lab/small"
    assert names == {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert {"README.md", "compress.json", "compress.sha256.json", "model_index.json"} <= names
    assert "## What it cost" in card
    url = "https://huggingface.co/lab/small/tree/0123abcd"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["published"]["url"] == url
    assert url in capsys.readouterr().out


def test_what_was_not_verified_is_not_given_away(
    api: type[FakeApi], saved: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_shared(saved)
    with pytest.raises(UserError, match=r"unet/config\.json is not what was saved"):
        hub.publish(damaged, "me/small")
    tracker = track.start(TrackConfig("wandb", mode="offline"), "group", tmp_path / "run", {})
    with pytest.raises(UserError, match=r"unet/config\.json is not what was saved"):
        tracker.artifact("mine", damaged, {})
    tracker.close()
    monkeypatch.setattr("compress.store.checkpoint.verify_checkpoint", lambda _: None)
    info = json.loads((damaged / "compress.json").read_text())
    del info["probe"]
    (damaged / "compress.json").write_text(json.dumps(info))
    (damaged / "README.md").unlink()
    with pytest.raises(UserError, match=r"no model card .* and no result of a read-back"):
        hub.publish(damaged, "me/small")
    assert api.calls == [] and not (tmp_path / "run").exists()


def test_an_upload_that_fails_says_what_to_do(api: type[FakeApi], saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(api, "upload_folder", fail)
    with pytest.raises(UserError, match=r"publish=me/small: the upload failed \(no route to host\).*run the same"):
        hub.publish(saved, "me/small")


@pytest.mark.parametrize("name", ["small", "a/b/c", "lab/", "lab/-x", "lab/x y", "lab/x--y"])
def test_a_name_that_the_hub_refuses_is_refused_first(name: str) -> None:
    with pytest.raises(UserError, match=r"^publish=.*expected owner/name"):
        to_run_config(compose(["recipe=int8", f"publish={name}"]))


def test_the_token_is_checked_before_the_run(api: type[FakeApi], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise ConnectionError("no route to host")

    hub.check("me/small")
    hub.check("lab/small")
    with pytest.raises(UserError, match="publish=other/small: the token may write for me, lab only"):
        hub.check("other/small")
    monkeypatch.setattr(api, "account", ACCOUNT | {"auth": {"accessToken": {"role": "read"}}})
    with pytest.raises(UserError, match="the token of me may only read"):
        hub.check("me/small")
    monkeypatch.setattr(api, "whoami", fail)
    with pytest.raises(UserError, match="no route to host"):
        hub.check("me/small")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="there is no token .*hf auth login"):
        hub.check("me/small")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hub.check("me/small")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=int8", "seed=0,1", "-m", "publish=lab/small"], "would replace each other's checkpoint"),
        (["recipe=score", "images=x", "publish=lab/small"], "the recipe score makes no checkpoint"),
        (["recipe=int8", "track=none", "+track.artifact=true"], "track.artifact=True: expected false, or track=wandb"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    assert main() == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_artifact_is_the_whole_checkpoint(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    logged: list[Any] = []

    class FakeRun:
        project_url = "url"

        def log_artifact(self, artifact: Any) -> None:
            logged.append(artifact)

        define_metric = log = finish = lambda *_, **__: None
        summary: dict[str, Any] = {}

    monkeypatch.setattr(wandb, "init", lambda **options: logged.append(options) or FakeRun())
    tracker = track.start(TrackConfig("wandb", mode="offline"), "group", tmp_path / "run", {})
    tracker.artifact("prune distill", saved, {"cost": {"params": 3}, "metrics": {"fid": {"value": 2.0, "n": 4}}})
    tracker.close()
    options, artifact = logged
    assert (options["job_type"], options["group"]) == ("checkpoint", "group")
    assert (artifact.name, artifact.type) == ("prune-distill", "model")
    assert artifact.metadata == {"cost/params": 3, "metrics/fid": 2.0, "metrics/fid_n": 4}
    names = {file.relative_to(saved).as_posix() for file in saved.rglob("*") if file.is_file()}
    assert set(artifact.manifest.entries) == names and {"README.md", "compress.json"} <= names
