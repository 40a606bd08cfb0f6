"""Replies come in, failures are told in a line."""

from __future__ import annotations

import pytest

from fedsplit.federation.exchange import _reason


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("<class 'ray.exceptions.ActorError'>:<'It is gone.'>", "ActorError: It is gone."),
        ("<class 'ray.TaskError'>:<'Traceback:\n  File x\nValueError: no luck\n'>", "ValueError: no luck"),
        (
            "<class 'ray.RayTaskError(X)'>:<'a\nb.ClientAppException: ClientAppException occurred. Message: no luck'>",
            "no luck",
        ),
        ("ValueError: no luck", "ValueError: no luck"),
        (None, "no reason was given"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(reason: str | None, line: str) -> None:
    assert _reason(reason) == line
