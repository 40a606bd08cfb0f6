"""Files of rows: everything is read as it is written, and a fault is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsplit.corpora.files import doubled_columns, read_rows, read_text


def read(path: Path, content: str | bytes, numbers: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return {name: list(values) for name, values in read_rows([path], numbers).items()}


def test_what_looks_like_something_else_stays_text_in_csv(tmp_path: Path) -> None:
    """Not a missing value, a number, a date or a truth value; only what is empty is missing."""
    texts = ["NA", "null", "nan", "None", "007", "1e5", "2021-03-04", "true", "99999999999999999999"]
    rows = "".join(f"{text},x\n" for text in texts)
    assert read(tmp_path / "a.csv", f"text,owner\n{rows},y\n") == {
        "text": [*texts, None],
        "owner": ["x"] * len(texts) + ["y"],
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["0", "2", ""], [0, 2, None]),
        (["0", "99999999999999999999"], [0, 99999999999999999999]),
        (["1.0", "2.0"], ["1.0", "2.0"]),
        (["0", "1.5"], ["0", "1.5"]),
        (["1e3", "2"], ["1e3", "2"]),
        (["0", "01"], ["0", "01"]),
        (["0", "NA"], ["0", "NA"]),
    ],
)
def test_labels_in_csv_are_numbers_where_all_of_them_are_whole_numbers(
    tmp_path: Path, values: list[str], expected: list[Any]
) -> None:
    rows = "".join(f"a,{value}\n" for value in values)
    found = read(tmp_path / "a.csv", f"text,label\n{rows}", ("label", "absent"))["label"]
    assert found == expected and list(map(type, found)) == list(map(type, expected))


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_marks_line_ends_and_empty_lines_are_no_text(tmp_path: Path, newline: str) -> None:
    table = newline.join(["text,owner", '"a, ""b""', 'c",ann', "", "d,bob", "", ""]).encode()
    rows = newline.join(['{"text": "a"}', "", '{"text": "b"}', "  ", ""]).encode()
    assert read(tmp_path / "a.csv", MARK + table) == {"text": [f'a, "b"{newline}c', "d"], "owner": ["ann", "bob"]}
    assert read(tmp_path / "a.jsonl", MARK + rows) == {"text": ["a", "b"]}
    assert read(tmp_path / "a.json", MARK + b'[{"text": "a"}]') == {"text": ["a"]}
    (tmp_path / "a.txt").write_bytes(MARK + newline.join(["a", "b", ""]).encode())
    assert read_text(tmp_path / "a.txt") == "a\nb"


def test_long_texts_are_read_whole(tmp_path: Path) -> None:
    text = "x" * 200_000
    assert read(tmp_path / "a.csv", f"text\n{text}\n") == {"text": [text]}


def test_values_of_json_are_what_they_are(tmp_path: Path) -> None:
    """Dates stay texts, numbers numbers; a line ends where the file's line ends, whatever is in its texts."""
    rows = [
        {"text": "2021-03-04"},
        {"text": "a\u2028b\x85c\x0cd", "n": 99999999999999999999},
        {"text": 7},
        {"text": None, "messages": [{"role": "user"}]},
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    expected = {
        "text": ["2021-03-04", "a\u2028b\x85c\x0cd", 7, None],
        "n": [None, 99999999999999999999, None, None],
        "messages": [None, None, None, [{"role": "user"}]],
    }
    assert read(tmp_path / "a.jsonl", lines) == expected
    assert read(tmp_path / "b.json", json.dumps(rows, indent=1)) == expected
    assert read(tmp_path / "c.json", json.dumps(rows[0], indent=1)) == {"text": ["2021-03-04"]}
    assert read(tmp_path / "d.json", '["a", "b"]') == {"text": ["a", "b"]}


def test_several_files_are_one_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,owner\na,ann\n")
    (tmp_path / "b.csv").write_text("text,label\nb,1\n")
    found = read_rows([tmp_path / "a.csv", tmp_path / "b.csv"], ["label"])
    assert found == {"text": ["a", "b"], "owner": ["ann", None], "label": [None, 1]}
    (tmp_path / "b.csv").write_text("text\nb,1\n")
    with pytest.raises(ValueError, match=r"^b.csv: line 2 is not CSV: it has 2 values, and there are 1 columns"):
        read_rows([tmp_path / "a.csv", tmp_path / "b.csv"])


def test_the_columns_of_an_index_have_a_name(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", ",text\n0,a\n") == {"column 1": ["0"], "text": ["a"]}


def test_columns_of_one_name_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "a.csv").write_bytes(MARK + b"\ntext,,note,,note\na,0,b,1,c\n")
    (tmp_path / "empty.csv").write_text("")
    assert read_rows([tmp_path / "a.csv"])["text"] == ["a"]
    assert doubled_columns([tmp_path / name for name in ("a.jsonl", "a.csv", "empty.csv")]) == {"note"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a\u2028b"}\n{"text": "c\n',
            "line 2 is not JSON: Invalid control character at .column 12",
        ),
        ("a.jsonl", '{"text": "a"}\n7\n', "line 2 is no JSON object"),
        ("a.jsonl", '{"text": "a"} {"text": "b"}\n', "line 1 is not JSON: Extra data .column 15"),
        ("a.jsonl", b'{"text": "a\xff"}', "utf-8"),
        ("a.json", '[{"text": "a"}, 7]', "number 2 of its list is no JSON object"),
        ("a.json", '[{"text": "a"},\n{"text": b}]', "it is not JSON: Expecting value: line 2 column 10"),
        ("a.json", "[" * 100_000, "recursion"),
        ("a.csv", "text,owner\na,b\nc,d,e\n", "line 3 is not CSV: it has 3 values, and there are 2 columns"),
        ("a.csv", 'text\n"a\n', "line 2 is not CSV: unexpected end of data"),
        ("a.csv", b"text\n\xff\n", "utf-8"),
    ],
)
def test_faults_are_named_with_their_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name, content)
    assert "\n" not in str(caught.value)
