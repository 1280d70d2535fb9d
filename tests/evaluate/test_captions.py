"""Captions of images on disk."""

import json

import pytest

from compress.errors import UserError
from compress.evaluate.captions import read_captions

NAMES = ["a.png", "deep/b.jpg"]


def test_csv_and_jsonl_give_captions_in_the_order_of_the_images(tmp_path):
    rows = [("deep/b.jpg", 'a "red", round\nsun'), ("other.png", "a tree"), ("a.png", "ein Bär")]
    table, lines = tmp_path / "captions.csv", tmp_path / "captions.jsonl"
    written = "".join('{},"{}",5\r\n'.format(name, text.replace('"', '""')) for name, text in rows)
    table.write_text("\ufefffile_name,text,score\r\n" + written, encoding="utf-8")
    lines.write_text("\n".join(json.dumps({"text": text, "file_name": f"./{name}"}) for name, text in rows) + "\n\n")
    for file in (table, lines):
        assert read_captions(str(file), NAMES) == ["ein Bär", 'a "red", round\nsun']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "file_name,text\na.png,a cat\n", r"1 of 2 images have no caption: deep/b\.jpg; .*a\.png"),
        ("a.csv", "name,text\na.png,a cat\n", "no column file_name, but name, text"),
        ("a.csv", "", "no column file_name and no column text, but nothing"),
        ("a.csv", "file_name,text\na.png,\n", "line 2 has no text"),
        ("a.csv", "file_name,text\na.png\n", "line 2 has no text"),
        ("a.csv", "file_name,text\na.png,a cat\na.png,a dog\n", r"line 3 gives a second caption for a\.png"),
        ("a.csv", "file_name,text\na.png,\udcff\n", "cannot be read"),
        ("a.jsonl", '{"file_name": "a.png", "text": "a cat"}\n{', "line 2: "),
        ("a.jsonl", '["a.png", "a cat"]\n', "line 1 has no file_name"),
        ("a.jsonl", '{"file_name": "a.png", "text": 3}\n', "line 1 has no text"),
    ],
)
def test_what_is_wrong_is_named(name, content, message, tmp_path):
    file = tmp_path / name
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message) as caught:
        read_captions(str(file), NAMES)
    assert str(caught.value).startswith(f"captions={file}: ")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"captions=.*nowhere\.csv: expected an existing file"):
        read_captions(str(tmp_path / "nowhere.csv"), NAMES)
