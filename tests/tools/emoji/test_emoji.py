import json
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tools.emoji import autoencoder, clip, images, run, teacher
from tools.emoji.__main__ import main
from tools.emoji.imagenet import Space
from tools.emoji.images import LABELS, STYLES, ImagesConfig, _on_white, _splits, caption, load_images
from tools.emoji.loop import LoopConfig, train


@pytest.fixture
def parquet(tmp_path):
    """Twelve concepts in three styles as colored squares; concept 0 and one pair of every fourth are held out."""
    rows = []
    for concept in range(12):
        for number, style in enumerate(STYLES):
            pixels = np.full((64, 64, 3), 255, np.uint8)
            pixels[16:48, 16:48] = (20 * concept, 80 * number, 120)
            split = "held_out_concept" if concept == 0 else "train"
            split = "held_out_pair" if concept % 4 == 3 and number == 2 else split
            name = f"thing {concept}"
            image = Image.fromarray(pixels)
            rows.append({"image": image, "text": caption(name, style), "concept": name, "style": style, "split": split})
    features = datasets.Features(
        {"image": datasets.Image(), **{k: datasets.Value("string") for k in ("text", "concept", "style", "split")}}
    )
    file = tmp_path / "small.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(file))
    return str(file)


def test_interrupted_training_ends_with_the_same_weights(tmp_path):
    data = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))

    def run(folder, stop_at=None):
        torch.manual_seed(0)
        model, count = torch.nn.Linear(4, 4), 0

        def loss(index, generator):
            nonlocal count
            count += 1
            if count == stop_at:
                raise KeyboardInterrupt
            noise = 0.1 * torch.randn(len(index), 4, generator=generator)
            return (model(data[index] + noise) - data[index]).pow(2).mean()

        def evaluate():
            seen.append(model.weight.clone())
            return {"largest": model.weight.max().item()}

        seen = []
        config = LoopConfig(20, 8, 1e-2, bf16=False, save_every=5, schedule_steps=30)
        record = train(model, loss, 32, config, folder, evaluate)
        return model, record, seen

    model, record, seen = run(tmp_path / "whole")
    assert torch.equal(seen[-1], model.weight)  # evaluated, and left, with averaged weights
    assert [figures["step"] for figures in record["figures"]] == [5, 10, 15, 20]
    assert record["curves"]["learning_rate"][-1][1] > 1e-3  # the schedule goes on for ten more steps
    assert json.loads((tmp_path / "whole" / "curve.json").read_text()) == record
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", stop_at=13)
    resumed, again, seen = run(tmp_path / "broken")
    assert len(seen) == 2
    assert again == record
    assert torch.equal(resumed.weight, model.weight)


def test_space_keeps_the_directions_that_vary_most():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 2, generator=generator)
    features = hidden @ torch.randn(2, 6, generator=generator) + 5
    space = Space.fit(features, 2)
    coordinates = space(features)
    assert coordinates.shape == (200, 2)
    assert coordinates.mean(0).abs().max() < 1e-4
    back = torch.linalg.lstsq(coordinates, features - features.mean(0)).solution
    assert (coordinates @ back - (features - features.mean(0))).abs().max() < 1e-3


def test_found_among_counts_only_images_nearest_to_their_own_caption():
    rows = [{"style": "noto", "split": "train"} for _ in range(10)]
    texts = torch.eye(10)
    assert clip.found_among(texts, texts, rows, "train") == 1
    swapped = texts.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert clip.found_among(swapped, texts, rows, "train") == 0.8


def test_splits_keep_pairs_and_whole_concepts_apart():
    keys = [(style, f"c{i}") for style in STYLES for i in range(40)]
    splits = _splits(keys, ImagesConfig(held_out_pairs=9, held_out_concepts=4))
    concepts = {label for (_, label), split in splits.items() if split == "held_out_concept"}
    pairs = [key for key, split in splits.items() if split == "held_out_pair"]
    assert len(concepts) == 4
    assert all(splits[style, label] == "held_out_concept" for style in STYLES for label in concepts)
    assert len(pairs) == 9
    assert len({label for _, label in pairs}) == 9
    assert not {label for _, label in pairs} & concepts


def test_transparent_images_are_put_on_white(tmp_path):
    Image.new("RGBA", (128, 128), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    data = _on_white(tmp_path / "clear.png", 64, lossless=True)
    (tmp_path / "out.webp").write_bytes(data)
    image = np.asarray(Image.open(tmp_path / "out.webp"))
    assert image.shape == (64, 64, 3)
    assert (image == 255).all()


def test_tokenizer_loads_in_stock_transformers_and_tells_captions_apart(parquet, tmp_path):
    from transformers import CLIPTokenizer

    captions = [row["text"] for row in load_images(parquet)[1]]
    clip.make_tokenizer(captions, clip.ClipConfig(vocabulary=600), tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(captions, padding="max_length", truncation=True).input_ids
    assert all(len(row) == 20 and row[0] == tokenizer.bos_token_id for row in ids)
    assert len({tuple(row) for row in ids}) == len(captions)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).replace(" ,", ",").strip() == captions[0]


def test_autoencoder_and_teacher_train_into_a_stock_pipeline(parquet, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    loop = LoopConfig(2, 4, 1e-3, bf16=False, save_every=2)
    ae = autoencoder.AutoencoderConfig(parquet, widths=(16, 16, 16), loop=loop)
    record = autoencoder.train_autoencoder(ae, tmp_path / "ae")
    assert 0 < record["figures"][-1]["held_out_psnr"] < 40

    projection = torch.randn(192, 100, generator=torch.Generator().manual_seed(0))
    coarse = torch.nn.AvgPool2d(8)
    monkeypatch.setattr(clip, "imagenet_features", lambda p: torch.sin(coarse(p / 255).flatten(1) @ projection))
    monkeypatch.setattr(clip, "_sentences", lambda texts: torch.ones(len(texts), 384))
    small = clip.ClipConfig(
        parquet, vocabulary=600, text_width=64, text_layers=1, vision_width=32, vision_layers=1, views=2, mixed=1,
        text=loop, vision=loop,
    )  # fmt: skip
    assert set(clip.train_clip(small, tmp_path / "clip")["vision"]["figures"][-1]) >= {"train", "held_out_pair"}
    vocabulary = (tmp_path / "clip" / "text" / "tokenizer.json").read_bytes()
    clip.train_clip(small, tmp_path / "clip")  # finished: goes on from its last states, with the same tokens
    assert (tmp_path / "clip" / "text" / "tokenizer.json").read_bytes() == vocabulary

    config = teacher.TeacherConfig(
        parquet, str(tmp_path / "ae" / "vae"), str(tmp_path / "clip" / "text"), widths=(32, 32), heads=2, loop=loop
    )
    teacher.train_teacher(config, tmp_path / "teacher")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "teacher" / "pipeline", torch_dtype=torch.float32)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    image = pipeline("thing 3, noto emoji", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    states = pipeline.text_encoder(torch.tensor([[0, 5, 1]]))[0]
    trained = clip.CLIPModel.from_pretrained(tmp_path / "clip" / "text", dtype=torch.float32)
    expected = trained.text_model(torch.tensor([[0, 5, 1]])).last_hidden_state
    assert torch.allclose(states, expected, atol=1e-3)


def test_mixtures_take_pixels_of_two_images():
    dark, light = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    images = torch.cat([dark, light]).repeat(200, 1, 1, 1)
    mixed = clip._mix(images, torch.Generator().manual_seed(0))
    assert mixed.shape == images.shape and mixed.dtype == torch.uint8
    blended = ((mixed > 0) & (mixed < 200)).flatten(1).all(1)
    cut = torch.tensor([len(image.unique()) == 2 for image in mixed])
    assert blended.any() and cut.any() and not (blended & cut).any()
    assert ((mixed[blended] >= 60) & (mixed[blended] <= 140)).all()
    assert torch.equal(mixed, clip._mix(images, torch.Generator().manual_seed(0)))


def test_images_are_made_from_unpacked_packages(tmp_path, monkeypatch):
    entries = [{"label": f"thing {i}", "hexcode": f"1F60{i}", "group": 0} for i in range(6)]
    folders = {name: tmp_path / name.replace("/", "_") for name in (LABELS, *STYLES.values())}
    for name, folder in folders.items():
        inside = {LABELS: "en", STYLES["fluent"]: "assets", STYLES["noto"]: "img/google/64"}.get(name, "img/twitter/64")
        (folder / inside).mkdir(parents=True)
        for entry in entries:
            if name != LABELS:
                Image.new("RGBA", (64, 64), "red").save(folder / inside / f"{entry['hexcode'].lower()}.png")
    (folders[LABELS] / "en" / "data.json").write_text(json.dumps(entries))
    monkeypatch.setattr(images, "_unpack", lambda folder, name: folders[name])
    counts = run("images", [f"out={tmp_path / 'out'}", "held_out_pairs=2", "held_out_concepts=1"])
    assert counts.pop("seconds") > 0
    assert counts == {"train": 13, "held_out_pair": 2, "held_out_concept": 3}
    assert load_images(str(tmp_path / "out" / "emoji.parquet"))[0].shape == (18, 3, 64, 64)


def test_bars_measure_the_embedded_default(parquet, tmp_path):
    curve = tmp_path / "curve.json"
    curve.write_text(json.dumps({"curves": {"loss": [[50, 1.0], [100, 0.5]]}}))
    found = run(
        "bars", [f"images={parquet}", f"out={tmp_path / 'bars'}", "samples=2", "steps=1", f"curves.teacher={curve}"]
    )
    assert 0 < found["autoencoder_held_out_psnr"] < 40
    assert {"emoji_clip_train", "teacher_found_held_out_pair"} <= set(found)
    assert {file.name for file in (tmp_path / "bars").iterdir()} == {
        "curves.png", "record.json", "sheet_held_out_pair.png", "sheet_train.png",
    }  # fmt: skip


def test_a_mistake_on_the_command_line_is_named(monkeypatch, capsys, tmp_path):
    for arguments, message in (
        (["cilp"], "cilp: no such part (did you mean clip?)"),
        (["clip", "vocabluary=3"], "vocabluary: no such key (did you mean vocabulary?)"),
        (["teacher", "loop.stepps=3"], "loop.stepps: no such key (did you mean steps?)"),
        (["clip", "mixed=40"], "mixed=40: expected a whole number below views=40"),
    ):
        monkeypatch.setattr(sys, "argv", ["tools.emoji", *arguments, f"out={tmp_path / 'nothing'}"])
        assert main() == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
