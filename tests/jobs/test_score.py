"""``recipe=score`` as a user meets it: what it prints, what it writes, what it refuses."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress.__main__ import main
from tests.evaluate.parts import TinyInception, tiny_clip

SIZES = [(24, 24), (40, 30), (25, 61), (24, 24), (33, 24)]
NAMES = ["a.png", "b.jpg", "c.webp", "in/d.png", "in/deep/e.png"]


def write(folder: Path, shift: int = 0, names: list[str] = NAMES, sizes: list[tuple[int, int]] = SIZES) -> Path:
    rng = np.random.default_rng(0)
    for name, size in zip(names, sizes, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 200, (4, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        Image.fromarray(np.asarray(small) + np.uint8(shift)).save(folder / name)
    return folder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The command line in this process, in an empty folder, with small networks."""
    clip = tiny_clip(tmp_path_factory.mktemp("clip"))
    monkeypatch.setattr("compress.evaluate.networks.inception.Inception", TinyInception)
    monkeypatch.chdir(tmp_path_factory.mktemp("score"))
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str) -> int:
        small = [f"evaluate.clip={clip}", "evaluate.clip_name=tiny", "evaluate.set_bootstrap=20", "device=cpu"]
        monkeypatch.setattr(sys, "argv", ["compress", "recipe=score", *small, *arguments])
        return main()

    return call


def written(out: str = "out") -> dict[str, Any]:
    return json.loads(Path(out, "score.json").read_text())


def test_a_folder_against_another_and_its_captions(cli, capsys):
    write(Path("ours"), shift=30)
    write(Path("theirs"), names=[f"{index}.png" for index in range(7)], sizes=[*SIZES, (31, 31), (20, 50)])
    Path("captions.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "text": f"a cat {name}"}) for name in [*NAMES, "more.png"])
    )
    assert cli("images=ours", "reference=theirs", "captions=captions.jsonl", "out=out") == 0
    found = written()
    metrics = found["metrics"]
    assert set(metrics) == {"fid", "kid", "precision", "recall", "cmmd", "clip_score", "r_at_1", "r_at_5"}
    for name, metric in metrics.items():
        assert metric["low"] is None if name == "recall" else metric["low"] <= metric["value"] <= metric["high"]
    assert metrics["fid"]["n"] == 5
    assert metrics["fid"]["n_reference"] == 7
    manifest = found["manifest"]
    assert manifest["networks"] == {
        metrics[name]["network"]: metrics[name]["network_sha256"] for name in ("fid", "cmmd")
    }
    assert manifest["images"]["folder"] == "ours"
    assert (manifest["images"]["n"], manifest["images"]["sizes"]) == (5, 4)
    assert (manifest["images"]["smallest"], manifest["images"]["largest"]) == ("24x24", "25x61")
    assert len(manifest["images"]["sha256"]) == len(manifest["captions"]["sha256"]) == 64
    assert manifest["evaluate"]["fid_resize"] == "tensorflow1"
    assert "steps" not in manifest["evaluate"]
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    text = " ".join(text.split())
    few = "With so few captions R@5 counts every image."
    for part in ("FID ↓", "KID ↓", "CMMD ↓", "tiny score ↑", "R@5 (%) ↑", few, "N → ∞", "out/score.json"):
        assert part in text
    assert "Scored 5 images of 24x24 to 25x61 px in ours." in text
    assert "tiny-inception (00000000)" in text
    # Nothing is computed again, and nothing changes but the last digits of a value near zero.
    assert cli("images=ours", "reference=theirs", "captions=captions.jsonl", "out=again") == 0
    again = written("again")["metrics"]
    assert again["fid"].pop("infinite") == pytest.approx(metrics["fid"].pop("infinite"), abs=1e-6)
    assert again == metrics


def test_pairs_by_name(cli):
    write(Path("ours"), shift=10)
    write(Path("theirs"), names=[str(Path(name).with_suffix(".png")) for name in NAMES])
    assert cli("images=ours", "reference=theirs", "paired=true", "out=out") == 0
    metrics = written()["metrics"]
    assert set(metrics) == {"fid", "kid", "precision", "recall", "cmmd", "psnr", "ssim", "ms_ssim"}
    assert 20 < metrics["psnr"]["value"] < 40
    assert metrics["psnr"]["n"] == 5
    assert cli("images=theirs", "reference=theirs", "paired=true", "out=same") == 0
    assert written("same")["metrics"]["psnr"]["equal"] == 5
    assert written("same")["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-6)


def test_captions_alone_need_no_inception(cli, monkeypatch):
    monkeypatch.setattr("compress.evaluate.networks.inception.Inception", None)
    write(Path("ours"))
    rows = "".join(f"{name},a dog {index}\n" for index, name in enumerate(NAMES))
    Path("captions.csv").write_text("file_name,text\n" + rows)
    assert cli("images=ours", "captions=captions.csv", "out=out") == 0
    found = written()
    assert set(found["metrics"]) == {"clip_score", "r_at_1", "r_at_5"}
    assert found["manifest"]["reference"] is None


def test_transparent_images_are_said_to_be_laid_on_white(cli, capsys):
    for folder in ("ours", "theirs"):
        write(Path(folder))
    Image.new("RGBA", (24, 24), (200, 0, 0, 100)).save("ours/a.png")
    assert cli("images=ours", "reference=theirs", "out=out") == 0
    assert written()["manifest"]["images"]["on_white"] == 1
    assert "1 of them composited on white" in capsys.readouterr().out


@pytest.fixture
def folders(cli: Any) -> Any:
    """Good folders, and some that are not."""
    for name in ("ours", "theirs", "gray", "cut", "headless", "bitmap", "fewer", "other", "wide"):
        write(Path(name))
    Image.open("gray/a.png").convert("L").save("gray/a.png")
    content = Path("cut/b.jpg").read_bytes()
    Path("cut/b.jpg").write_bytes(content[: len(content) // 2])
    Path("headless/b.jpg").write_bytes(content[:20])
    Image.open("bitmap/a.png").save("bitmap/a.bmp")
    Path("bitmap/a.bmp").rename("bitmap/a.png")
    write(Path("same"), names=[f"{index}.png" for index in range(5)], sizes=[(24, 32)] * 5)
    write(Path("tiny"), sizes=[(8, 9)] * 5)
    Path("fewer/c.webp").unlink()
    Path("other/in/d.png").rename("other/in/dd.png")
    Image.new("RGB", (99, 24)).save("wide/a.png")
    Path("empty").mkdir()
    shutil.copytree("theirs/in", "three")
    Path("captions.csv").write_text("file_name,text\na.png,a cat\n")
    return cli


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["images=ours"], "reference and captions are both null"),
        (["reference=ours"], "images is missing: give images=DIR"),
        (["images=nowhere", "reference=theirs"], "images=nowhere: expected an existing folder"),
        (["images=empty", "reference=theirs"], "images=empty: expected a folder with images"),
        (["images=ours", "reference=empty"], "reference=empty: expected a folder with images"),
        (["images=ours", "reference=three"], "reference=three: expected at least 5 images, but there are 2"),
        (["images=gray", "reference=theirs"], "images: gray/a.png is not RGB but gray, with one channel"),
        (["images=ours", "reference=headless"], "reference: headless/b.jpg cannot be read as an image"),
        (["images=ours", "reference=bitmap"], "reference: bitmap/a.png is BMP despite its ending"),
        (
            ["images=tiny", "reference=tiny", "paired=true"],
            "tiny/a.png has 8x9 pixels, and SSIM needs sides of at least 11",
        ),
        (["images=fewer", "reference=theirs", "paired=true"], "1 of 5 images of reference have none of that name"),
        (["images=ours", "reference=fewer", "paired=true"], "1 of 5 of the images have none of that name"),
        (["images=ours", "reference=other", "paired=true"], "in/d (reference has 5"),
        (["images=ours", "reference=wide", "paired=true"], "have to be of one size"),
        (["images=ours", "paired=true"], "paired=true: expected reference=DIR"),
        (["images=ours", "captions=captions.csv"], "4 of 5 images have no caption: b.jpg"),
        (["images=ours", "captions=none.csv"], "captions=none.csv: expected an existing file"),
        (["images=ours", "captions=captions.csv", "evaluate.clip=null"], "evaluate.clip=null: expected a CLIPModel"),
        (["images=ours", "reference=theirs", "evaluate.lpips=true"], "evaluate.lpips=true: expected paired=true"),
        (["images=ours", "reference=theirs", "evaluate.preference=[hpsv2]"], "evaluate.preference=hpsv2: expected"),
        (["images=ours", "reference=theirs", "evaluate.steps=3"], "evaluate.steps=3: expected no change"),
        (["images=ours", "reference=theirs", "evaluate.reference=ours"], "evaluate.reference=ours: expected no change"),
        (
            ["images=ours", "reference=theirs", "evaluate.resize=16"],
            "evaluate.resize=16: expected null, since images has",
        ),
        (["images=same", "reference=theirs", "evaluate.resize=50"], "evaluate.resize=50: expected at most 24"),
        (["images=ours", "captions=captions.csv", "+evaluate.encoders.a=x/y"], "expected reference=DIR"),
        (
            ["images=ours", "captions=captions.csv", "evaluate.fid_resize=clean"],
            "fid_resize=clean: expected reference=DIR",
        ),
        (
            ["images=ours", "captions=captions.csv", "evaluate.leave_out=[clip_score,r_at_1,r_at_5]"],
            "evaluate.leave_out=clip_score, r_at_1, r_at_5: expected at least one metric to compute",
        ),
        (["images=ours", "reference=theirs", "precision=bf16"], "precision=bf16: expected fp32"),
        (["images=ours", "reference=theirs", "seed=3"], "seed=3: expected 0"),
        (["images=ours", "reference=theirs", "model.path=x"], "model: no such key"),
        (["images=ours", "refrence=theirs"], "refrence: no such key (did you mean reference?)"),
        (["images=ours", "reference=theirs", "paired=maybe"], "paired=maybe: expected true or false"),
        (["images=ours", "reference=theirs", "device=cuda:99"], "device=cuda:99: expected"),
        (
            ["images=ours", "reference=theirs", "device=cuda:x"],
            "device=cuda:x: expected auto, cpu, cuda, cuda:N or mps",
        ),
        (["images=ours", "reference=theirs", "device=gpu"], "device=gpu: expected auto, cpu, cuda, cuda:N or mps"),
        (["images=ours", "reference=theirs", "store=captions.csv"], "store=captions.csv: cannot be written"),
        (["images=ours", "reference=theirs", "out=/dev/null/out"], "out=/dev/null/out: cannot be written"),
    ],
)
def test_mistakes_are_one_message_before_anything_is_loaded(folders, arguments, part, capsys, monkeypatch):
    monkeypatch.setattr("compress.evaluate.networks.inception.Inception", None)
    monkeypatch.setattr("compress.evaluate.networks.clip.load_clip", None)
    before = sorted(Path.cwd().iterdir())
    assert folders(*arguments) == 2
    text = capsys.readouterr().err
    assert text.count("error: ") == 1
    assert part in text
    assert "Traceback" not in text
    assert sorted(Path.cwd().iterdir()) == before


@pytest.mark.parametrize("folder", ["images", "reference"])
def test_damage_is_found_before_any_image_is_looked_at(folders, folder, capsys, monkeypatch):
    monkeypatch.setattr(TinyInception, "forward", None)
    there = {"images": "ours", "reference": "ours", folder: "cut"}
    assert folders(*(f"{key}={value}" for key, value in there.items())) == 2
    assert f"{folder}: cut/b.jpg cannot be read as an image" in capsys.readouterr().err


def test_encoders_are_loaded_before_any_image_is_looked_at(folders, capsys, monkeypatch):
    monkeypatch.setattr(TinyInception, "forward", None)
    Path("encoder").mkdir()
    Path("encoder/config.json").write_text('{"model_type": "vit"}')
    assert folders("images=ours", "reference=theirs", "+evaluate.encoders.vit=./encoder") == 2
    assert "evaluate.encoders.vit=./encoder: cannot load an image encoder from it" in capsys.readouterr().err


def test_images_of_a_published_protocol_are_brought_to_its_size(folders):
    for name, side in (("large", 48), ("small", 24)):
        Path(name).mkdir()
        for file in sorted(Path("same").iterdir()):
            image = Image.open(file).resize((64, 48), Image.Resampling.NEAREST)
            shown = image if side == 48 else image.resize((32, 24), Image.Resampling.BICUBIC)
            shown.save(Path(name) / file.name)
    assert folders("images=large", "reference=theirs", "evaluate.resize=24", "out=reduced") == 0
    shutil.rmtree("squeezed", ignore_errors=True)
    Path("squeezed").mkdir()
    for index, file in enumerate(sorted(Path("theirs").rglob("*.*"))):
        Image.open(file).convert("RGB").resize((32, 24), Image.Resampling.BICUBIC).save(f"squeezed/{index}.png")
    assert folders("images=small", "reference=squeezed", "out=already") == 0
    reduced, already = written("reduced"), written("already")
    assert reduced["metrics"]["kid"]["value"] == pytest.approx(already["metrics"]["kid"]["value"], rel=1e-6)
    assert reduced["manifest"]["evaluate"]["resize"] == 24
    assert "protocol" not in reduced["manifest"]["evaluate"]


def test_two_images_of_one_name_cannot_be_paired(folders, capsys):
    shutil.copy("ours/a.png", "ours/a.webp")
    assert folders("images=ours", "reference=theirs", "paired=true") == 2
    assert "images has two images named a" in capsys.readouterr().err
