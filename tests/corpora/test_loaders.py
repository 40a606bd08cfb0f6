"""Data sets from a user's own function, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.corpora.loaders import is_loader, path_of
from fedsplit.corpora.tables import check_dataset, is_on_hub, read_table
from fedsplit.errors import SettingError
from fedsplit.settings.sections import DataSettings

CODE = """
import datasets

def texts():
    return {"ann": ["one", "two"], "bob": ["three"]}

def rows():
    return [{"prompt": "1 +", "completion": " 1"}]

def splits():
    return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a", "b"]}),
                                late=datasets.Dataset.from_dict({"text": ["c"]}))

def number():
    return 3

def fails():
    raise OSError("the ward's server does not answer")

def needs(argument):
    return {}

VALUE = 5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


def test_a_function_of_a_file_returns_the_data(file: Path) -> None:
    table = read_table(f"{file}:texts", DataSettings())
    assert table.columns == {"text": ["one", "two", "three"], "owner": ["ann", "ann", "bob"]}
    assert read_table(f"{file}:rows", DataSettings()).columns == {"prompt": ["1 +"], "completion": [" 1"]}


def test_a_function_of_a_module_returns_the_data(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(file.parent)
    file.rename(file.with_name("wards_of_a_test.py"))
    assert read_table("wards_of_a_test:texts", DataSettings()).columns["owner"] == ["ann", "ann", "bob"]


@pytest.mark.parametrize(("split", "texts"), [("train", ["a", "b"]), ("late", ["c"]), ("all", ["a", "b", "c"])])
def test_a_split_is_chosen(file: Path, split: str, texts: list[str]) -> None:
    assert read_table(f"{file}:splits", DataSettings(split=split)).columns["text"] == texts


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("absent", {}, "a class or a function of .*mine.py: texts, rows, splits, number, fails, needs"),
        ("VALUE", {}, "a class or a function of"),
        ("number", {}, r"a function that returns .* \(3\)"),
        ("fails", {}, r"a function that returns a data set \(OSError: the ward's server does not answer\)"),
        ("needs", {}, r"a function that returns a data set \(TypeError: .*argument"),
        ("texts", {"config": "x"}, "none, since .* has no configurations"),
        ("texts", {"split": "late"}, "train, since .* has no other split"),
        ("splits", {"split": "absent"}, r"all \| train \| late, the splits of "),
    ],
)
def test_what_gives_no_data_is_refused_in_one_line(file: Path, name: str, settings: dict[str, str], words: str) -> None:
    with pytest.raises(SettingError, match=f"allowed: {words}") as refused:
        read_table(f"{file}:{name}", DataSettings(**settings))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_absent_is_told_before_any_data_are_read(tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match=r"dataset: .*absent.py is not possible; allowed: a Python file that is there"
    ):
        check_dataset(f"{tmp_path}/absent.py:load")


def test_a_file_of_the_same_name_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_loader("notes:load") and not is_on_hub("notes:load")
    Path("notes:load").mkdir()
    assert not is_loader("notes:load") and path_of("notes:load") == Path("notes:load")


@pytest.mark.parametrize("name", ["sotu", "user/data", "notes.jsonl", "http://host:80", "a:b:c", "C:\\notes.jsonl"])
def test_other_names_stand_for_no_function(name: str) -> None:
    assert not is_loader(name)
