import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from compress.data import DataConfig, check, fingerprint, load_data
from compress.errors import UserError


@pytest.fixture
def config(tiny_parquet: Path) -> DataConfig:
    return DataConfig(str(tiny_parquet), split_column="split")


def images(folder: Path) -> DataConfig:
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")
    rows = "\n".join(f"{index}.png,image {index}" for index in range(3))
    (folder / "metadata.csv").write_text(f"file_name,caption\n{rows}\n")
    return DataConfig(str(folder), text_column="caption")


def test_parquet_gives_the_rows_of_the_split(config: DataConfig) -> None:
    check(config)
    data = load_data(config)
    assert data.train.column_names == ["image", "text"]
    assert len(data.train) == len(data.text) == 12
    assert data.train[0]["image"].size == (16, 16)
    assert list(data.train["text"]) == data.text
    assert data.reference is None


def test_parquet_without_a_split_column_gives_all_rows(config: DataConfig) -> None:
    assert len(load_data(replace(config, split_column=None)).text) == 16


def test_local_data_is_cached_nowhere(config: DataConfig) -> None:
    assert load_data(config).train.cache_files == []


def test_a_folder_of_parquet_files_is_one_table(config: DataConfig, tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        shutil.copy(config.path, tmp_path / name)
    both = replace(config, path=str(tmp_path))
    check(both)
    assert len(load_data(both).text) == 24


def test_a_folder_of_images_with_captions(tmp_path: Path) -> None:
    config = images(tmp_path / "images")
    check(config)
    data = load_data(config)
    assert data.text == ["image 0", "image 1", "image 2"]
    assert data.train[2]["image"].getpixel((0, 0)) == (2, 0, 0)


def test_the_fingerprint_changes_with_content_and_choice_but_not_with_the_place(
    config: DataConfig, tmp_path: Path
) -> None:
    first = fingerprint(config)
    moved = tmp_path / "moved.parquet"
    shutil.copy(config.path, moved)
    assert fingerprint(replace(config, path=str(moved))) == first
    assert fingerprint(replace(config, reference="other")) == first
    assert fingerprint(replace(config, split_column=None)) != first
    moved.write_bytes(moved.read_bytes() + b"x")
    assert fingerprint(replace(config, path=str(moved))) != first


def test_the_embedded_data_is_there() -> None:
    config = DataConfig("embedded:emoji/emoji.parquet", split_column="split")
    check(config)
    assert len(load_data(config).text) > 3000


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"path": "/nowhere/data.parquet"}, ["data.path=/nowhere/data.parquet", "hub id"]),
        ({"path": "no such thing"}, ["data.path=no such thing"]),
        ({"image_column": "photo"}, ["data.image_column=photo", "image, text, split"]),
        ({"text_column": "caption"}, ["data.text_column=caption", "image, text, split"]),
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
    text = tmp_path / "data.txt"
    text.write_text("no data")
    bare = tmp_path / "bare"
    images(bare)
    (bare / "metadata.csv").unlink()
    for path, word in ((broken, "parquet"), (empty, "images"), (text, "parquet"), (bare, "metadata")):
        with pytest.raises(UserError, match=word):
            check(replace(config, path=str(path)))


def test_a_split_without_rows_names_those_there_are(config: DataConfig) -> None:
    with pytest.raises(UserError, match=r"data\.train_split=test: expected a split that has rows: held_out, train"):
        load_data(replace(config, train_split="test"))


def test_columns_of_another_kind_are_refused(config: DataConfig, tmp_path: Path) -> None:
    import datasets

    with pytest.raises(UserError, match=r"data\.image_column=split: expected a column of images"):
        load_data(replace(config, image_column="split"))
    file = tmp_path / "null.parquet"
    rows = datasets.Dataset.from_parquet(config.path, keep_in_memory=True, cache_dir=str(tmp_path))
    rows.add_column("empty", [None] * len(rows)).to_parquet(file)
    with pytest.raises(UserError, match=r"data\.text_column=empty: expected text in every row, but 12 rows have none"):
        load_data(replace(config, path=str(file), text_column="empty"))
    with pytest.raises(UserError, match="text_column=image: expected another column"):
        replace(config, text_column="image")


def test_a_hub_id_that_cannot_be_had_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"data\.path=nobody/nothing"):
        load_data(DataConfig("nobody/nothing"))
