"""Errors for wrong input from a user, and words for messages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence


class InputError(Exception):
    """Wrong input from a user. The message is the one line to show."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))

    @property
    def errors(self) -> tuple[InputError, ...]:
        """All errors to report. A plain error reports itself; `InputErrors` reports several."""
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


class UnknownValue(InputError):
    """A setting was read whose value was refused, so that nobody can tell what the user meant by it.

    The refusal has a line of its own. So a check that ends with this error has nothing to report.
    """

    def __init__(self, setting: str) -> None:
        super().__init__(f"{setting}: the value was refused")
        self._setting = setting

    @property
    def errors(self) -> tuple[InputError, ...]:
        """No error: the refusal is reported elsewhere."""
        return ()

    # Pickle would call the class with the message, which is not what the class takes.
    def __reduce__(self) -> tuple[type[UnknownValue], tuple[str]]:
        return UnknownValue, (self._setting,)


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
        self._unknown: UnknownValue | None = None

    @property
    def errors(self) -> tuple[InputError, ...]:
        """The errors so far, in the order in which they were found."""
        return tuple(self._errors.values())

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Collects the `InputError` that ends the context. The code after the context goes on."""
        try:
            yield
        except UnknownValue as unknown:
            self._unknown = unknown
        except InputError as error:
            self.extend(error.errors)

    def collect(self, checks: Iterable[Callable[[], object]]) -> None:
        """Calls checks in order. A check that finds an error does not keep the later checks from being called."""
        for check in checks:
            with self.collecting():
                check()

    def extend(self, errors: Iterable[InputError]) -> None:
        """Adds errors. Of several that refuse the same value of a setting, only the first is kept."""
        for error in errors:
            subject = (error.setting, str(error.value)) if isinstance(error, SettingError) else str(error)
            self._errors.setdefault(subject, error)

    def check(self) -> None:
        """Raises the collected errors, if there are any.

        Raises:
            InputError: The only error.
            InputErrors: All errors, if there are several.
            UnknownValue: No error was found, and a check could not be done.
        """
        errors = [*self._errors.values()]
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise InputErrors(errors)
        if self._unknown is not None:  # what was not checked must not pass as right
            raise self._unknown


def check_all(*rules: Iterable[InputError]) -> None:
    """Raises all errors of a check together.

    Args:
        rules: The errors that each rule of the check finds, as generators yield them. A rule that ends with
            `UnknownValue` does not keep the other rules from being checked.

    Raises:
        InputError: The only error.
        InputErrors: All errors, if there are several.
        UnknownValue: No error was found, and a rule could not be checked.

    Example:
        >>> check_all([], [InputError("no such file")])
        Traceback (most recent call last):
        fedsplit.errors.InputError: no such file
    """
    collector = ErrorCollector()
    for errors in rules:
        with collector.collecting():
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
    if text.isprintable():
        return text
    characters = [character if character.isprintable() else " " for character in text]
    return "".join(characters)


def first_line(error: BaseException) -> str:
    r"""Returns the first line of an error's message, or the name of the error's class if the message is empty.

    Example:
        >>> first_line(OSError("disk is full\nat block 7")), first_line(MemoryError())
        ('disk is full', 'MemoryError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    r"""Returns an error of a library in one line. A first line that only announces the second is joined with it.

    Example:
        >>> one_line(ValueError("refused:\n  a width of 3\nmore")), one_line(ValueError("a width of 3\nmore"))
        ('refused: a width of 3', 'a width of 3')
    """
    if isinstance(error, KeyError):  # its text is the key alone
        return f"the library knows no {error}"
    line = first_line(error)
    if not line.endswith(":"):
        return line
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])


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


def described(value: object) -> str:
    """Returns the type of a value in words, for messages; a text, a number or None is shown as it is.

    Example:
        >>> described("ann"), described(None), described(["ann"])
        ("'ann'", 'None', 'an object of type list')
    """
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    return kind_of(value)
