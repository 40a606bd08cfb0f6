"""`python -m fedsplit.reference`: reference pages in Markdown, made from the settings and the events themselves.

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

- A list is separated by commas on the command line, and is a list in TOML. `--sink` may be given several times.
- A flag of a `true | false` setting needs no value: `--keep-best` is `--keep-best true`.
- `--strategy.KEY VALUE`, or the table `[strategy_options]` in TOML, gives keyword arguments to the strategy;
  `--objective.KEY VALUE`, or `[objective_options]`, to the objective.
- `--metric.NAME.KEY VALUE`, or the table `[metric_options.NAME]`, gives them to the metric NAME, such as `rouge` of
  `path/to/mine.py:rouge`; `--sink.NAME.KEY VALUE`, or `[sink_options.NAME]`, to a sink.
- With `--resume`, the file is that of the run, and only these flags may be given:
  {", ".join(f"`{name}`" for name in MAY_DIFFER[1:])}.
"""

HEADINGS = {"": "The run"}
"""Headings of sections that are not called by their names."""


def settings_page() -> str:
    """Returns the page with every setting: its name in TOML, flags, default, allowed values and help.

    Example:
        >>> row = next(line for line in settings_page().splitlines() if line.startswith("| `clip`"))
        >>> row.split(" | ")[1:3]
        ['`--train.clip`', '0']
    """
    parts = [SETTINGS_HEAD]
    for section in ("", *SECTIONS):
        if section:
            parts.append(f"\n## `[{section}]`\n\n{SECTIONS[section].__doc__}\n")
        else:
            parts.append(f"\n## {HEADINGS[section]}\n")
        rows = [_setting_row(setting) for setting in SETTINGS.values() if setting.section == section]
        parts.append(_table(("name", "flag", "default", "allowed", ""), rows))
    return "\n".join(parts).replace("\n\n\n", "\n\n")


def _setting_row(setting: Setting) -> list[str]:
    """Returns the cells of a setting's row."""
    flags = [flag_of(setting.name)]
    if setting.alias:
        flags.append(setting.alias)
    return [
        _code(setting.field),
        ", ".join(map(_code, flags)),
        _default(setting.default),
        _allowed(setting.words),
        setting.help,
    ]


def _default(value: object) -> str:
    """Returns a default as it would be written on the command line; empty for none."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _allowed(words: str) -> str:
    """Returns the allowed values, with a choice of names as a list of them."""
    return ", ".join(_code(name) for name in words.split(" | ")) if " | " in words else words


def events_table() -> str:
    """Returns a table of all events and their fields, with units.

    Example:
        >>> "| `notice`, `Notice` | `text` |" in events_table()
        True
    """
    rows = []
    for kind in EVENTS:
        for field in fields_of(kind):
            if field.name == "time":  # of every event
                continue
            name = f"{_code(kind.name)}, `{kind.__name__}`" if field is fields_of(kind)[0] else ""
            rows.append([name, _code(field.name), field.metadata["unit"], field.metadata["help"]])
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
    hints = get_type_hints(kind)
    properties: dict[str, Any] = {"event": {"const": kind.name}}
    required = ["event"]
    for field in fields_of(kind):
        unit = f", in {field.metadata['unit']}" if field.metadata["unit"] else ""
        properties[field.name] = {**_schema_of_type(hints[field.name]), "description": field.metadata["help"] + unit}
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


def _schema_of_type(hint: Any) -> dict[str, Any]:
    """Returns the JSON schema of a field's type.

    Raises:
        TypeError: An event has a field of a type that has no form in JSON.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (types.UnionType, Union):
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
    """Returns a Markdown table, whose cells may hold bars and angle brackets."""
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([cell.replace("|", "\\|").replace("<", "\\<") for cell in row])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines).replace("|  |", "| |")


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
    sys.stdout.write(PAGES[parser.parse_args(argv).page]())
    return 0
