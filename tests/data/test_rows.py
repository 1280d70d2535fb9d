"""Rows of csv and jsonl files: where lines end, and where they do not."""

import json

import pytest

from compress.data.rows import rows

TEXTS = ["a dog\x0cred", "two\u2028lines", "next\x85line", "a\x1cb", 'a "quoted", word', "two\nlines"]


def test_texts_come_back_whatever_they_hold(tmp_path):
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    cells = ['"{}"'.format(text.replace('"', '""')) for text in TEXTS]
    table.write_text("text\n" + "\n".join(cells) + "\n", encoding="utf-8", newline="")
    lines.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS), encoding="utf-8")
    for file in (table, lines):
        assert [text for _, (text,) in rows(file, ["text"])] == TEXTS


def test_a_break_in_a_csv_text_without_quotes_ends_no_line(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text\na dog\x0cred\nb\x85c\n", encoding="utf-8", newline="")
    assert list(rows(file, ["text"])) == [(2, ["a dog\x0cred"]), (3, ["b\x85c"])]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_every_kind_of_line_end_counts(tmp_path, ending):
    file = tmp_path / "a.csv"
    file.write_text(ending.join(["\ufeffname,text", "a,b", "c,d"]), encoding="utf-8", newline="")
    assert list(rows(file, ["text", "name"])) == [(2, ["b", "a"]), (3, ["d", "c"])]
