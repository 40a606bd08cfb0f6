"""A user's sinks by name: made once all is checked, and refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.errors import SettingError
from fedsplit.events.user_sinks import check_sinks, make_sinks

CODE = """
from fedsplit.events import Sink

made = []

class Mine(Sink):
    def __init__(self):
        made.append(self)

    def handle(self, event):
        pass

class Deaf:
    def close(self):
        pass

class Wants(Sink):
    def __init__(self, key):
        self.key = key

    def handle(self, event):
        pass

class Breaks(Mine):
    def __init__(self):
        raise OSError("no such tracker")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


def test_sinks_are_made_in_their_order_and_not_by_the_check(file: Path) -> None:
    check_sinks([f"{file}:Breaks"])
    one, two = make_sinks([f"{file}:Mine", f"{file}:Mine"])
    assert type(one).__name__ == type(two).__name__ == "Mine" and one is not two


def test_a_sink_takes_options(file: Path) -> None:
    names, options = [f"{file}:Mine", f"{file}:Wants"], {"Wants.key": "secret"}
    check_sinks(names, options)
    assert vars(make_sinks(names, options)[1]) == {"key": "secret"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"Wants.lock": 1}, "sinks.Wants.lock: 1 is not possible; allowed: key"),
        ({"Mine.key": 1}, "sinks.Mine.key: 1 is not possible; allowed: no option at all"),
        ({"Other.key": 1}, r"sinks.Other.key: 1 is not possible; allowed: an option of Mine \| Wants"),
    ],
)
def test_options_that_a_sink_does_not_take_are_refused_by_the_check(
    file: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(SettingError, match=f"^{words}"):
        check_sinks([f"{file}:Mine", f"{file}:Wants"], options)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tracker", "sinks: tracker is not possible; allowed: path/to/mine.py:Mine, or module:Class"),
        ("nowhere.py:Mine", "sinks: nowhere.py is not possible; allowed: a Python file that is there"),
        ("{file}:Other", "sinks: {file}:Other is not possible; allowed: a class of {file}: Sink, Mine, Deaf, Wants"),
        ("{file}:Deaf", "sinks: {file}:Deaf is not possible; allowed: a class with the methods handle and close"),
        ("{file}:Wants", "sinks: {file}:Wants is not possible; allowed: options that it takes (TypeError: "),
        ("{file}:Breaks", "allowed: options that it takes (OSError: no such tracker)"),
    ],
)
def test_what_is_no_sink_is_named(file: Path, name: str, words: str) -> None:
    with pytest.raises(SettingError) as caught:
        make_sinks([name.format(file=file)])
    assert words.format(file=file) in str(caught.value)
