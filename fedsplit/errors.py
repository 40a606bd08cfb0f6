"""Errors for wrong input from a user, and words for messages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence


class InputError(Exception):
    """Wrong input from a user. The message is the one line to show."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))

    @property
    def errors(self) -> tuple[InputError, ...]:
        """The errors to show, each in a line of its own: this one, or those that `InputErrors` holds."""
        return (self,)


class InputErrors(InputError):
    r"""Several wrong inputs of one call. The message has a line for each.

    Example:
        >>> str(InputErrors([InputError("no such file"), InputError("no such flag")]))
        'no such file\nno such flag'
    """

    def __init__(self, errors: Sequence[InputError]) -> None:
        """Holds errors.

        Args:
            errors: The errors, in the order in which a user reads them.
        """
        Exception.__init__(self, "\n".join(map(str, errors)))  # each is printable by itself
        self._errors = tuple(errors)

    @property
    def errors(self) -> tuple[InputError, ...]:
        """The errors."""
        return self._errors

    # Pickle would call the class with the message alone, which is not what the class takes.
    def __reduce__(self) -> tuple[type[InputErrors], tuple[tuple[InputError, ...]]]:
        return InputErrors, (self._errors,)


class ErrorCollector:
    """Collects wrong inputs of one call, so that a user reads all of them at once.

    Example:
        >>> collector = ErrorCollector()
        >>> for name in ("a", "b"):
        ...     with collector.collecting():
        ...         raise InputError(f"no such file: {name}")
        >>> collector.check()
        Traceback (most recent call last):
        fedsplit.errors.InputErrors: no such file: a
        no such file: b
    """

    def __init__(self) -> None:
        """Starts without an error."""
        self._errors: dict[object, InputError] = {}

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Collects the `InputError` that ends the context. The code after the context goes on."""
        try:
            yield
        except InputError as error:
            self.extend(error.errors)

    def extend(self, errors: Iterable[InputError]) -> None:
        """Adds errors. Of several that refuse the same value of a setting, only the first is kept."""
        for error in errors:
            subject = (error.setting, str(error.value)) if isinstance(error, SettingError) else str(error)
            self._errors.setdefault(subject, error)

    def check(self) -> None:
        """Raises the collected errors, if there are any.

        Raises:
            InputError: The only error.
            InputErrors: All errors, where there are several.
        """
        errors = [*self._errors.values()]
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise InputErrors(errors)


def check_all(errors: Iterable[InputError]) -> None:
    """Raises all errors of a check together.

    Args:
        errors: The errors; none where all is right.

    Raises:
        InputError: The only error.
        InputErrors: All errors, where there are several.

    Example:
        >>> check_all([])
    """
    collector = ErrorCollector()
    collector.extend(errors)
    collector.check()


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


def shortened(value: object) -> str:
    """Returns a value as messages show it: in one piece, and not longer than a line or two.

    Example:
        >>> shortened(""), shortened(["a", "b"]), shortened("x" * 300) == "x" * 200 + "…"
        ('nothing', 'a,b', True)
    """
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of many digits"
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    text = str(value)
    if text == "":
        return "nothing"
    return text if len(text) <= 200 else f"{text[:200]}…"


def kind_of(value: object) -> str:
    """Returns the type of a value in words, for messages.

    Example:
        >>> kind_of(3), kind_of(int)
        ('an object of type int', 'the class int')
    """
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    return f"an object of type {type(value).__name__}"
