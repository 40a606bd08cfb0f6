"""Pages: one file that needs nothing else, whatever the files of a run hold."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import pytest
from reported_runs import HOSTILE, write_run

from fedsplit.errors import InputError, SettingError
from fedsplit.reporting import page
from fedsplit.reporting.content import Passage
from fedsplit.reporting.page import try_report, write_report

try_report_itself = try_report  # the fixture that spares runs their reports puts another one in its place


class Tags(html.parser.HTMLParser):
    """Collects elements, and checks that all that are opened are closed."""

    VOID = ("meta", "path", "use", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_of_a_run_shows_everything_and_needs_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert write_report([run]) == run / "report.html"
    text = (run / "report.html").read_text()
    assert len(text) < 200_000
    tags = Tags(text)
    for words in (
        *("Loss by round", "Loss by client", "Loss against traffic", "Loss against time", "Who holds what, by colour"),
        *("Bytes by kind and round", "Seconds by phase and round", "Aggregation error by layer"),
        *(
            "Norm of the adapter by layer",
            "Peak memory by party",
            "abc123, with changes",
            "2 cores, Linux",
            "3.0000 → 2.8000",
        ),
    ):
        assert words in tags.text, words
    # Nothing is loaded, and nothing runs.
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags.seen}
    attributes = [item for _, found in tags.seen for item in found.items()]
    addresses = [value or "" for name, value in attributes if name.endswith(("href", "src"))]
    assert addresses and all(address.startswith("#") for address in addresses)
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    # Colours come from the style sheet, so that they follow the reader's scheme.
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", text)) == set()


def test_names_are_shown_and_never_taken_for_anything_else(tmp_path: Path) -> None:
    """Of clients and of settings, in figures and in tables."""
    run = write_run(tmp_path / HOSTILE.replace("/", "_"), **{"dataset": HOSTILE})
    document = json.loads((run / "summary.json").read_text())
    document["versions"][HOSTILE] = HOSTILE
    (run / "summary.json").write_text(json.dumps(document))
    other = write_run(tmp_path / "other")
    single = write_report([run], tmp_path / "one.html").read_text()
    several = write_report([run, other], tmp_path / "two.html").read_text()
    for text in (single, several):
        assert "<script" not in text
        assert HOSTILE in Tags(text).text


def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "summary.json").unlink()
    (run / "data.json").write_text("{")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "ro')
    text = Tags(write_report([run]).read_text()).text
    notes = ("the run has not ended", "data.json cannot be read", "1 line is left out of metrics.jsonl")
    for words in (*notes, "Loss by round"):
        assert words in text, words


@pytest.mark.parametrize("kept", ["config.toml", "metrics.jsonl", "summary.json"])
def test_any_single_file_makes_a_page(kept: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for path in run.iterdir():
        if path.name != kept:
            path.unlink()
    assert Tags(write_report([run]).read_text()).text


def test_a_thousand_clients_fit(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", names=tuple(f"client {number}" for number in range(1000)), rounds=30)
    text = write_report([run]).read_text()
    assert len(text) < 500_000
    assert "The range of the 1000 clients" in text


def test_a_thousand_rounds_fit(tmp_path: Path) -> None:
    assert len(write_report([write_run(tmp_path / "run", rounds=1000, gain=1e-3)]).read_text()) < 600_000


def test_texts_and_a_title_are_shown_as_they_are(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    text = write_report([run], None, None, [Passage("before", "one\n<two>")], title="Mine & yours").read_text()
    assert "one\n&lt;two&gt;" in text and "<h1>Mine &amp; yours</h1>" in text


def test_a_report_replaces_a_report_and_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_report([run])
    write_report([run])
    (tmp_path / "notes.html").write_text("mine")
    with pytest.raises(SettingError, match=r"^out: .*notes.html \(there already, and no report\) is not possible"):
        write_report([run], tmp_path / "notes.html")
    assert (tmp_path / "notes.html").read_text() == "mine"


def test_folders_that_are_no_runs_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        write_report([tmp_path / "nowhere", tmp_path / "empty"])
    assert [str(error).partition(" is no folder of a run: ")[2] for error in caught.value.errors] == [
        "there is no such folder",
        "there is no config.toml, metrics.jsonl or summary.json in it",
    ]


def test_a_failure_to_draw_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("no\nroom")

    run = write_run(tmp_path / "run")
    monkeypatch.setattr(page, "page_of", broken)
    assert try_report_itself(run) == "no report, and the run is complete without it: no"
    assert not (run / "report.html").exists()
