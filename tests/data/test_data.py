import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from compress.data import DataConfig, check, fingerprint, load_data, verify
from compress.errors import UserError
from compress.store import Store
from compress.store.contents import entries
from compress.store.prune import prune


@pytest.fixture
def config(tiny_parquet: Path) -> DataConfig:
    return DataConfig(str(tiny_parquet))


def images(folder: Path, count: int = 3) -> list[str]:
    """Writes images of 8 px whose red is their number, and returns their names."""
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")
    return [f"{index}.png" for index in range(count)]


def metadata(folder: Path, kind: str = "csv", column: str = "caption", **more: list) -> DataConfig:
    """A folder of images with a metadata file."""
    names = images(folder)
    rows = {"file_name": names, column: [f"image {name[0]}" for name in names], **more}
    if kind == "csv":
        lines = [",".join(rows), *(",".join(map(str, row)) for row in zip(*rows.values(), strict=True))]
        (folder / "metadata.csv").write_text("\n".join(lines))
    elif kind == "jsonl":
        lines = [json.dumps(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    else:
        datasets.Dataset.from_dict(rows).to_parquet(folder / "metadata.parquet")
    return DataConfig(str(folder))


def parquet(file: Path, **columns: list) -> DataConfig:
    """A parquet file as other tools write it, without a word about its columns."""
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return DataConfig(str(file))


def png(red: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def test_parquet_gives_the_rows_of_the_split(config: DataConfig) -> None:
    check(config)
    data = load_data(config)
    assert data.train.column_names == ["image", "text"]
    assert len(data.train) == len(data.text) == 12
    assert data.train[0]["image"].size == (16, 16)
    assert list(data.train["text"]) == data.text
    assert data.reference is None


def test_all_rows_and_other_splits_on_request(config: DataConfig) -> None:
    assert len(load_data(replace(config, train_split="all")).text) == 16
    assert len(load_data(replace(config, train_split="held_out")).text) == 4


def test_local_data_is_cached_nowhere(config: DataConfig) -> None:
    assert load_data(config).train.cache_files == []


def test_a_folder_of_parquet_files_is_one_table(config: DataConfig, tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        shutil.copy(config.path, tmp_path / name)
    both = replace(config, path=str(tmp_path))
    check(both)
    assert len(load_data(both).text) == 24


def test_files_named_after_splits_are_those_splits(tmp_path: Path) -> None:
    for name, count in (("train-00000-of-00002", 2), ("train-00001-of-00002", 3), ("test-00000-of-00001", 4)):
        parquet(tmp_path / "data" / f"{name}.parquet", image=[png()] * count, text=["a cat"] * count)
    config = DataConfig(str(tmp_path))
    assert len(load_data(config).text) == 5
    assert len(load_data(replace(config, train_split="test")).text) == 4
    assert len(load_data(replace(config, train_split="all")).text) == 9
    for file in (tmp_path / "data").glob("train*"):
        file.unlink()
    with pytest.raises(UserError, match=r"data\.train_split=null: expected a split that has rows: test, or all"):
        check(config)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["text", "caption", "words"])
def test_a_folder_of_images_with_captions(kind: str, column: str, tmp_path: Path) -> None:
    config = metadata(tmp_path / "images", kind, column)
    for reference in ("auto", None):
        config = replace(config, reference=reference)
        check(config)
        data = load_data(config)
        assert data.text == ["image 0", "image 1", "image 2"]
        assert data.train[2]["image"].getpixel((0, 0)) == (2, 0, 0)
        assert data.reference is None
    assert verify(config).examples == 3


def test_captions_in_text_files_beside_the_images(tmp_path: Path) -> None:
    for name in images(tmp_path / "images"):
        (tmp_path / "images" / name).with_suffix(".txt").write_text(f" image {name[0]}\n")
    config = DataConfig(str(tmp_path / "images"))
    check(config)
    assert load_data(config).text == ["image 0", "image 1", "image 2"]
    before = fingerprint(config)
    (tmp_path / "images" / "1.txt").write_text("another caption")
    assert fingerprint(config) != before
    (tmp_path / "images" / "1.txt").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images cannot be used \(1\.png: no caption\).*data\.on_error=skip"):
        load_data(config)
    assert load_data(replace(config, on_error="skip")).text == ["image 0", "image 2"]


def test_folders_named_after_splits_are_those_splits(tmp_path: Path) -> None:
    for name in ("train", "test"):
        metadata(tmp_path / name)
    config = DataConfig(str(tmp_path))
    check(config)
    assert len(load_data(config).text) == 3
    assert len(load_data(replace(config, train_split="all")).text) == 6
    (tmp_path / "trained_cats").mkdir()  # no split by its name


def test_a_split_column_of_the_metadata(tmp_path: Path) -> None:
    config = metadata(tmp_path / "images", split=["train", "test", "train"])
    assert load_data(config).text == ["image 0", "image 2"]


@pytest.mark.parametrize("image", ["image", "picture"])
@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_parquet_with_columns_of_any_name(image: str, kind: str, tmp_path: Path) -> None:
    pixels = [png(1), png(2)] if kind == "bytes" else [{"bytes": png(1)}, {"bytes": png(2)}]
    config = parquet(tmp_path / "data.parquet", **{image: pixels}, words=["one", "two"], number=[1, 2])
    check(config)
    data = load_data(config)
    assert data.text == ["one", "two"]
    assert data.train[1]["image"].getpixel((0, 0)) == (2, 0, 0)


def test_columns_that_cannot_be_told_are_named_in_one_message(tmp_path: Path) -> None:
    config = parquet(tmp_path / "data.parquet", a=[png()], b=[png()], en=["cat"], de=["Katze"], n=[1])
    with pytest.raises(UserError) as caught:
        check(config)
    for part in (
        "data.image_column=null: expected the column of images, one of a, b",
        "data.text_column=null: expected the column of captions, one of en, de",
        "a (image), b (image), en (text), de (text), n (int64)",
    ):
        assert part in str(caught.value)
    found = load_data(replace(config, image_column="b", text_column="de"))
    assert found.text == ["Katze"]


def odd_images(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Images of every mode that Pillow writes, with the color of their pixels on white."""
    folder.mkdir()
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(folder / "cmyk.jpg")
    Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (8, 8), (9, 200, 9)).convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.png")
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(folder / "clear.png")
    Image.new("LA", (8, 8), (9, 0)).save(folder / "gray_clear.png")
    Image.new("L", (8, 8), 7).save(folder / "gray.png")
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    white = (255, 255, 255)
    colors = {"cmyk.jpg": white, "deep.png": white, "palette.png": (9, 200, 9), "clear.png": white}
    return colors | {"gray_clear.png": white, "gray.png": (7, 7, 7), "moving.gif": (255, 0, 0)}


def test_images_of_every_mode_are_used(tmp_path: Path) -> None:
    from compress.data.white import on_white

    colors = odd_images(tmp_path / "odd")
    (tmp_path / "odd" / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "text": name}) for name in colors)
    )
    config = DataConfig(str(tmp_path / "odd"))
    assert verify(config).problems == {}
    data = load_data(config)
    assert {row["text"]: on_white(row["image"]).getpixel((0, 0)) for row in data.train} == colors


def broken_images(folder: Path) -> DataConfig:
    config = metadata(folder)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    broken = ("cut.jpg", "empty.png", "text.png", "gone.png")
    with (folder / "metadata.csv").open("a") as file:
        file.write("".join(f"\n{name},a cat" for name in broken))
    return config


def test_unreadable_images_stop_or_are_skipped_and_counted(tmp_path: Path) -> None:
    config = broken_images(tmp_path / "images")
    check(config)
    with pytest.raises(UserError, match=r"4 of 7 images cannot be used \(cut\.jpg: .*truncated.*empty\.png: .*skip"):
        verify(config)
    skip = replace(config, on_error="skip")
    found = verify(skip)
    assert found.examples == 3
    assert list(found.problems) == ["cut.jpg", "empty.png", "gone.png", "text.png"]
    assert found.problems["gone.png"] == "no such file"
    data = load_data(skip)
    assert (data.skipped, data.text) == (4, ["image 0", "image 1", "image 2"])


def test_rows_of_parquet_are_looked_into_too(tmp_path: Path) -> None:
    config = parquet(tmp_path / "data.parquet", image=[png(), b"no image", png()], text=["a", "b", None])
    with pytest.raises(UserError, match=r"2 of 3 images cannot be used \(row 2: no caption; row 1: no image of a"):
        verify(config)
    assert load_data(replace(config, on_error="skip")).text == ["a"]
    one = parquet(tmp_path / "one.parquet", image=[b"no image"], text=["a"])
    with pytest.raises(UserError, match="1 of 1 images cannot be used.*take them away$"):
        verify(replace(one, on_error="skip"))


def test_the_same_images_are_looked_into_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, cache = replace(broken_images(tmp_path / "images"), on_error="skip"), tmp_path / "cache"
    looked: list[int] = []
    monkeypatch.setattr("compress.data.decode._problem", lambda encoded: looked.append(1))
    verify(config, cache)
    assert len(looked) == 7
    assert verify(config, cache) == verify(replace(config, on_error="stop"), cache)
    load_data(config, cache)
    assert len(looked) == 7
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "1.png")
    verify(config, cache)
    assert len(looked) == 14


def test_the_fingerprint_changes_with_content_and_choice_but_not_with_the_place(
    config: DataConfig, tmp_path: Path
) -> None:
    first = fingerprint(config)
    moved = tmp_path / "moved.parquet"
    shutil.copy(config.path, moved)
    assert fingerprint(replace(config, path=str(moved))) == first
    assert fingerprint(replace(config, reference="other")) == first
    assert fingerprint(replace(config, split_column="split", image_column="image", train_split="train")) == first
    assert fingerprint(replace(config, train_split="all")) != first
    other = parquet(moved, image=[png()], text=["a cat"], split=["train"])
    assert fingerprint(other) != first


def test_the_embedded_data_is_there() -> None:
    config = DataConfig("embedded:emoji/emoji.parquet")
    check(config)
    data = load_data(config)
    assert len(data.text) == 3142
    assert Path(data.reference).name == "inception.safetensors"
    assert load_data(replace(config, reference=None)).reference is None
    assert verify(config) is None  # the package's own


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"path": "/nowhere/data.parquet"}, ["data.path=/nowhere/data.parquet", "hub id"]),
        ({"path": "no such thing"}, ["data.path=no such thing"]),
        ({"image_column": "photo"}, ["data.image_column=photo", "image (image), text (text), split (text)"]),
        ({"text_column": "caption"}, ["data.text_column=caption", "one of text"]),
        ({"split_column": "part"}, ["data.split_column=part"]),
        ({"reference": "/nowhere.safetensors"}, ["data.reference=/nowhere.safetensors", "null"]),
    ],
)
def test_check_names_the_key(config: DataConfig, changes: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check(replace(config, **changes))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_check_refuses_what_is_no_data(config: DataConfig, tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(Path(config.path).read_bytes()[:-20])
    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "data.md"
    text.write_text("no data")
    bare = tmp_path / "bare"
    images(bare)
    for path, word in ((broken, "parquet"), (empty, "images"), (text, "parquet"), (bare, "captions")):
        with pytest.raises(UserError, match=word):
            check(replace(config, path=str(path)))


def test_a_split_without_rows_names_those_there_are(config: DataConfig) -> None:
    with pytest.raises(UserError, match=r"data\.train_split=test: expected a split that has rows: held_out, train"):
        check(replace(config, train_split="test"))


def test_columns_of_another_kind_are_refused(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.image_column=split: expected the column of images, one of image"):
        check(replace(config, image_column="split"))
    with pytest.raises(UserError, match="text_column=image: expected another column"):
        replace(config, image_column="image", text_column="image")
    with pytest.raises(UserError, match="on_error=ignore: expected stop or skip"):
        replace(config, on_error="ignore")


def test_a_hub_id_that_cannot_be_had_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"data\.path=nobody/nothing"):
        load_data(DataConfig("nobody/nothing"))


def shards(folder: Path, endings: tuple[str, ...] = ("png", "json", "txt")) -> DataConfig:
    """Two tar files of two images each, with captions in a text file and in JSON."""
    import tarfile

    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(2):
                number = 2 * shard + index
                entry = json.dumps({"caption": f"image {number}", "url": "nowhere"}).encode()
                contents = {"png": png(number), "json": entry, "txt": b"other words"}
                for ending in endings:
                    info = tarfile.TarInfo(f"{number:04d}.{ending}")
                    info.size = len(contents[ending])
                    tar.addfile(info, io.BytesIO(contents[ending]))
    return DataConfig(str(folder))


def test_captions_in_json_of_tar_shards_are_found_or_named(tmp_path: Path) -> None:
    config = shards(tmp_path, endings=("png", "json"))
    with pytest.raises(UserError, match=r"data\.text_column=null: .* captions, one of json\.caption, json\.url\."):
        verify(config)
    assert load_data(replace(config, text_column="json.caption")).text == [f"image {number}" for number in range(4)]


def test_tar_shards_are_read_through_datasets(tmp_path: Path) -> None:
    config = shards(tmp_path)
    check(config)
    assert verify(config, tmp_path / "cache").examples == 4
    data = load_data(config, tmp_path / "cache")
    assert data.text == ["other words"] * 4
    assert data.train[3]["image"].getpixel((0, 0)) == (3, 0, 0)
    nested = load_data(replace(config, text_column="json.caption"), tmp_path / "cache")
    assert nested.text == [f"image {number}" for number in range(4)]
    assert nested.fingerprint != data.fingerprint
    (tmp_path / "1.tar").unlink()
    assert len(load_data(replace(config, path=str(tmp_path / "0.tar")), tmp_path / "cache").text) == 2


def test_the_rows_of_tar_shards_are_listed_and_pruned_with_their_store(tmp_path: Path) -> None:
    config = shards(tmp_path)
    store = Store(tmp_path / "store")
    load_data(config, store.root / "data")
    rows = next(entry for entry in entries(store) if entry.key == "shards")
    assert rows.kind == "data" and rows.bytes > 4 * len(png(0))
    assert rows.key not in {entry.key for entry in prune(store, 3600)[0]}
    assert rows.key in {entry.key for entry in prune(store, 0)[0]} and not rows.path.exists()
    assert load_data(config, store.root / "data").text == ["other words"] * 4


@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_tar_file_is_named(number: int, tmp_path: Path) -> None:
    config = shards(tmp_path)
    broken = tmp_path / f"{number}.tar"
    broken.write_bytes(broken.read_bytes()[:1560])
    with pytest.raises(UserError, match=rf"data\.path=.*{number}\.tar cannot be read as a tar file \(unexpected end"):
        verify(config, tmp_path / "cache")
    broken.write_bytes(b"no tar file")
    with pytest.raises(UserError, match=rf"{number}\.tar cannot be read as a tar file"):
        verify(config, tmp_path / "cache")


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.csv", "prompts.jsonl"])
def test_prompts_without_images(name: str, tmp_path: Path, config: DataConfig) -> None:
    file = tmp_path / name
    lines = {".txt": ["a cat", "", "a dog"], ".csv": ["text", "a cat", "a dog"]}
    lines[".jsonl"] = ['{"text": "a cat"}', '{"text": "a dog"}']
    file.write_text("\n".join(lines[file.suffix]))
    alone = DataConfig(str(file))
    check(alone)
    data = load_data(alone)
    assert data.text == ["a cat", "a dog"] and data.train.column_names == ["text"] and not data.has_images
    assert verify(alone) is None
    crossed = replace(config, prompts=str(file), styles=("{} in flat style", "a drawing of {}"))
    data = load_data(crossed)
    assert data.prompts[:3] == ["a cat in flat style", "a drawing of a cat", "a dog in flat style"] and data.has_images
    assert data.fingerprint != fingerprint(config) == fingerprint(replace(config, crop="center"))
    file.write_text("a bird" if file.suffix == ".txt" else "\n".join(lines[file.suffix][:-1]))
    assert fingerprint(crossed) != data.fingerprint


def test_captions_alone_of_data_with_images(config: DataConfig) -> None:
    data = load_data(replace(config, image_column="none"))
    assert data.train.column_names == ["text"] and len(data.text) == 12


def test_a_missing_one_of_captions_alone(tmp_path: Path) -> None:
    config = parquet(tmp_path / "data.parquet", image=[png()] * 3, text=["a", None, "b"])
    config = replace(config, image_column="none")
    with pytest.raises(UserError, match=r"1 of 3 .*row 1: no caption.*data\.on_error=skip"):
        verify(config)
    data = load_data(replace(config, on_error="skip"))
    assert data.text == ["a", "b"] == list(data.train["text"]) and data.skipped == 1


def test_captions_alone_of_a_folder_of_images(tmp_path: Path) -> None:
    config = replace(metadata(tmp_path / "images"), image_column="none")
    check(config)
    data = load_data(config)
    assert data.train.column_names == ["text"] and data.text == ["image 0", "image 1", "image 2"]
    assert data.fingerprint != fingerprint(replace(config, image_column=None)) and verify(config) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "left"}, "crop=left: expected center or random or none"),
        ({"resize": 4}, "resize=4: expected at least 8 pixels, or null for the model's own size"),
        ({"styles": ("in flat style",)}, r"styles=in flat style: expected texts with \{\}"),
    ],
)
def test_values_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig("x", **changes)


def test_a_missing_file_of_prompts_is_named(config: DataConfig) -> None:
    with pytest.raises(UserError, match=r"data\.prompts=nowhere\.txt: expected an existing file: a \.txt file"):
        check(replace(config, prompts="nowhere.txt"))
