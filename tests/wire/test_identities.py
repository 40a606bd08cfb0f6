"""The file of identities: a name, a number, and nobody twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.errors import InputError
from fedsplit.wire.identities import Identities, read_identities

GOOD = 'federation = "operator"\n[clients]\nhospital-a = 0\n"clinic b.example" = 3\n'


def test_names_and_numbers_are_read(tmp_path: Path) -> None:
    (tmp_path / "clients.toml").write_text(GOOD)
    assert read_identities(tmp_path) == Identities(tmp_path, {"hospital-a": 0, "clinic b.example": 3}, "operator")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("federation = ", "Invalid value"),
        (GOOD.replace("[clients]", "[client]"), r"\[clients\] must have lines such as: hospital-a = 0"),
        (GOOD.replace("= 0", "= -1"), r"\[clients\] must have lines"),
        (GOOD.replace("= 0", "= true"), r"\[clients\] must have lines"),
        ('federation = "operator"\n[clients]\n', r"\[clients\] must have lines"),
        (GOOD.replace("= 3", "= 0"), "two clients have the same number"),
        (GOOD.replace('"operator"', "1"), "the name of the operator is missing"),
        (GOOD.replace('"operator"', '"hospital-a"'), "'hospital-a' is a client, and cannot be the operator"),
    ],
    ids=["no toml", "no clients", "negative", "bool", "nobody", "twice", "no operator", "both"],
)
def test_a_wrong_file_is_one_line_that_names_it(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "clients.toml").write_text(text)
    with pytest.raises(InputError, match=words) as refused:
        read_identities(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / 'clients.toml'}: ") and "\n" not in str(refused.value)
