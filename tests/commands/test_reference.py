"""Pages of reference are what the settings and the events say today."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from test_event_types import evaluated, started

from fedsplit.commands import reference
from fedsplit.events import Notice, RoundTrained
from fedsplit.events.event_types import EVENTS, fields_of
from fedsplit.settings.config import SETTINGS
from fedsplit.settings.flags import flag_of

RESULTS = Path("docs/results.md")


def test_the_page_of_settings_is_made_from_the_settings() -> None:
    """`python -m fedsplit.reference settings > docs/settings.md` makes it anew."""
    assert Path("docs/settings.md").read_text() == reference.settings_page()


def test_every_setting_is_on_the_page_with_all_its_flags() -> None:
    lines = [line for line in reference.settings_page().splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    flags = [flag for _, flag_cell, *_ in rows for flag in flag_cell.split(", ")]
    known = [flag_of(name) for name in SETTINGS] + [setting.alias for setting in SETTINGS.values()]
    assert sorted(flags) == sorted(f"`{flag}`" for flag in known if flag)
    assert {len(row) for row in rows} == {5}


def test_the_table_of_events_is_made_from_the_events() -> None:
    """`python -m fedsplit.reference events` prints it."""
    page = RESULTS.read_text().partition("events` -->\n\n")[2].partition("\n<!-- end -->")[0]
    assert page == reference.events_table()
    fields = re.findall(r"^\|[^|]*\| `(\w+)` \|", page, flags=re.M)
    assert fields == [field.name for kind in EVENTS for field in fields_of(kind) if field.name != "time"]


def test_the_schema_takes_what_events_are_and_nothing_else() -> None:
    schema = reference.events_schema()
    Draft202012Validator.check_schema(schema)
    check = Draft202012Validator(schema).validate
    trained = RoundTrained(round=1, loss=None, clients={}, tokens=0, seconds=0.0, trunk={"steps": 0}, elapsed=1.0)
    good = [event.to_document() for event in (started("runs/x"), trained, evaluated(1), Notice(text="x"))]
    for document in good:
        check(json.loads(json.dumps(document)))

    bad: list[dict[str, Any]] = [
        {**good[3], "text": 3},
        {**good[3], "more": 3},
        {**good[3], "event": "unheard-of"},
        {name: value for name, value in good[1].items() if name != "tokens"},
        {**good[1], "clients": {"ann": "high"}},
        {**good[0], "parameters": {"trunk": {"total": 0.5}}},
    ]
    for document in bad:
        with pytest.raises(ValidationError):
            check(document)


def test_a_field_without_a_form_in_json_is_no_field_of_an_event() -> None:
    with pytest.raises(TypeError, match="has no form in JSON"):
        reference._schema_of_type(set[str])


@pytest.mark.parametrize("page", sorted(reference.PAGES))
def test_every_page_is_printed(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main([page]) == 0
    assert capsys.readouterr().out == reference.PAGES[page]()


def test_the_sink_on_the_page_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = RESULTS.read_text().partition("```python\n")[2].partition("```")[0]
    (tmp_path / "losses.py").write_text(code)
    sink = runpy.run_path(str(tmp_path / "losses.py"))["Losses"]()
    for event in (started(str(tmp_path)), evaluated(0), evaluated(1)):
        sink.handle(event)
    sink.close()
    assert (tmp_path / "losses.csv").read_text().splitlines() == ["0,ann,2.5", "0,bob,3.5", "1,ann,2.5", "1,bob,3.5"]
    assert capsys.readouterr().out == f"wrote {tmp_path / 'losses.csv'}\n"
