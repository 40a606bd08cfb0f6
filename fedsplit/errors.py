"""Errors of what a user gives, and their words."""

from __future__ import annotations


class InputError(Exception):
    """Something that the user asked for wrongly; the message is the one line to show."""


class SettingError(InputError):
    """A setting with a value that is not possible.

    Attributes:
        setting: The setting's dotted name, as in TOML and flags.
        value: What was given.
        allowed: What could have been given instead.
    """

    def __init__(self, setting: str, value: object, allowed: str) -> None:
        super().__init__(f"{setting}: {value} is not possible; allowed: {allowed}")
        self.setting, self.value, self.allowed = setting, value, allowed

    def __reduce__(self) -> tuple[type[SettingError], tuple[str, object, str]]:
        return SettingError, (self.setting, self.value, self.allowed)


def first_line(error: BaseException) -> str:
    r"""Returns the first line of an error's message, or the name of its class where it has none.

    Example:
        >>> first_line(OSError("disk is full\nat block 7")), first_line(MemoryError())
        ('disk is full', 'MemoryError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def kind_of(value: object) -> str:
    """Returns the type of a value in words, for messages.

    Example:
        >>> kind_of(3), kind_of(int)
        ('an object of type int', 'the class int')
    """
    return f"the class {value.__qualname__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"
