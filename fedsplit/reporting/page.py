"""Writes reports: one HTML file that opens offline, without scripts.

jinja2 escapes whatever the files of runs hold. matplotlib and jinja2 are imported by the functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import fedsplit
from fedsplit.durable import write_text
from fedsplit.errors import InputError, InputErrors, SettingError, one_line
from fedsplit.reporting.content import Page, Passage, Section
from fedsplit.reporting.groups import distinct
from fedsplit.reporting.run_record import RunRecord, read_run
from fedsplit.reporting.several import compared
from fedsplit.reporting.single import page_of

REPORT = "report.html"
"""Name of a run's report in its folder."""

MARK = '<meta name="generator" content="fedsplit">'
"""Line of the page by which a report is known, so that no other file is replaced."""


def write_report(
    folders: Sequence[Path],
    out: Path | None = None,
    baseline: Path | None = None,
    passages: Sequence[Passage] = (),
    title: str = "",
) -> Path:
    """Writes the report on a run, or the report that compares several runs.

    Args:
        folders: Folders of runs, finished or not.
        out: File to write; None for `report.html` in the run's folder, or in the working directory for several runs.
        baseline: Folder of a run to compare with; None for none.
        passages: Texts to show, such as what the model wrote before and after.
        title: Title of the page; empty for the run's name.

    Returns:
        The file.

    Raises:
        InputError: A folder is none of a run, or another file has the name of the report.
        NotWritten: The file could not be written.
    """
    errors: list[InputError] = []
    runs = []
    # All folders are read before an error is raised, so that one call names every wrong folder.
    for folder in [*folders, *([baseline] if baseline else [])]:
        try:
            runs.append(read_run(folder))
        except InputError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else InputErrors(errors)
    # The baseline was read last.
    compared_with = runs.pop() if baseline else None
    if out is None:
        out = runs[0].folder / REPORT if len(runs) == 1 else Path(REPORT)
    check_free(out)
    write_text(out, html_of(runs, compared_with, passages, title))
    return out


def check_free(out: Path) -> None:
    """Checks that a report may be written to a file: a report may be replaced, any other file stays.

    Raises:
        SettingError: Another file has the name, or there is no such folder.
    """
    if not out.parent.is_dir():
        raise SettingError("out", out, "a file in a folder that is there")
    if not out.exists():
        return
    try:
        # The mark stands in the head of a report. A page that quotes the mark further below is no report.
        is_report = out.is_file() and MARK in out.read_text(encoding="utf-8", errors="replace")[:2000]
    except OSError:
        is_report = False
    if not is_report:
        raise SettingError("out", f"{out} (there already, and no report)", "a new file, or an earlier report")


def html_of(
    runs: Sequence[RunRecord],
    baseline: RunRecord | None = None,
    passages: Sequence[Passage] = (),
    title: str = "",
) -> str:
    """Returns the report as HTML. For the arguments see `write_report`."""
    once, again = distinct(runs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib warns of characters that its own font lacks; the page has others
        # `compared` gets the folders as they were given, since its notes name those that were given twice.
        page = page_of(once[0], baseline) if len(once) == 1 else compared(runs, baseline)
    if len(once) == 1:
        page.notes.extend(again)
    if passages:
        # Behind the first section, which has the losses or the comparison, and before all details.
        page.sections.insert(1, Section("Text", passages=list(passages)))
    return _rendered(page, title or page.title)


def _rendered(page: Page, title: str) -> str:
    """Returns a page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedsplit.reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # A name that the template misspells is an error, and no empty place on the page.
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("page.html")
    sections = [section for section in page.sections if not section.is_empty]
    return template.render(page=page, sections=sections, title=title, version=fedsplit.__version__, mark=MARK)


def try_report(folder: Path) -> str:
    """Writes the report of a run that has just ended. A failure is no reason to lose the run.

    Args:
        folder: The run's folder.

    Returns:
        A line on why there is no report; empty if it was written.
    """
    try:
        write_report([folder])
    except Exception as error:  # noqa: BLE001  # whatever a library raises, the run and its exit code stand
        return f"no report, and the run is complete without it: {one_line(error)}"
    return ""
