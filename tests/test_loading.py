"""A user's own code by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.errors import SettingError
from fedsplit.loading import STRATEGY, Kind, described, find, make

THING = Kind("thing", lambda: {"path": "pathlib:Path"}, "path, or module:Class", functions=True)
CODE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Mine:
    rate: float = 1.0
    model: str = ""

def rule(logits, labels):
    return 3

def _hidden():
    pass
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


def test_a_class_gets_its_options_and_those_defaults_that_it_takes(file: Path) -> None:
    """A dataclass, too, whose annotations are looked up in its module."""
    made = make(THING, f"{file}:Mine", {"rate": 0.5}, {"model": "here", "seed": 3})
    assert (made.rate, made.model) == (0.5, "here")


def test_a_function_is_taken_as_it_is_where_functions_are(file: Path) -> None:
    assert make(THING, f"{file}:rule", {}, {"model": "here"})(None, None) == 3
    with pytest.raises(SettingError, match=r"^thing.rate: 2 is not possible; allowed: no option, since .*rule is"):
        make(THING, f"{file}:rule", {"rate": 2}, {})


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"class Mine:\n    name = '{name}'\n")
    one, two = (find(THING, f"{tmp_path}/{name}/mine.py:Mine") for name in ("one", "two"))
    assert (one.name, two.name) == ("one", "two") and one.__module__ != two.__module__


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("other", "^thing: other is not possible; allowed: path, path/to/mine.py:Mine, or module:Class$"),
        ("{file}:Other", "allowed: a class or a function of .*mine.py: dataclass, Mine, rule$"),
        ("nowhere.py:Mine", "^thing: nowhere.py is not possible; allowed: a Python file that is there"),
        ("no.module:Mine", "^thing: no.module:Mine is not possible; allowed: path, or module:Class"),
    ],
)
def test_a_thing_that_is_not_there_is_named(file: Path, spec: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        find(THING, spec.format(file=file))


def test_a_strategys_error_about_an_option_names_the_option() -> None:
    with pytest.raises(SettingError, match=r"^strategy.mu: -1 is not possible; allowed: what fedprox takes \(mu is -1"):
        make(STRATEGY, "fedprox", {"mu": -1}, {})


def test_an_error_is_described_in_one_line_with_its_place(file: Path) -> None:
    file.write_text("def rule(logits, labels):\n    raise ValueError('two\\nlines')\n")
    with pytest.raises(ValueError, match="two") as caught:
        find(THING, f"{file}:rule")(None, None)
    assert described(caught.value) == "ValueError: two lines (mine.py, line 2)"


def test_the_place_of_an_error_is_in_the_users_code_whoever_raised_it(file: Path) -> None:
    file.write_text("import json\ndef rule(logits, labels):\n    return json.loads('{')\n")
    with pytest.raises(ValueError, match="Expecting") as caught:
        find(THING, f"{file}:rule")(None, None)
    assert described(caught.value).endswith(" (mine.py, line 3)")
    with pytest.raises(SettingError) as ours:
        find(THING, "other")
    assert described(SettingError("a", 1, "2").with_traceback(ours.tb.tb_next)) == "SettingError: " + str(
        SettingError("a", 1, "2")
    )


def test_a_class_that_would_end_the_program_is_named(file: Path) -> None:
    file.write_text("class Mine:\n    def __init__(self):\n        raise SystemExit(3)\n")
    with pytest.raises(SettingError, match=r"^thing: .*mine\.py:Mine is not possible; allowed: .* \(SystemExit: 3\)$"):
        make(THING, f"{file}:Mine", {}, {})
