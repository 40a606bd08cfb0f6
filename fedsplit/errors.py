"""Errors for wrong input from a user, and words for messages."""

from __future__ import annotations


class InputError(Exception):
    """Wrong input from a user. The message is the one line to show."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class SettingError(InputError):
    """A setting with a value that is not possible.

    Attributes:
        setting: Dotted name of the setting, as in TOML and flags.
        value: The refused value.
        allowed: The possible values, in words.

    Example:
        >>> raise SettingError("clients", 0, "a whole number of at least 1")
        Traceback (most recent call last):
        fedsplit.errors.SettingError: clients: 0 is not possible; allowed: a whole number of at least 1
    """

    def __init__(self, setting: str, value: object, allowed: str) -> None:
        super().__init__(f"{setting}: {value} is not possible; allowed: {allowed}")
        self.setting = setting
        self.value = value
        self.allowed = allowed

    # Pickle would call the class with the message alone, which is not what the class takes.
    def __reduce__(self) -> tuple[type[SettingError], tuple[str, object, str]]:
        return SettingError, (self.setting, self.value, self.allowed)


def printable(text: str) -> str:
    r"""Returns a text in which control characters, such as line feeds and escapes, are spaces.

    Texts of a user's files and of clients reach the screen in messages.

    Example:
        >>> printable("one\n\x1b[31mline")
        'one  [31mline'
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def first_line(error: BaseException) -> str:
    r"""Returns the first line of an error's message, or the name of the error's class if the message is empty.

    Example:
        >>> first_line(OSError("disk is full\nat block 7")), first_line(MemoryError())
        ('disk is full', 'MemoryError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def kind_of(value: object) -> str:
    """Returns the type of a value in words, for messages.

    Example:
        >>> kind_of(3), kind_of(int)
        ('an object of type int', 'the class int')
    """
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    return f"an object of type {type(value).__name__}"
