"""`python -m fedsplit.reference`: prints reference pages in Markdown, made from the code of settings and events.

$ python -m fedsplit.reference settings > docs/settings.md
$ python -m fedsplit.reference events        # the table in docs/results.md
$ python -m fedsplit.reference schema        # JSON schema of a line of metrics.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedsplit.events.event_types import EVENTS, Event, fields_of
from fedsplit.settings.config import SECTIONS, SETTINGS
from fedsplit.settings.fields import Setting
from fedsplit.settings.flags import MAY_DIFFER, flag_of

SETTINGS_HEAD = f"""# Settings

This page is made from the settings themselves, by `python -m fedsplit.reference settings`. Reasons, and how settings
work together, are in [training](training.md), [the trunk](trunk.md), [data](data.md), [models](models.md),
[adapters](adapters.md) and [strategies](strategies.md).

A setting can be given in three places. A flag wins over a file, and a file over the default:

```console
$ python -m fedsplit.simulate --lora.rank 4           # a flag
$ cat mine.toml
[lora]
rank = 4
$ python -m fedsplit.simulate --config mine.toml      # a file
```

- A list is separated by commas on the command line, and is a list in TOML. `--sink` and `--mod` may be given several
  times.
- A flag of a `true | false` setting needs no value: `--keep-best` is `--keep-best true`.
- `--strategy.KEY VALUE`, or the table `[strategy_options]` in TOML, gives keyword arguments to the strategy;
  `--objective.KEY VALUE`, or `[objective_options]`, to the objective.
- `--metric.NAME.KEY VALUE`, or the table `[metric_options.NAME]`, gives them to the metric NAME, such as `rouge` of
  `path/to/mine.py:rouge`; `--sink.NAME.KEY VALUE`, or `[sink_options.NAME]`, to a sink; `--mod.NAME.KEY VALUE`, or
  `[mod_options.NAME]`, to a mod.
- With `--resume`, the file is that of the run, and only these flags may be given:
  {", ".join(f"`{name}`" for name in MAY_DIFFER[1:])}.
"""

TOP_HEADING = "The run"
"""Heading of the settings outside of all sections."""


def settings_page() -> str:
    """Returns the page with every setting: its name in TOML, flags, default, allowed values and help.

    Example:
        >>> row = next(line for line in settings_page().splitlines() if line.startswith("| `clip`"))
        >>> row.split(" | ")[1:3]
        ['`--train.clip`', '0']
    """
    parts = [SETTINGS_HEAD, f"\n## {TOP_HEADING}\n", _settings_table("")]
    for section, settings in SECTIONS.items():
        parts.append(f"\n## `[{section}]`\n\n{settings.__doc__}\n")
        parts.append(_settings_table(section))
    # Parts end with a line break of their own, and are joined by a further one: no two empty lines in a row.
    return "\n".join(parts).replace("\n\n\n", "\n\n")


def _settings_table(section: str) -> str:
    """Returns the table of a section's settings; with "", of the settings outside of all sections."""
    rows = []
    for setting in SETTINGS.values():
        if setting.section == section:
            rows.append(_setting_row(setting))
    return _table(("name", "flag", "default", "allowed", ""), rows)


def _setting_row(setting: Setting) -> list[str]:
    """Returns the cells of a setting's row."""
    flags = [_code(flag_of(setting.name))]
    if setting.alias:
        flags.append(_code(setting.alias))
    return [
        _code(setting.field),
        ", ".join(flags),
        _default(setting.default),
        _allowed(setting.words),
        setting.help,
    ]


def _default(value: object) -> str:
    """Returns a default in the form of the command line, or "" without a default.

    Example:
        >>> _default(True), _default(0.001), _default((8, 4))
        ('true', '0.001', '8,4')
    """
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _allowed(words: str) -> str:
    """Returns the allowed values. A choice of names becomes a list of names.

    Example:
        >>> _allowed("fp32 | bf16"), _allowed("a whole number")
        ('`fp32`, `bf16`', 'a whole number')
    """
    if " | " not in words:
        return words
    names = [_code(name) for name in words.split(" | ")]
    return ", ".join(names)


def events_table() -> str:
    """Returns a table of all events and their fields, with units.

    Example:
        >>> "| `notice`, `Notice` | `text` |" in events_table()
        True
    """
    rows = []
    for kind in EVENTS:
        event_and_class = f"{_code(kind.name)}, {_code(kind.__name__)}"
        for number, field in enumerate(fields_of(kind)):
            if field.name == "time":  # every event has the field; the page explains it once
                continue
            first_cell = event_and_class if number == 0 else ""
            rows.append([first_cell, _code(field.name), field.metadata["unit"], field.metadata["help"]])
    return _table(("event, class", "field", "unit", ""), rows)


def events_schema() -> dict[str, Any]:
    """Returns the JSON schema of an event's JSON form, as in a line of metrics.jsonl.

    Example:
        >>> events_schema()["$defs"]["Notice"]["properties"]["text"]["type"]
        'string'
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "An event of a run",
        "anyOf": [{"$ref": f"#/$defs/{kind.__name__}"} for kind in EVENTS],
        "$defs": {kind.__name__: _schema_of_event(kind) for kind in EVENTS},
    }


def _schema_of_event(kind: type[Event]) -> dict[str, Any]:
    """Returns the JSON schema of one kind of event."""
    hints = get_type_hints(kind)
    properties: dict[str, Any] = {"event": {"const": kind.name}}
    required = ["event"]
    for field in fields_of(kind):
        description = field.metadata["help"]
        if field.metadata["unit"]:
            description += f", in {field.metadata['unit']}"
        properties[field.name] = {**_schema_of_type(hints[field.name]), "description": description}
        if not field.metadata["omitted"]:
            required.append(field.name)
    return {
        "type": "object",
        "description": kind.__doc__,
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}
"""Names of plain types in a JSON schema."""


def _schema_of_type(hint: Any) -> dict[str, Any]:
    """Returns the JSON schema of a field's type.

    Raises:
        TypeError: An event has a field of a type that has no form in JSON.
    """
    origin = get_origin(hint)
    arguments = get_args(hint)
    if hint is Any:
        return {}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (types.UnionType, Union):  # `X | Y` and `Optional[X]` differ in Python
        if all(argument in _PLAIN for argument in arguments):
            return {"type": [_PLAIN[argument] for argument in arguments]}
        return {"anyOf": [_schema_of_type(argument) for argument in arguments]}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _schema_of_type(arguments[1])}
    if origin is Sequence:
        return {"type": "array", "items": _schema_of_type(arguments[0])}
    raise TypeError(f"{hint} has no form in JSON")


def _code(text: str) -> str:
    return f"`{text}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table. Bars and angle brackets in the cells are escaped."""
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([cell.replace("|", "\\|").replace("<", "\\<") for cell in row])
    text = ""
    for line in lines:
        text += "| " + " | ".join(line) + " |\n"
    return text.replace("|  |", "| |")  # an empty cell


PAGES: Mapping[str, Callable[[], str]] = {
    "settings": settings_page,
    "events": events_table,
    "schema": lambda: json.dumps(events_schema(), indent=2) + "\n",
}
"""Pages by name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a page."""
    parser = argparse.ArgumentParser(prog="python -m fedsplit.reference", description="Prints a page of reference.")
    parser.add_argument("page", choices=sorted(PAGES))
    name = parser.parse_args(argv).page
    make_page = PAGES[name]
    sys.stdout.write(make_page())
    return 0
