"""How commands end, and what they say then."""

from __future__ import annotations

import pytest

from fedsplit.commands.exit_codes import exit_code
from fedsplit.errors import InputError


class Broke(Exception):
    """Stands for an error of a module of ours."""


Broke.__module__ = "fedsplit.somewhere"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("no\n such  folder"), 2, "fedsplit: no such folder\n"),
        (KeyboardInterrupt(), 130, "fedsplit: stopped\n"),
        (Broke("the trunk\nis gone"), 1, "fedsplit: the trunk is gone\n"),
    ],
)
def test_what_ends_a_command_is_said_in_one_line(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error

    assert exit_code(work) == code
    assert capsys.readouterr().err == words


def test_what_ends_well_is_0_and_other_errors_are_not_hidden() -> None:
    assert exit_code(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0)
