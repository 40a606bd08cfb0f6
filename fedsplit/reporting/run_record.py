"""Reads what a run's folder holds, finished or not, for a report."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsplit.errors import InputError, printable
from fedsplit.events.run_files import METRICS, SUMMARY
from fedsplit.settings.documents import dotted

CONFIG = "config.toml"
DATA = "data.json"

LONGEST_NAME = 60
"""Most characters of a name on a page. Names come from users' files, and may be of any length."""


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder holds. Files that are missing or broken leave their field empty, and a note.

    Nothing in the files is trusted: values are looked at by `number` and `text` where they are used.

    Attributes:
        folder: The run's folder.
        name: Name of the run on the page.
        settings: Settings by dotted name.
        summary: Content of summary.json.
        events: Events of metrics.jsonl, by the event's name, in the order of the file.
        data: Content of data.json.
        notes: What is missing, a line each.
    """

    folder: Path
    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    events: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, event: str) -> Sequence[Mapping[str, Any]]:
        """Returns the events of a name, in the order of the rounds."""
        return self.events.get(event, ())

    @property
    def clients(self) -> list[str]:
        """Names of the clients in the order of their numbers; of the events, where data.json has none."""
        listed = self.data.get("clients")
        if isinstance(listed, list):
            return [text(client.get("name")) for client in listed if isinstance(client, Mapping)]
        names: dict[str, None] = {}
        for event in (*self.of("train"), *self.of("evaluate")):
            names |= dict.fromkeys(numbers(event.get("clients")))
        return list(names)

    def setting(self, name: str) -> str:
        """Returns the value of a setting as text; empty if the settings are missing."""
        return shown(self.settings.get(name, ""))


def read_run(folder: Path) -> RunRecord:
    """Reads a run's folder. The run may be unfinished, and files may be missing or broken.

    Args:
        folder: The run's folder.

    Raises:
        InputError: The folder does not exist, or holds nothing of a run.

    Example:
        >>> read_run(Path("nowhere"))
        Traceback (most recent call last):
        fedsplit.errors.InputError: nowhere is no folder of a run: there is no such folder
    """
    if not folder.is_dir():
        reason = "it is a file" if folder.exists() else "there is no such folder"
        raise InputError(f"{folder} is no folder of a run: {reason}")
    if not any((folder / name).is_file() for name in (CONFIG, METRICS, SUMMARY)):
        raise InputError(f"{folder} is no folder of a run: there is no {CONFIG}, {METRICS} or {SUMMARY} in it")
    notes: list[str] = []
    settings = dotted(_document(folder / CONFIG, notes, "the settings are not known"))
    data = _document(folder / DATA, notes, "who holds which data is not known")
    events = _events(folder / METRICS, notes)
    summary = _document(folder / SUMMARY, notes, "the run has not ended")
    if summary and summary.get("complete") is False:
        notes.append(f"The run ended early: {text(summary.get('ended'), 400)}")
    return RunRecord(folder, text(folder.resolve().name), settings, summary, events, data, tuple(notes))


def _document(path: Path, notes: list[str], without: str) -> dict[str, Any]:
    """Reads a JSON or TOML file of a mapping; adds a note and returns nothing if that is not possible.

    Args:
        path: The file.
        notes: Notes to add to.
        without: What the report lacks without the file.
    """
    try:
        content = path.read_text(encoding="utf-8")
        document = tomllib.loads(content) if path.suffix == ".toml" else json.loads(content)
    except FileNotFoundError:
        notes.append(f"There is no {path.name}: {without}.")
        return {}
    # ValueError: wrong syntax of either kind, or bytes that are no UTF-8. RecursionError: brackets in many brackets.
    except (OSError, ValueError, RecursionError):
        notes.append(f"{path.name} cannot be read: {without}.")
        return {}
    if not isinstance(document, dict):
        notes.append(f"{path.name} cannot be read: {without}.")
        return {}
    return document


def _events(
    path: Path,
    notes: list[str],
) -> dict[str, list[Mapping[str, Any]]]:
    """Reads the events of metrics.jsonl by name. Broken lines, as of a killed run, are left out and counted."""
    try:
        # A few bytes that are no UTF-8 must not cost all other events.
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        notes.append(f"There is no {path.name}: no round has been measured.")
        return {}
    except OSError:
        notes.append(f"{path.name} cannot be read: the rounds are not known.")
        return {}
    events: dict[str, list[Mapping[str, Any]]] = {}
    broken = 0
    for line in lines:
        try:
            event = json.loads(line)
            name = event["event"]
            # `isinstance` would take true for a round.
            is_event = isinstance(name, str) and type(event["round"]) is int
        except (ValueError, KeyError, TypeError, RecursionError):
            is_event = False
        if is_event:
            events.setdefault(name, []).append(event)
        else:
            broken += 1
    if broken:
        lines_are = "line is" if broken == 1 else "lines are"
        notes.append(f"{broken} {lines_are} left out of {path.name}: no event can be read there.")
    return events


def number(value: object) -> float | None:
    """Returns a value of a file as a finite number; None for anything else.

    Example:
        >>> number(3), number("3"), number(float("nan")), number(True)
        (3.0, None, None, None)
    """
    # Not `isinstance`, which takes true and false for numbers.
    if type(value) not in (int, float):
        return None
    try:
        as_float = float(value)  # type: ignore[arg-type]  # a number by now
    # An integer in JSON may be larger than any float.
    except OverflowError:
        return None
    return as_float if math.isfinite(as_float) else None


def numbers(value: object) -> dict[str, float]:
    """Returns the finite numbers of a mapping of a file, by name; nothing for anything else.

    Example:
        >>> numbers({"ann": 2.5, "bob": None})
        {'ann': 2.5}
    """
    if not isinstance(value, Mapping):
        return {}
    found = {}
    for name, item in value.items():
        as_number = number(item)
        if as_number is not None:
            found[text(name)] = as_number
    return found


def text(value: object, longest: int = LONGEST_NAME) -> str:
    r"""Returns a value of a file as one line of printable text.

    Example:
        >>> text("one\ntwo"), text("x" * 99, longest=4)
        ('one two', 'xxx…')
    """
    line = printable("" if value is None else str(value)).strip()
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def shown(value: object) -> str:
    """Returns the value of a setting as a flag would take it.

    Example:
        >>> shown([8, 4]), shown(True), shown(0.0003)
        ('8,4', 'true', '0.0003')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={shown(item)}" for key, item in value.items())
    return text(value, longest=200)
